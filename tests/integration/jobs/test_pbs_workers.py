"""Workers on the nodes of a job, started beside its servers; on the stand-in for PBS."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cluster, ended, served, until
from .standin_pbs import members

pytestmark = pytest.mark.integration
ITEMS = 80
LAUNCHED: dict[str, Any] = {"kind": "launched", "node_endpoints": True}


def of_the_job(pbs: Cluster, job: int, word: bytes) -> list[int]:
    """Return the processes of a job whose command line holds a word, launchers left out."""
    session = int((pbs.folder / "pbs" / str(job) / "session").read_text())
    found = []
    for pid in members(session):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue  # it has ended meanwhile
        if any(word in part for part in command[:5]) and b"bash" not in command:
            found.append(pid)
    return found


def test_a_job_of_workers_is_warned_and_its_successor_goes_on(pbs: Cluster) -> None:
    """A worker is killed before, and nothing is served twice or asked twice."""
    trial = pbs.submit(ITEMS, served(0.3) | {"backend": LAUNCHED})
    trial.worked(4)
    workers = of_the_job(pbs, 1, b"workers.launched")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    trial.worked(len(trial.finished()) + 8)  # by the other worker
    subprocess.run(["qsig", "-s", "SIGUSR1", trial.chain.jobs[0].id], check=True)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(ITEMS)
    assert [job.code for job in trial.chain.jobs] == [5, 0, None], trial.logs()
    said = trial.logs()
    assert said.count("starting a server") == said.count("all servers have ended") == 4, said
    servers = trial.path / "cluster" / "servers" / "logs"
    assert {log.name for log in servers.glob("*.log")} == {"127.0.0.2-0.log", "127.0.0.3-0.log"}
    assert "endpoints:" not in said, "the coordinator awaits no endpoint"


def test_a_folder_named_fanfold_where_one_submits_is_not_imported(
    pbs: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs begin in that folder: neither the job's own commands nor its workers look there."""
    other = tmp_path / "here" / "fanfold"
    other.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (other / name).write_text("raise SystemExit('this is another fanfold')\n")
    monkeypatch.chdir(other.parent)
    trial = pbs.submit(8, served(0.0) | {"backend": LAUNCHED})
    job = pbs.folder / "pbs" / "1"
    until(lambda: ended(trial) or (job / "state").read_text() == "F", "the end of the chain")
    assert "another fanfold" not in trial.logs()
    trial.assert_each_once(8)
