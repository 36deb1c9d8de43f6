"""Node-hours of a chain: by the scheduler's own numbers, else by the chain's times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from .chain import Chain, Job
from .schedulers import State, Used


@dataclass(frozen=True, slots=True)
class Spent:
    """What one job used, so far if it has not ended.

    Attributes:
        job: The job.
        nodes: Its nodes; on average, where it lost some.
        begin: When fanfold began in it, in seconds since 1970.
        end: Until when it is counted from there.
        before_s: Seconds that the scheduler counts besides: until fanfold began, and after its end.
        by_scheduler: Whether the scheduler says so; else it is the chain's own times.
    """

    job: Job
    nodes: float
    begin: float
    end: float
    before_s: float
    by_scheduler: bool

    @property
    def node_s(self) -> float:
        """Return the node-seconds."""
        return self.nodes * (self.end - self.begin + self.before_s)


def spent(
    chain: Chain,
    used: Mapping[str, Used],
    states: Mapping[str, State],
    now: float,
    sign: float | None = None,
) -> list[Spent]:
    """Return what each job that has begun used.

    One that has not ended counts until now if it runs; else it was lost, or nobody knows, and it
    counts until the last sign of life. Without any it is left out. So is one that had not ended
    when the folder was copied from that of another run, to which it belongs.

    Args:
        chain: The chain.
        used: The scheduler's numbers, by job, as far as it has them.
        states: What the scheduler says of jobs that have not ended.
        now: The present time, in seconds since 1970.
        sign: When anybody of the run was last heard of.
    """
    found = []
    for job in chain.jobs:
        if job.began is None or (job.foreign and job.ended is None):
            continue
        begin, end = _seconds(job.began), _end(job, states.get(job.id), now, sign)
        own, wall = used.get(job.id), None
        if end is not None:
            wall = min(max(0.0, end - begin), float(job.walltime_s))
        if own is not None and own.wall_s > 0:
            inside = own.wall_s if wall is None else min(wall, own.wall_s)
            before = own.wall_s - inside
            nodes = own.node_s / own.wall_s
            found.append(Spent(job, nodes, begin, begin + inside, before, by_scheduler=True))
        elif wall is not None:
            found.append(Spent(job, job.nodes, begin, begin + wall, 0.0, by_scheduler=False))
    return found


def _end(job: Job, state: State | None, now: float, sign: float | None) -> float | None:
    if job.ended is not None:
        return _seconds(job.ended)
    return now if state == "running" else sign


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
