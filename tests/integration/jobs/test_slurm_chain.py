"""Chains of jobs on a real Slurm of three nodes, all on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fanfold.backends.cluster.schedulers import Slurm, try_job_command
from fanfold.graphs.jobs.chain import cancel_jobs
from fanfold.graphs.jobs.usage import job_report

from .conftest import Cluster, Trial, ended, served, until
from .slurm import PrivateSlurm, missing
from .slurm_accounts import no_accounts

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def charged(slurm: PrivateSlurm) -> list[tuple[int, str]]:
    """What Slurm charges, in node-seconds, piece by piece, and the state of each."""
    wanted = ("sacct", "-n", "-P", "-X", "-D", "--format=ElapsedRaw,NNodes,State")
    rows = (line.split("|") for line in slurm.said(*wanted).splitlines())
    return [(int(seconds) * int(nodes), state) for seconds, nodes, state in rows]


def in_state(slurm: PrivateSlurm, wanted: str) -> bool:
    return any(state == wanted for _, state in charged(slurm))


def check_hours(trial: Trial, slurm: PrivateSlurm) -> None:
    """The chain's node-hours are what Slurm charges, and all of them have a use or a cause."""
    accounts = no_accounts() is None
    if accounts:
        until(lambda: not in_state(slurm, "RUNNING"), "the end of the last job")
    facts = job_report(trial.path, utilization=True)
    assert facts is not None
    assert facts["node_hours_by_scheduler"] == accounts
    assert bool(facts["scheduler_says"]) == (not accounts)
    if accounts:
        seconds = sum(seconds for seconds, _ in charged(slurm))
        assert facts["node_hours"] == round(seconds / 3600, 4)
    useful = facts["useful"]
    assert useful["jobs_without_counts"] == 0
    assert sum(useful["lost"].values()) + useful["share"] == pytest.approx(1, abs=0.001)
    assert 0 < useful["share"] < 1


def test_a_walltime_cuts_the_run_and_the_successor_goes_on(
    jobs: Cluster, slurm: PrivateSlurm
) -> None:
    """Slurm warns up to a minute early, so a job of a minute may be warned as it begins."""
    trial = jobs.submit(1200, served(0.3), walltime="1m")
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(1200)
    check_hours(trial, slurm)
    codes = [job.code for job in trial.chain.jobs]
    assert codes.count(0) == 1
    assert 5 in codes


def test_a_server_and_a_node_and_the_first_node_are_lost(
    jobs: Cluster, slurm: PrivateSlurm
) -> None:
    """The job goes on without a node; without its first one another node ends it."""
    items = 2400
    trial = jobs.submit(items, served(0.3), walltime="10m", nodes=3)
    until(lambda: len(trial.finished()) >= 20, "the first items")
    server = [p for p in slurm.processes("n2") if b"node_server" in command(p)]
    os.kill(server[0], signal.SIGKILL)
    log = trial.path / "cluster"
    until(lambda: "restart 1 of 3" in said(log, "serve"), "the restart of a server")
    slurm.lose("n3")
    before = len(trial.finished())
    until(lambda: len(trial.finished()) >= before + 50, "items of the nodes that are left")
    if no_accounts() is None:
        until(lambda: in_state(slurm, "RESIZING"), "a job that is charged for fewer nodes")
    assert trial.chain.jobs[0].ended is None
    slurm.lose("n1")
    until(lambda: not running(slurm), "the end of a job without its first node")
    for node in ("n1", "n3"):
        subprocess.run(["slurmd", "-N", node], check=True)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(items)
    check_hours(trial, slurm)
    assert [job.outcome for job in trial.chain.jobs][:2] == ["lost", "finished"]


def running(slurm: PrivateSlurm) -> bool:
    return slurm.said("squeue", "-h", "-t", "R", "-o", "%i").split() == ["1"]


def test_cancel_ends_a_chain(jobs: Cluster) -> None:
    trial = jobs.submit(2000, served(0.3), walltime="10m")
    until(lambda: len(trial.finished()) >= 20, "the first items")
    cancel_jobs(trial.path, at_once=False)
    until(lambda: ended(trial), "the end of the chain")
    assert trial.chain.halt_reason == "cancelled by fanfold cancel"
    assert trial.chain.jobs[0].code == 5
    assert set(trial.finished().values()) == {1}
    assert "all servers have ended" in said(trial.path / "cluster", "serve")


def test_a_job_that_is_gone_is_as_good_as_cancelled(jobs: Cluster, slurm: PrivateSlurm) -> None:
    trial = jobs.submit(2000, served(0.3), walltime="10m")
    until(lambda: len(trial.finished()) >= 20, "the first items")
    assert try_job_command(Slurm(), "4711", Slurm().cancel) is None, "Slurm never knew it"
    subprocess.run(["scancel", "2"], check=True)
    cancel_jobs(trial.path, at_once=True)
    until(lambda: slurm.said("squeue", "-h") == "", "the end of the jobs")
    assert (
        try_job_command(Slurm(), "1", Slurm().cancel)
        is try_job_command(Slurm(), "1", Slurm().drain)
        is None
    )
    cancel_jobs(trial.path, at_once=False)
    assert trial.chain.halt_reason == "cancelled by fanfold cancel"
    assert trial.chain.jobs[1].outcome == "gone before it began"


def test_servers_that_are_given_up_end_the_job(jobs: Cluster, slurm: PrivateSlurm) -> None:
    settings = served(0.3)
    settings["node"] |= {"restarts": 0}
    trial = jobs.submit(400, settings, walltime="10m", nodes=2)
    until(lambda: len(trial.finished()) >= 20, "the first items")
    for node in ("n1", "n2", "n3"):
        for pid in slurm.processes(node):
            if b"node_server" in command(pid):
                os.kill(pid, signal.SIGKILL)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(400)
    assert [job.outcome for job in trial.chain.jobs][:2] == ["no model server was left", "finished"]
    assert "was ended by SIGKILL; it is given up" in said(trial.path / "cluster", "job")


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def said(folder: Path, kind: str) -> str:
    return "\n".join(f.read_text() for f in folder.glob(f"{kind}-*.log"))
