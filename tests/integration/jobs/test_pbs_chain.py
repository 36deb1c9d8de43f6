"""Chains of jobs on a stand-in for PBS, which runs scripts in the background."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from fanfold.backends.cluster.schedulers import Pbs
from fanfold.configs.overrides import Overrides
from fanfold.graphs.jobs.submit import SubmitOptions, submit_job
from fanfold.graphs.jobs.usage import job_report

from .conftest import Cluster, Trial, ended, served, until
from .standin_pbs import members

pytestmark = pytest.mark.integration
ITEMS = 40
ROUNDED_H = 0.0001  # what is told has four decimals
SLOW = {"limits": {"requests_per_s": 20, "streams": 8}}


def test_a_job_that_is_warned_is_followed_and_each_item_ends_once(pbs: Cluster) -> None:
    """The scheduler has no room for a second job at first, and is asked again at the end."""
    single = pbs.folder / "pbs" / "single"
    single.touch()
    items = 3 * ITEMS
    trial = pbs.submit(items, served(0.3))
    until(lambda: len(trial.finished()) >= 32, "the first items")
    single.unlink()
    subprocess.run(["qsig", "-s", "SIGUSR1", trial.chain.jobs[0].id], check=True)
    until(lambda: ended(trial), "the end of the chain")
    chain, said = trial.chain, trial.logs()
    assert "fanfold retries at the end of this job" in said
    assert [job.code for job in chain.jobs] == [5, 0, None], said
    assert chain.jobs[0].finished_items >= 32
    assert chain.jobs[0].finished_items + chain.jobs[1].finished_items == items
    assert chain.halt_reason == "all items are finished"
    assert chain.jobs[2].outcome == "withdrawn before it began"
    finished = trial.finished()
    assert len(finished) == items
    assert set(finished.values()) == {1}
    assert said.count("all servers have ended") == 4, said  # two nodes in each of two jobs
    assert not list((trial.path / "cluster" / "servers").glob("127*"))
    check_usage(trial)


def check_usage(trial: Trial) -> None:
    def known() -> dict[str, Any]:
        facts = job_report(trial.path, utilization=True)
        assert facts is not None
        return facts

    until(lambda: known()["node_hours_by_scheduler"], "the scheduler's accounts")
    facts = known()
    assert facts["node_hours"] > 0
    assert [job["items"] for job in facts["jobs"][:2]] == [
        j.finished_items for j in trial.chain.jobs[:2]
    ]
    useful = facts["useful"]
    assert sum(useful["lost"].values()) + useful["share"] == pytest.approx(1, abs=0.01)
    assert 0 < useful["share"] < 1
    assert (useful["jobs_by_servers_counts"], useful["jobs_without_counts"]) == (2, 0)
    busy, idle = facts["busy_node_hours"], facts["idle_node_hours"]
    assert busy + idle == pytest.approx(facts["node_hours"], abs=0.001)
    least = useful["share"] * facts["node_hours"]
    assert least > 0
    assert busy >= least - ROUNDED_H


def test_where_jobs_may_not_submit_jobs_it_goes_on_by_hand(pbs: Cluster) -> None:
    """The scheduler refuses the successor at the begin of a job and at its end."""
    (pbs.folder / "pbs" / "single").touch()
    trial = pbs.submit(ITEMS, SLOW)
    until(lambda: len(trial.finished()) >= 8, "the first items")
    subprocess.run(["qsig", "-s", "SIGUSR1", trial.chain.jobs[0].id], check=True)
    until(lambda: ended(trial), "the end of the first job")
    why = trial.chain.halt_reason or ""
    assert "the next job could not be submitted: qsub failed: qsub: would exceed" in why
    assert why.endswith(f"resume from a login node: fanfold submit {trial.path} …")
    first = trial.chain.jobs[0].id
    until(
        lambda: Pbs().fetch_states([first]) == {first: "ended"}, "the scheduler's word for its end"
    )
    order = SubmitOptions(str(pbs.site), nodes=2, walltime="1h")
    submit_job(str(trial.path), None, Overrides([]), order, dry=False)
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(ITEMS)
    assert [job.code for job in trial.chain.jobs] == [5, 0]


def test_a_job_that_is_killed_is_followed(pbs: Cluster) -> None:
    trial = pbs.submit(ITEMS, SLOW)
    until(lambda: len(trial.finished()) >= 8, "the first items")
    for pid in members(int((pbs.folder / "pbs" / "1" / "session").read_text())):
        os.kill(pid, signal.SIGKILL)
    until(lambda: ended(trial), "the end of the chain")
    chain = trial.chain
    assert [job.outcome for job in chain.jobs] == ["lost", "finished", "withdrawn before it began"]
    assert len(trial.finished()) == ITEMS
