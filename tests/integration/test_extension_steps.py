"""The steps of CONTRIBUTING.md, followed for a toy of each kind in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from textwrap import dedent

import pytest

from fanfold.backends.cluster.chain import chain_file

pytestmark = pytest.mark.integration
ROOT = Path(str(files("fanfold"))).resolve()
PACKAGE = ("__init__.py", "__main__.py", "py.typed", "graphs", "nodes", "backends", "configs")
PATH = re.compile(r"`([\w/<>]+\.(?:py|yaml))`")

ONE_FOLDER = {
    "an input format": {"backends/inputs"},
    "an aggregator": {"nodes/aggregators", "configs"},
    "a backend": {"backends/workers", "configs"},
    "a batch scheduler": {"backends/cluster", "configs"},
    "a command": {"graphs/cli"},
}
"""Where a toy of each kind may change something: one folder, and the settings model."""


@dataclass
class Copy:
    """A copy of the package, to which toys are added."""

    folder: Path

    def add(self, kind: str, path: str, text: str, at: str | None = None) -> None:
        """Write a module, or insert text into one before a line; only where the steps say so."""
        section = (ROOT / "CONTRIBUTING.md").read_text().split(f"### Add {kind}\n")[1]
        steps = section.split("\n#")[0]
        named = [re.sub(r"<\w+>", r"\\w+", found) for found in PATH.findall(steps)]
        assert any(re.fullmatch(pattern, path) for pattern in named), f"{path}: no step of {kind}"
        assert str(Path(path).parent) in ONE_FOLDER[kind]
        file = self.folder / "fanfold" / path
        assert file.exists() is (at is not None)
        before = file.read_text() if at is not None else ""
        assert at is None or before.count(at) == 1, f"{path}: {at!r}"
        text = dedent(text) if at is None else text
        file.write_text(text if at is None else before.replace(at, f"{text}{at}"))

    def run(self, *arguments: str) -> str:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "fanfold", *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder), "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    for name in PACKAGE:
        if (source := ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tmp_path / "fanfold" / name, ignore=ignored)
        else:
            (tmp_path / "fanfold").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "fanfold" / name)
    return Copy(tmp_path)


def add_format(copy: Copy) -> None:
    kind = "an input format"
    copy.add(
        kind,
        "backends/inputs/toy.py",
        """
        from fanfold.backends.core.errors import InputError


        def read_toy(path, config, needed):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                name, found, text = line.partition("=")
                if not found:
                    raise InputError(f"{path}, line {number}: no '='")
                yield number, {"name": name, "text": text}
        """,
    )
    module = "backends/inputs/formats.py"
    copy.add(kind, module, "from .toy import read_toy\n", at="from .readers import")
    copy.add(
        kind, module, '    ".toy": InputFormat(read_toy),\n', at='    ".parquet": InputFormat('
    )


def add_aggregator(copy: Copy) -> None:
    kind = "an aggregator"
    copy.add(
        kind,
        "nodes/aggregators/toy.py",
        """
        from dataclasses import dataclass
        from typing import ClassVar

        from .base import Aggregator


        @dataclass(frozen=True, slots=True)
        class Longest(Aggregator):
            op: ClassVar[str] = "longest"
            column: str

            def empty(self):
                return {"of": self.to_spec(), "length": 0}

            def add(self, state, outcomes):
                lengths = [len(str(one.row[self.column])) for one in outcomes]
                state["length"] = max([state["length"], *lengths])

            @staticmethod
            def combine(a, b):
                return a if a["length"] >= b["length"] else b

            def present(self, state):
                return {"op": self.op, "length": state["length"]}
        """,
    )
    registry, settings = "nodes/aggregators/registry.py", "configs/aggregators.py"
    copy.add(kind, registry, "from .toy import Longest\n", at="from .stats import Stats\n")
    copy.add(kind, registry, '    "longest": Longest,\n', at='    "collect": Collect,\n')
    model = """class LongestConfig(AggregatorConfig):
    access: ClassVar[dict[str, Access]] = declare_access(open="op column")

    op: Literal["longest"]
    column: str


"""
    copy.add(kind, settings, model, at="AnyAggregatorConfig = Annotated[\n")
    copy.add(kind, settings, "LongestConfig | ", at="CountConfig\n    | StatsConfig")


def add_backend(copy: Copy) -> None:
    kind = "a backend"
    copy.add(
        kind,
        "backends/workers/toy.py",
        """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        from .executor import ExecutorBackend


        class ToyBackend(ExecutorBackend):
            pass


        def make_toys(config, work, folder):
            (folder / "toys").write_text(str(config.toys))
            spawn = multiprocessing.get_context("spawn")
            return [ToyBackend(lambda: ProcessPoolExecutor(1, spawn), work, 1, "toy")]
        """,
    )
    registry, settings = "backends/workers/registry.py", "configs/backend.py"
    copy.add(kind, registry, "from .toy import make_toys\n", at="from .pool import BackendPool\n")
    copy.add(kind, registry, '    "toy": make_toys,\n', at='    "local": _local_backends,\n')
    copy.add(kind, settings, '"toy", ', at='"local", "executor", "parsl", "globus_compute"')
    copy.add(
        kind, settings, '    "toy": {"toys", "workers"},\n', at='    "local": {"processes"},\n'
    )
    copy.add(kind, settings, "toys ", at="kind processes factory config command host endpoints ")
    copy.add(kind, settings, "    toys: int = 1\n", at="    attempts: Annotated[int")
    copy.add(kind, settings, "        toys: (toy) A number.\n", at="        attempts: Maximum")


def add_scheduler(copy: Copy) -> None:
    kind, module = "a batch scheduler", "backends/cluster/schedulers.py"
    toy = """class Toy(Scheduler):
    submit_command = "toysub"
    cancel_command = "toydel"
    job_variable = "TOY_JOB"
    end_variable = None
    variables = "TOY"
    kept_variables = frozenset()
    keeps_broken_jobs = False

    def directives(self, plan):
        yield f"#TOY {plan.nodes} nodes"

    def submit(self, script, after=None):
        return _run_command(["toysub", str(script), *([after] if after else [])]).strip()

    def fetch_states(self, jobs):
        return dict.fromkeys(jobs, "ended")

    def drain(self, job):
        self.cancel(job)

    def cancel(self, job):
        _run_command(["toydel", job])

    def fetch_usage(self, jobs):
        return {}


"""
    copy.add(kind, module, toy, at="SCHEDULERS: Final[dict[str, Scheduler]] = {")
    copy.add(kind, module, '"toy": Toy(), ', at='"pbs": Pbs(),')
    copy.add(kind, "configs/site.py", '"toy", ', at='"pbs", "slurm"]\n')
    (copy.folder / "bin").mkdir()
    submitted = copy.folder / "submitted"
    programs = {
        "toysub": f"""echo "$@" >> {submitted}; id=toy$(wc -l < {submitted})
start() {{
  until grep -q "$id" "${{1%/*}}/chain.jsonl"; do sleep 0.05; done
  TOY_JOB=$id bash "$1"
}}
if [ -z "$2" ]; then start "$1" > /dev/null 2>&1 < /dev/null & fi
echo $id""",
        "toydel": f"echo $1 >> {copy.folder}/deleted",
    }
    for name, text in programs.items():
        program = copy.folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)


def add_command(copy: Copy) -> None:
    kind = "a command"
    copy.add(kind, "graphs/cli/toy.py", "def say(name):\n    print(f'toy {name}')\n")
    command = """@app.command()
@argument("name", "NAME", "A toy.", type=str)
def toy(name: str) -> None:
    from .toy import say

    say(name)


"""
    copy.add(kind, "graphs/cli/app.py", command, at='@app.command()\n@number_option("--nodes"')


def test_each_step_list_is_enough(copy: Copy) -> None:
    for add in (add_format, add_aggregator, add_backend, add_scheduler, add_command):
        add(copy)
    assert copy.run("toy", "horse") == "toy horse\n"
    items = [f"n{n}={'x' * n}" for n in range(1, 8)]
    (copy.folder / "items.toy").write_text("\n".join(items))
    settings = {
        "name": "toys",
        "input": {"path": "items.toy", "id": "name"},
        "task": {"prompt": "Repeat {text}"},
        "endpoints": {"simulated": {"nodes": 1, "time_scale": 1000}},
        "reduce": [{"op": "longest", "column": "text"}, {"op": "count"}],
        "backend": {"kind": "toy", "toys": 3, "workers": 1},
        "limits": {"drain_s": 1, "margin_s": 1},
    }
    (copy.folder / "mine.yaml").write_text(json.dumps(settings))
    copy.run("run", "mine.yaml", "--out", "here")
    check_results(copy.folder / "here")

    site = {"name": "toys", "scheduler": "toy", "launcher": "bash", "reserve_s": 1}
    (copy.folder / "site.yaml").write_text(json.dumps(site))
    order = ("--site", "site.yaml", "--nodes", "1", "--walltime", "30m", "--out", "there")
    copy.run("submit", "mine.yaml", *order)
    folder, deadline = copy.folder / "there", time.monotonic() + 60
    while chain_file(folder).read().halt_reason is None:
        logs = "".join(log.read_text() for log in (folder / "cluster").glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
    chain = chain_file(folder).read()
    assert chain.halt_reason == "all items are finished"
    assert [job.id for job in chain.jobs] == ["toy1", "toy2"]
    assert (copy.folder / "deleted").read_text() == "toy2\n"
    assert "#TOY 1 nodes\n" in (folder / "cluster" / "job.sh").read_text()
    check_results(folder)


def check_results(folder: Path) -> None:
    longest, count = json.loads((folder / "aggregate.json").read_text())["aggregate"]
    assert longest == {"op": "longest", "length": 7}
    assert (count["done"], count["failed"]) == (7, 0)
    assert (folder / "toys").read_text() == "3"
