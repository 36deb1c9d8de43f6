from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

import fanfold
from fanfold.backends.cluster.chain import JobChain, chain_file
from fanfold.backends.simulated.process import MODULE
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.configs.overrides import Overrides
from fanfold.graphs.jobs.submit import SubmitOptions, submit_job

from .slurm import PrivateSlurm, private_slurm
from .slurm_accounts import no_accounts

HERE = Path(__file__).parent
PATIENCE_S = 240.0
SETTINGS: dict[str, Any] = {
    "name": "trial",
    "task": {
        "prompt": "How is {text}?",
        "schema": {
            "type": "object",
            "required": ["score"],
            "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
        },
    },
    "endpoints": {"simulated": {"nodes": 2}},
    "reduce": [{"op": "count"}],
}

SLURM_SITE = """\
name: trial
scheduler: slurm
launcher: srun --overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --no-kill --overcommit
host: 127.0.0.$((1 + ${SLURMD_NODENAME#n}))
reserve_s: 10
silence_s: 15
"""


def served(per_item_s: float) -> dict[str, Any]:
    """Settings by which each node serves a simulated model of its own, 4 items at a time."""
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    # the last word is for workers, who ask nobody beforehand whether the answers are simulated
    program = f"{sys.executable} {HERE}/node_server.py {{port}} {{model}} {per_item_s} {MODULE}"
    return {
        "model": {"name": "sim"},
        "endpoints": {"file": "servers"},
        "node": {"serve": program, "ports": port},
        "limits": {"streams": 8, "drain_s": 5, "hedge": False},
    }


def ended(trial: Trial) -> bool:
    """Say whether a chain has ended, its last job included."""
    chain = trial.chain
    return chain.halt_reason is not None and not chain.unfinished_jobs()


def until(true: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait as long as a loaded machine may take."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, f"waited {patience_s:.0f} s for: {what}"
        time.sleep(0.1)


@dataclass
class Trial:
    """One run and its jobs."""

    path: Path

    @property
    def chain(self) -> JobChain:
        return chain_file(self.path).read()

    def finished(self) -> Counter[str]:
        """How often each item has ended, over all journal files."""
        found: Counter[str] = Counter()
        for file in RunFolder(self.path).journal.glob("*.jsonl"):
            lines = file.read_bytes().split(b"\n")[:-1]
            records = [orjson.loads(line) for line in lines]
            found.update(r["id"] for r in records if r.get("status") == "done")
        return found

    def worked(self, items: int) -> None:
        """Wait until so many items are finished, unless the chain ends before."""
        until(lambda: ended(self) or len(self.finished()) >= items, f"{items} items")
        assert len(self.finished()) >= items, self.logs()

    def assert_each_once(self, items: int) -> None:
        """Assert that the chain has ended with every item, and none has ended twice."""
        assert self.chain.halt_reason == "all items are finished", self.logs()
        finished = self.finished()
        assert len(finished) == items
        assert set(finished.values()) == {1}

    def logs(self) -> str:
        files = sorted((self.path / "cluster").glob("*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text()}" for f in files)


@dataclass
class Cluster:
    """A scheduler to try with, and the site file for it."""

    folder: Path
    site: Path

    def submit(self, items: int, settings: dict[str, Any], **order: Any) -> Trial:
        """Submit a run of so many items to jobs of two nodes."""
        rows = "".join(f"i{n},text {n}\n" for n in range(items))
        (self.folder / "in.csv").write_text(f"id,text\n{rows}")
        data = SETTINGS | {"input": {"path": "in.csv", "id": "id"}} | settings
        config = self.folder / "c.yaml"
        config.write_text(yaml.safe_dump(data))
        trial = Trial(self.folder / "run")
        wanted: dict[str, Any] = {"nodes": 2, "walltime": "1h"} | order
        terms = SubmitOptions(str(self.site), **wanted)
        submit_job(str(config), trial.path, Overrides([]), terms, dry=False)
        return trial


@pytest.fixture
def pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The stand-in for PBS; whatever still runs at the end is ended."""
    home, programs = tmp_path / "pbs", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    for name in ("qsub", "qstat", "qsig", "qdel"):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/standin_pbs.py {name} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_PBS", str(home))
    site = tmp_path / "site.yaml"
    launcher = f"{sys.executable} {HERE}/standin_launcher.py {{nodes}}"
    site.write_text(
        f"name: trial\nscheduler: pbs\nlauncher: {launcher}\nhost: $FANFOLD_HOST\nreserve_s: 5\n"
    )
    cluster = Cluster(tmp_path, site)
    yield cluster
    jobs = [job.name for job in home.iterdir() if job.name.isdigit()]
    os.system(f"qdel {' '.join(jobs)}") if jobs else None


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateSlurm]:
    """Keeps accounts where slurmdbd and a MariaDB are."""
    with private_slurm(tmp_path / "slurm", keeps_accounts=no_accounts() is None) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster


@pytest.fixture
def jobs(slurm: PrivateSlurm, tmp_path: Path) -> Cluster:
    assert slurm.conf.exists()
    site = tmp_path / "site.yaml"
    tree = Path(str(fanfold.__file__)).parent.parent
    site.write_text(f"{SLURM_SITE}environment: {{PYTHONPATH: {tree}}}\n")
    return Cluster(tmp_path, site)
