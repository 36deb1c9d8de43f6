"""Jobs whose model servers all failed, on the stand-in for PBS."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.servers.events import read_events

from .conftest import Cluster, Trial, ended, served, until

pytestmark = pytest.mark.integration
PLAIN = Path(__file__).parent.parent / "servers" / "plain.py"
SHAPES = [
    pytest.param({"kind": "local"}, id="alone", marks=pytest.mark.long),
    pytest.param({"kind": "launched", "node_endpoints": True}, id="workers"),
]
NEVER_S = 3600


def servers(trial: Trial) -> list[int]:
    """Return the servers that were ever started, by their process groups."""
    logs = (trial.path / "cluster" / "servers" / "logs").glob("*.jsonl")
    return [pid for log in logs for pid in started(log)]


def failing_on_one_node(folder: Path, command: str) -> str:
    """Return a command that serves on the first node alone."""
    script = folder / "serve.sh"
    script.write_text('[ "$FANFOLD_HOST" != 127.0.0.3 ] || exit 7\nexec "$@"\n')
    return f"bash {script} {command}"


def started(record: Path) -> list[int]:
    return [line["pid"] for line in read_events(record) if line["event"] == "start"]


@pytest.mark.parametrize("backend", SHAPES)
def test_servers_that_cannot_start_end_the_job_and_two_jobs_the_chain(
    pbs: Cluster, backend: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else bounds the chain, as is said, and the run would wait for an hour."""
    settings = served(0.0) | {"backend": backend}
    settings["node"] |= {"serve": f"{sys.executable} -I -S {PLAIN} {{port}} fail"}
    settings["node"] |= {"timeout_s": NEVER_S}
    trial = pbs.submit(4, settings)
    told = "2 jobs in a row finish none; no other limit (--jobs, --node-hours)"
    assert told in capsys.readouterr().err
    until(lambda: ended(trial), "the end of the chain")
    outcomes = [job.outcome for job in trial.chain.jobs]
    assert outcomes == [*2 * ["no model server was left"], "withdrawn before it began"]
    why = trial.chain.halt_reason or ""
    assert why.startswith("2 jobs in a row finished no item or lost all their model servers")
    said = trial.logs()
    assert "no model server was left, and none could start; last messages:" in said
    assert "| torch.OutOfMemoryError: no memory left" in said
    assert len(servers(trial)) == 4, "one on each of two nodes in each of two jobs"
    assert not trial.finished()


@pytest.mark.parametrize("backend", SHAPES)
def test_servers_that_are_given_up_end_the_run_and_the_successor_goes_on(
    pbs: Cluster, backend: dict[str, Any]
) -> None:
    settings = served(0.3) | {"backend": backend}
    settings["node"] |= {"restarts": 0}
    settings["limits"] |= {"fleet_wait_s": NEVER_S}
    trial = pbs.submit(60, settings)
    trial.worked(8)
    for pid in servers(trial):
        os.kill(pid, signal.SIGKILL)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(60)
    jobs = trial.chain.jobs
    assert [job.outcome for job in jobs[:2]] == ["no model server was left", "finished"]
    assert jobs[0].code == 5
    assert "was ended by SIGKILL; it is given up" in trial.logs()


@pytest.mark.parametrize("backend", SHAPES)
@pytest.mark.parametrize(
    "begins",
    [pytest.param(False, id="at-first", marks=pytest.mark.long), pytest.param(True, id="later")],
)
def test_a_node_that_serves_no_more_is_left_alone(
    pbs: Cluster, tmp_path: Path, backend: dict[str, Any], begins: bool
) -> None:
    """The other node does all in the same job; a worker without servers takes no shard from it."""
    settings = served(0.1) | {"backend": backend}
    command = settings["node"]["serve"]
    serve = command if begins else failing_on_one_node(tmp_path, command)
    settings["node"] |= {"serve": serve, "restarts": 0}
    settings["limits"] |= {"fleet_wait_s": NEVER_S}
    trial = pbs.submit(200, settings)
    if begins:
        trial.worked(8)
        log = trial.path / "cluster" / "servers" / "logs" / "127.0.0.3.jsonl"
        until(log.exists, "the node's servers")
        until(lambda: started(log), "the node's server")
        os.kill(started(log)[0], signal.SIGKILL)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(200)
    assert [job.outcome for job in trial.chain.jobs[:1]] == ["finished"], trial.logs()
    assert "127.0.0.3: no server is left" in trial.logs()


def test_too_few_servers_are_not_waited_for(pbs: Cluster, tmp_path: Path) -> None:
    settings = served(0.0)
    settings["node"] |= {"serve": failing_on_one_node(tmp_path, settings["node"]["serve"])}
    settings["endpoints"] |= {"least": 2, "wait_s": NEVER_S}
    trial = pbs.submit(4, settings)
    until(lambda: ended(trial), "the end of the chain")
    assert [job.code for job in trial.chain.jobs] == [5, 5, None], trial.logs()
    assert "and at most 1 can become ready, because servers failed" in trial.logs()
    assert trial.logs().count("all servers have ended") == 2, "those of the other node"


def test_a_launcher_that_starts_nothing_is_shown(pbs: Cluster) -> None:
    site = pbs.site.read_text().replace("launcher: ", "launcher: no-such-launcher ")
    pbs.site.write_text(site)
    trial = pbs.submit(4, served(0.0))
    until(lambda: ended(trial), "the end of the chain")
    assert trial.chain.jobs[0].outcome == "no model server was left", trial.logs()
    (log,) = (trial.path / "cluster").glob("job-1.*.log")
    assert "no-such-launcher: not found" in log.read_text()
    assert len(trial.chain.jobs) == 3, "two have begun, and one was withdrawn"
