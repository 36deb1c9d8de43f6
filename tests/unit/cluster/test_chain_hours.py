"""Node-hours of a job chain: their sources, and jobs that have not ended."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fanfold.backends.cluster.chain import Job, JobChain, list_job_usage
from fanfold.backends.cluster.schedulers import JobState, SchedulerUsage


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def job(name: str, begin: float, end: float | None) -> Job:
    ended = None if end is None else at(end)
    return Job(name, 1, 3600, at(0), began=at(begin), ended=ended, code=5)


def test_the_schedulers_numbers_come_first() -> None:
    chain = JobChain((job("1", 0, 50), job("2", 60, 70), job("3", 80, 90)))
    used = {"1": SchedulerUsage(220, 55, "COMPLETED"), "3": SchedulerUsage(0, 0, "PENDING")}
    found = list_job_usage(chain, used, {}, 1000)
    assert [(s.node_s, s.by_scheduler) for s in found] == [(220, True), (10, False), (10, False)]
    assert (found[0].end, found[0].overhead_s) == (50, 5)


def test_the_scheduler_knows_when_a_lost_job_ended() -> None:
    """Its successor recorded its end much later."""
    (found,) = list_job_usage(
        JobChain((job("1", 0, 500),)), {"1": SchedulerUsage(200, 100, "NODE_FAIL")}, {}, 1000
    )
    assert (found.node_s, found.end, found.overhead_s) == (200, 100, 0)


@pytest.mark.parametrize(
    ("state", "now", "sign", "wall"),
    [
        ("running", 130.0, 110.0, 30.0),
        ("running", 9999.0, None, 3600.0),  # no job is longer than its walltime
        ("ended", 130.0, 110.0, 10.0),  # lost, and not recorded
        (None, 130.0, 110.0, 10.0),
        (None, 130.0, 90.0, 0.0),
    ],
)
def test_a_job_that_has_not_ended(
    state: JobState | None, now: float, sign: float | None, wall: float
) -> None:
    states: dict[str, JobState] = {} if state is None else {"1": state}
    (found,) = list_job_usage(JobChain((job("1", 100, None),)), {}, states, now, sign)
    assert (found.node_s, found.by_scheduler) == (wall, False)


def test_a_running_job_by_the_scheduler() -> None:
    used: dict[str, SchedulerUsage] = {"1": SchedulerUsage(80, 40, "RUNNING")}
    (found,) = list_job_usage(JobChain((job("1", 100, None),)), used, {"1": "running"}, 135)
    assert (found.node_s, found.end, found.overhead_s) == (80, 135, 5)


def test_one_that_nobody_has_heard_of_and_one_that_did_not_begin_are_left_out() -> None:
    waiting = replace(job("2", 0, None), began=None)
    assert list_job_usage(JobChain((job("1", 100, None), waiting)), {}, {}, 1000) == []
