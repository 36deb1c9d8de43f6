"""Node-hours of a chain, and how much of them the servers' batches were full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from .chain import Chain, Job
from .schedulers import Used
from .verdict import INTERRUPTED

CAUSES: Final = ("start-up", "cold", "starved", "tail", "drain")
"""Why a node that is paid for does not work at full batch, in the order of a job's life.

``start-up``: no item has begun yet in this job. ``cold``: other servers work, this one not yet, or
its batch was never full so far.
``starved``: it was full before and has too few items now. ``tail``:
no further item begins because all have. ``drain``: the same, because the job ends.
"""

_NEARLY: Final = 0.9
"""A batch counts as full from this share of its places on."""


@dataclass(frozen=True, slots=True)
class Call:
    """One item as the journal knows it: where it was answered, and when (seconds since 1970).

    The time includes what the item waited in the client, so that batches look fuller than they
    are where the client holds back.
    """

    endpoint: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What one job used.

    Attributes:
        job: Its id.
        node_s: Node-seconds.
        by_scheduler: Whether the scheduler says so; else it is the chain's own times.
    """

    job: str
    node_s: float
    by_scheduler: bool


@dataclass(frozen=True, slots=True)
class Share:
    """Of node-seconds paid, those with a full batch, and where the others went.

    Attributes:
        paid_s: Node-seconds of all jobs that have ended.
        full_s: Of them with a full batch.
        lost_s: The others by cause.
        places: Items that count as a full batch of one server.
    """

    paid_s: float
    full_s: float
    lost_s: Mapping[str, float]
    places: int

    @property
    def useful(self) -> float:
        """Return the useful share, from 0 to 1."""
        return self.full_s / self.paid_s if self.paid_s else 0.0


def spent(chain: Chain, used: Mapping[str, Used]) -> list[Spent]:
    """Return what each job that has begun used.

    Args:
        chain: The chain.
        used: The scheduler's numbers, by job, as far as it has them.
    """
    found = []
    for job in chain.jobs:
        if (own := used.get(job.id)) is not None and own.wall_s > 0:
            found.append(Spent(job.id, own.nodes * own.wall_s, by_scheduler=True))
        elif job.began is not None and job.ended is not None:
            found.append(Spent(job.id, job.nodes * job.wall_s, by_scheduler=False))
    return found


def calls_of(records: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Return the calls that journal records tell of."""
    calls = []
    for record in records:
        endpoint, took = record.get("endpoint"), record.get("latency_s")
        if endpoint and took is not None:
            end = datetime.fromisoformat(record["finished_at"]).timestamp()
            calls.append(Call(str(endpoint), end - float(took), end))
    return calls


def useful_share(
    jobs: Sequence[Job], calls: Sequence[Call], servers: int, places: int | None = None
) -> Share:
    """Return how much of the jobs' node-seconds had a full batch, and why the rest had not.

    Args:
        jobs: The jobs; those without a begin or an end are left out.
        calls: Every item that was answered.
        servers: Servers of one node.
        places: Items of a full batch; None takes what the busiest server kept up for half of its
            time.
    """
    ended = [job for job in jobs if job.began is not None and job.ended is not None]
    windows = [_window(job, calls) for job in ended]
    most = places or max((_usual(w.by_endpoint) for w in windows), default=1)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    paid = full = 0.0
    for window in windows:
        seconds = window.shares(servers, max(1.0, _NEARLY * most))
        paid += window.job.nodes * (window.end - window.begin)
        full += seconds.pop("full", 0.0)
        for cause, value in seconds.items():
            lost[cause] += value
    return Share(paid, full, lost, most)


@dataclass(frozen=True, slots=True)
class _Window:
    """A job's time, with the calls in it by endpoint."""

    job: Job
    begin: float
    end: float
    by_endpoint: Mapping[str, list[Call]]

    def shares(self, servers: int, threshold: float) -> dict[str, float]:
        """Return node-seconds: ``full``, and those of each cause."""
        total: dict[str, float] = defaultdict(float)
        expected = max(self.job.nodes * servers, len(self.by_endpoint))
        weight = self.job.nodes / expected
        starts = [call.begin for calls in self.by_endpoint.values() for call in calls]
        first, last = min(starts, default=self.end), max(starts, default=self.end)
        closing = "drain" if self.job.code == INTERRUPTED else "tail"
        for calls in self.by_endpoint.values():
            for cause, seconds in self._of(calls, first, last, closing, threshold).items():
                total[cause] += weight * seconds
        idle = weight * (expected - len(self.by_endpoint))
        total["start-up"] += idle * (first - self.begin)
        total["cold"] += idle * (self.end - first)
        return total

    def _of(
        self, calls: list[Call], first: float, last: float, closing: str, threshold: float
    ) -> dict[str, float]:
        """Return the seconds of one server by what it did."""
        seconds: dict[str, float] = defaultdict(float)
        seconds["start-up"] = first - self.begin
        warm = False
        for begin, end, busy in _levels(calls, first, self.end, last):
            full = busy >= threshold
            warm = warm or full
            cause = "full" if full else closing if begin >= last else "starved" if warm else "cold"
            seconds[cause] += end - begin
        return seconds


def _window(job: Job, calls: Sequence[Call]) -> _Window:
    assert job.began is not None and job.ended is not None, "left out before"  # noqa: PT018
    begin, end = (datetime.fromisoformat(t).timestamp() for t in (job.began, job.ended))
    inside: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if begin <= call.end <= end:
            own = Call(call.endpoint, max(call.begin, begin), call.end)
            inside[call.endpoint].append(own)
    return _Window(job, begin, end, inside)


def _levels(
    calls: Sequence[Call], begin: float, end: float, mark: float
) -> Iterable[tuple[float, float, int]]:
    """Yield stretches of time with the number of calls in them; one ends at ``mark``."""
    steps = [(call.begin, 1) for call in calls] + [(call.end, -1) for call in calls]
    steps += [(mark, 0), (end, 0)]
    at, busy = begin, 0
    for time, change in sorted(steps):
        if time > at:
            yield at, min(time, end), busy
            at = time
        busy += change


def _usual(by_endpoint: Mapping[str, list[Call]]) -> int:
    """Return the number of calls that the busiest server had for half of its working time."""
    most = 1
    for calls in by_endpoint.values():
        begin, end = min(c.begin for c in calls), max(c.end for c in calls)
        seconds: dict[int, float] = defaultdict(float)
        for start, stop, busy in _levels(calls, begin, end, begin):
            seconds[busy] += stop - start
        left = sum(seconds.values()) / 2
        for busy in sorted(seconds, reverse=True):
            left -= seconds[busy]
            if left <= 0:
                most = max(most, busy)
                break
    return most
