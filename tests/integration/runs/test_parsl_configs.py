"""Runs on a user's Parsl configuration, and on a DataFlowKernel that is already loaded."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import parsl
import pytest

from fanfold.backends.workers.parsl import htex_local
from fanfold.tests.integration.runs.conftest import STREAMS, Lab, LabMaker
from fanfold.tests.integration.runs.test_workers_kill import (
    asked_again,
    lived,
    marked,
    the_first,
    their_parent,
)

pytestmark = pytest.mark.integration

SITE = """
from __future__ import annotations

from dataclasses import dataclass

from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider


@dataclass
class Machine:
    workers: int


def executor():
    return HighThroughputExecutor(
        label="mine",
        address="127.0.0.1",
        max_workers_per_node=Machine(2).workers,
        cores_per_worker=0.1,
        encrypted=False,
        heartbeat_period=2,
        heartbeat_threshold=15,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )


config = Config(executors=[executor()], usage_tracking=0)
without_log = Config(executors=[executor()], usage_tracking=0, initialize_logging=False)


def made():
    return Config(executors=[executor()], usage_tracking=0)
"""

PROGRAM = """
import asyncio, json, sys
import parsl
from fanfold import RunContext, build_graph
from my_site import config

@parsl.python_app
def doubled(n):
    return 2 * n

if __name__ == "__main__":
    settings, out = sys.argv[1:]
    with parsl.load(config) as kernel:
        first = doubled(1).result()
        graph = build_graph(RunContext(config=settings, out=out))
        done = asyncio.run(graph.ainvoke({}))["progress"]["done"]
        print(json.dumps([first, done, kernel.cleanup_called, doubled(2).result()]))
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module where this process and others find it; Parsl's scripts are on PATH."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my_site.py").write_text(SITE)
    (tmp_path / "site" / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)  # Parsl writes its files where it is
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


async def ended(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in another process until it ends."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, *words],
        cwd=lab.home,
        capture_output=True,
        text=True,
        check=False,
        timeout=60.0,
    )


def settings(lab: Lab, config: str) -> str:
    """Write the settings of a run on a Parsl configuration, and return the file."""
    lab.config["limits"]["hedge"] = False
    lab.config["backend"] = {"kind": "parsl", "config": config, "workers": 2}
    file: Path = lab.home / "config.yaml"
    file.write_bytes(orjson.dumps(lab.config))
    return str(file)


@pytest.mark.parametrize("name", ["config", "made"])
async def test_a_config_of_ones_own(
    lab_of: LabMaker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line; nothing is left behind, and Parsl's log stays out of the terminal."""
    token = f"FANFOLD_TEST={os.urandom(6).hex()}"
    monkeypatch.setenv(*token.split("="))
    async with lab_of(items=100, ttft_s=0.0) as lab:
        aggregate = await lab.undisturbed()
        words = ("run", settings(lab, f"my_site:{name}"), "--out", str(lab.out))
        done = await ended(lab, "-m", "fanfold", *words)
        assert done.returncode == 0, done.stderr
        assert not any(word in done.stderr for word in ("DEBUG", "INFO", "DataFlowKernel"))
        lab.assert_whole(aggregate, again=0)
        await lab.until(lambda: not marked(token))


@pytest.mark.long
async def test_worker_and_manager_of_ones_own_config_are_killed(lab_of: LabMaker) -> None:
    """Parsl gives such an executor up; a new one is made of the same module's Config."""
    async with lab_of(items=400) as lab:
        settings(lab, "my_site:without_log")
        aggregate = await lab.undisturbed()
        settings(lab, "my_site:without_log")
        lab.config["backend"]["silence_s"] = 20
        result = await lived(lab, the_first, their_parent)
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)
        again = asked_again(lab)
        print(f"parsl, a config of one's own: {again} items asked again")
        assert 0 < again <= STREAMS // 2 + 2 * STREAMS


async def test_scripts_that_are_not_on_path(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where fanfold is started by its path, without an activated environment."""
    monkeypatch.setenv("PATH", os.defpath)
    async with lab_of(items=20) as lab:
        file = settings(lab, "my_site:config")
        done = await ended(lab, "-m", "fanfold", "run", file, "--out", str(lab.out))
    assert done.returncode == 2
    assert "No such file or directory: 'interchange.py'" in done.stderr
    assert f'activate the environment, or export PATH="{Path(sys.executable).parent}' in done.stderr


async def test_a_kernel_that_a_program_has_loaded_stays_its_own(lab_of: LabMaker) -> None:
    async with lab_of(items=100, ttft_s=0.0) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        program = str(lab.home / "site" / "program.py")
        done = await ended(lab, program, settings(lab, "loaded"), str(lab.out))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [2, 100, False, 4]
        lab.assert_whole(aggregate, again=0)


@pytest.mark.long
async def test_workers_of_a_loaded_kernel_are_killed(lab_of: LabMaker, tmp_path: Path) -> None:
    """Of one, its shard goes to another; of all, the run ends, and goes on under a new kernel."""
    async with lab_of(items=400) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        settings(lab, "loaded")
        with parsl.load(htex_local(2, tmp_path / "parsl")) as kernel:
            result = await lived(lab, the_first, their_parent)
            assert not kernel.cleanup_called
        assert (result.exit_code, result.progress["done"] < 400) == (5, True)
        assert "the DataFlowKernel has no workers left" in str(result.reason)
        parsl.clear()
        with parsl.load(htex_local(2, tmp_path / "parsl")):
            assert (await lab.live()).exit_code == 0
        parsl.clear()
        lab.assert_whole(aggregate, again=3 * STREAMS)
