"""Workers on the nodes of a real Slurm of three nodes, started by srun beside the servers."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cluster, Trial, ended, served, until
from .slurm import PrivateSlurm, missing

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
NODES = 3
LAUNCHED: dict[str, Any] = {"kind": "launched", "node_endpoints": True, "silence_s": 30}
PARSL: dict[str, Any] = {"kind": "parsl", "config": "htex_job", "node_endpoints": True}


def submitted(jobs: Cluster, items: int, backend: dict[str, Any], walltime: str) -> Trial:
    settings = served(0.3) | {"backend": backend}
    settings["limits"] = settings["limits"] | {"margin_s": 5}
    return jobs.submit(items, settings, walltime=walltime, nodes=NODES)


def on(slurm: PrivateSlurm, node: str, word: bytes) -> list[int]:
    """Return the processes on a node whose command line holds a word."""
    found = []
    for pid in slurm.processes(node):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if word in command and b"bash" not in command.partition(b"\0")[0]:
            found.append(pid)
    return found


def hosts(trial: Trial) -> set[str]:
    """Return the nodes whose servers were started, by their records."""
    folder = trial.path / "cluster" / "servers" / "logs"
    return {file.stem for file in folder.glob("127.0.0.*.jsonl")}


def test_a_walltime_cuts_the_workers_and_the_successors_go_on(
    jobs: Cluster, slurm: PrivateSlurm
) -> None:
    trial = submitted(jobs, 2800, LAUNCHED, "2m")  # Slurm may warn a minute early
    trial.worked(20)
    assert hosts(trial) == {f"127.0.0.{2 + n}" for n in range(NODES)}
    for node in ("n1", "n2", "n3"):
        assert len(on(slurm, node, b"node_server")) == 1, "a node is served once"
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(2800)
    codes = [job.code for job in trial.chain.jobs]
    assert codes.count(0) == 1
    assert 5 in codes
    until(lambda: not any(slurm.processes(n) for n in ("n1", "n2", "n3")), "the workers' end")


def test_a_worker_is_killed_and_a_node_is_lost(jobs: Cluster, slurm: PrivateSlurm) -> None:
    """The other workers live on in the same job, and what was lost is asked again."""
    trial = submitted(jobs, 600, LAUNCHED, "10m")
    trial.worked(20)
    workers = on(slurm, "n2", b"workers.launched")
    os.kill(workers[0], signal.SIGKILL)
    trial.worked(len(trial.finished()) + 50)  # by the other workers
    slurm.lose("n3")
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(600)
    assert [job.code for job in trial.chain.jobs][:1] == [0], trial.logs()
    subprocess.run(["slurmd", "-N", "n3"], check=True)


def test_parsl_inside_a_job(jobs: Cluster, slurm: PrivateSlurm) -> None:
    trial = submitted(jobs, 300, PARSL, "10m")
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(300)
    assert [job.code for job in trial.chain.jobs] == [0, None], trial.logs()
    assert hosts(trial) == {f"127.0.0.{2 + n}" for n in range(NODES)}
    assert not list(trial.path.glob("fanfold-parsl-*")), "Parsl's keys and logs are removed"
    until(lambda: not any(slurm.processes(n) for n in ("n1", "n2", "n3")), "the managers' end")
