"""Compute busy, idle and useful node time from the counts in the servers' event logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ..core.errors import JournalError
from ..servers.events import read_events, split_periods

CAUSES: Final = ("start-up", "cold", "starved", "tail", "drain", "down")
"""Causes for which paid node time has no full batch, in the order of a job.

``start-up``: the server was not ready yet, or no item had begun in this job; includes the time that
the scheduler counts before fanfold began. ``cold``: the server is ready and others work, but it
does not yet, or its batch fills for the first time. ``starved``: it has too few items, though its
batch was full before, or it never is full in this job. ``tail``: the load of all servers only falls
because all items have begun. ``drain``: the same, because the job ends. ``down``: it was ready and
is not: restarted, given up, or its node is lost. To report five causes, add ``down`` to
``start-up``: both are time in which a server starts.
"""

FULL_SHARE: Final = 0.9
"""A batch is full from this share of its size on, or when a request waits for a slot."""

ServerState = Literal["starting", "up", "down", "over"]


class Interval(NamedTuple):
    """A period in which a server's state and load did not change.

    Attributes:
        begin: When it began, in seconds since 1970.
        end: When it ended.
        state: ``starting``: not ready so far; ``up``: ready; ``down``: no longer ready; ``over``:
            stopped by its node.
        items: Requests that it runs at a time.
        has_queue: Whether more of them wait in the server.
    """

    begin: float
    end: float
    state: ServerState = "up"
    items: int = 0
    has_queue: bool = False

    @property
    def is_busy(self) -> bool:
        """Return True if the server has requests."""
        return self.state == "up" and (self.items > 0 or self.has_queue)


@dataclass(frozen=True, slots=True)
class JobTime:
    """A job's time, and the activity of its servers.

    Attributes:
        nodes: Nodes of the job.
        begin: When fanfold began in it, in seconds since 1970.
        end: When it ended, or the current time.
        inside_s: Node-seconds paid from begin to end; fewer if nodes were lost.
        overhead_s: Further node-seconds that the scheduler counts.
        servers: Servers that it should have had.
        was_stopped: Whether it was stopped rather than finished.
        is_measured: Whether its servers reported what they did.
        intervals: Activity of each server in order of time; gaps are time in which it did not run.
    """

    nodes: int
    begin: float
    end: float
    inside_s: float
    overhead_s: float
    servers: int
    was_stopped: bool
    is_measured: bool
    intervals: tuple[tuple[Interval, ...], ...] = field(repr=False, default=())

    @property
    def paid_s(self) -> float:
        """Return its node-seconds."""
        return self.inside_s + self.overhead_s

    @property
    def first_item_at(self) -> float | None:
        """Return when the first item began, or None if no server had one."""
        return min((i.begin for own in self.intervals for i in own if i.is_busy), default=None)

    @property
    def last_item_at(self) -> float | None:
        """Return when the last item began: from then on, the load of every server only falls."""
        most = max((i.items for own in self.intervals for i in own if i.is_busy), default=0)
        ends = (_last_rise_end(own, most) for own in self.intervals)
        return max((end for end in ends if end is not None), default=None)


def _last_rise_end(intervals: Sequence[Interval], most: int) -> float | None:
    """Return when a server's load began its last fall, or None if it never had any.

    A small rise is ignored: at the end of a run, slow requests are sent to a second server.
    """
    end, before = None, 0
    for interval in intervals:
        load = (interval.items + most * interval.has_queue) if interval.is_busy else 0
        if load and (end is None or load - before >= max(1.0, most / _CHANGE_PART)):
            end = interval.end
        before = load
    return end


@dataclass(frozen=True, slots=True)
class Utilization:
    """Node-seconds paid, those with a full batch, and the causes of the rest.

    Attributes:
        paid_s: Node-seconds of all jobs.
        busy_s: Those in which servers had requests; a node with four servers of which one works
            counts a quarter.
        full_s: Those with a full batch.
        lost_s: Those without a full batch, by cause.
        unknown_s: Those of jobs whose servers reported no counts; part of none of the others.
        full_batch: Items that count as a full batch of one server.
        measured: Number of jobs whose servers reported counts.
        unmeasured: Number of the other jobs.
    """

    paid_s: float
    busy_s: float
    full_s: float
    lost_s: Mapping[str, float]
    unknown_s: float
    full_batch: int
    measured: int
    unmeasured: int

    @property
    def measured_s(self) -> float:
        """Return the node-seconds of jobs whose servers reported counts."""
        return self.paid_s - self.unknown_s

    @property
    def useful_share(self) -> float | None:
        """Return the share of measured node-seconds with a full batch; None if none is measured."""
        return self.full_s / self.measured_s if self.measured_s > 0 else None


def compute_utilization(jobs: Sequence[JobTime], batch_size: int | None = None) -> Utilization:
    """Return how many of the jobs' node-seconds had a full batch, and the causes of the rest.

    Args:
        jobs: The jobs.
        batch_size: Items of a full batch; None is the largest load in the servers' own counts.
    """
    measured = [job for job in jobs if job.is_measured]
    most = batch_size or _largest_load(measured)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    paid, busy, full = sum(job.paid_s for job in jobs), 0.0, 0.0
    for job in measured:
        lost["start-up"] += job.overhead_s
        for (cause, is_busy), seconds in _seconds_by_cause(
            job, max(1.0, FULL_SHARE * most)
        ).items():
            busy += seconds * is_busy
            if cause == "full":
                full += seconds
            else:
                lost[cause] += seconds
    unknown = sum(job.paid_s for job in jobs if not job.is_measured)
    unmeasured = len(jobs) - len(measured)
    return Utilization(paid, busy, full, lost, unknown, most, len(measured), unmeasured)


def _seconds_by_cause(job: JobTime, threshold: float) -> dict[tuple[str, bool], float]:
    """Return the node-seconds from begin to end, by cause and whether a server works."""
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    expected = max(job.servers, len(job.intervals), 1)
    absent = expected - len(job.intervals)
    first = (
        job.end if job.first_item_at is None else min(max(job.first_item_at, job.begin), job.end)
    )
    seconds["start-up", False] += absent * (first - job.begin)
    seconds["cold", False] += absent * (job.end - first)
    for intervals in job.intervals:
        filled = list(_fill_job_time(intervals, job, first))
        warm = _warm_at(filled, threshold)
        for interval in filled:
            cause = _cause(interval, job, first, warm, threshold)
            seconds[cause, interval.is_busy] += interval.end - interval.begin
    weight = job.nodes / expected
    return _scale_to_paid(job, {cause: weight * each for cause, each in seconds.items()})


def _scale_to_paid(
    job: JobTime, seconds: dict[tuple[str, bool], float]
) -> dict[tuple[str, bool], float]:
    """Scale node-seconds to those paid: a lost node costs nothing more."""
    unpaid, down = sum(seconds.values()) - job.inside_s, ("down", False)
    if unpaid > 0 and down in seconds:
        seconds[down] = max(0.0, seconds[down] - unpaid)
    left = sum(seconds.values())
    return {cause: each * job.inside_s / left for cause, each in seconds.items() if left}


def _warm_at(intervals: Sequence[Interval], threshold: float) -> float:
    """Return when a server's batch is first full; else when it first works; else infinity."""
    full = (interval.begin for interval in intervals if _is_full(interval, threshold))
    works = (interval.begin for interval in intervals if interval.is_busy)
    return next(full, next(works, float("inf")))


def _is_full(interval: Interval, threshold: float) -> bool:
    return interval.is_busy and (interval.items >= threshold or interval.has_queue)


def _cause(interval: Interval, job: JobTime, first: float, warm: float, threshold: float) -> str:
    """Return the cause of an interval that contains neither the first nor the last begin inside."""
    closing = job.last_item_at is not None and interval.begin >= job.last_item_at
    if interval.state == "down":
        return "down"
    if interval.state == "starting":
        return "start-up"
    if _is_full(interval, threshold):
        return "full"
    if interval.begin < first or job.first_item_at is None:
        return "start-up"
    if closing or interval.state == "over":
        return "drain" if job.was_stopped else "tail"
    return "starved" if interval.begin >= warm else "cold"


def _fill_job_time(intervals: Iterable[Interval], job: JobTime, first: float) -> Iterator[Interval]:
    """Yield intervals that fill a job's time, cut at its first and last begin of an item."""
    at, state = job.begin, "starting"
    marks = sorted({first, first if job.last_item_at is None else job.last_item_at})
    for interval in intervals:
        begin, end = max(interval.begin, at), min(interval.end, job.end)
        if end <= begin:
            continue
        yield from _cut(Interval(at, begin, _state_in_gap(state)), marks)
        yield from _cut(interval._replace(begin=begin, end=end), marks)
        at, state = end, interval.state
    yield from _cut(Interval(at, job.end, _state_in_gap(state)), marks)


def _state_in_gap(before: str) -> ServerState:
    """Return the state of a server in a gap after a state."""
    return "starting" if before == "starting" else "over" if before == "over" else "down"


def _cut(interval: Interval, marks: Iterable[float]) -> Iterator[Interval]:
    at = interval.begin
    for end in (*(mark for mark in marks if interval.begin < mark < interval.end), interval.end):
        if end > at:
            yield interval._replace(begin=at, end=end)
        at = end


def _largest_load(jobs: Iterable[JobTime]) -> int:
    """Return the items that count as a full batch if the caller sets none."""
    servers = (intervals for job in jobs for intervals in job.intervals)
    loads = (i.items for intervals in servers for i in intervals if i.is_busy)
    return max(loads, default=1) or 1


_LOST_AFTER_S: Final = 90.0
"""Seconds without an event after which a node is lost: it logs one every minute."""

_CHANGE_PART: Final = 32
"""A change counts from this part of the largest load that a server has had."""

_STATES: Final[Mapping[str, ServerState]] = {
    "ready": "up",
    "back": "up",
    "out": "down",
    "down": "down",
    "given_up": "down",
}
_ENDED: Final = frozenset({"down", "given_up"})


@dataclass(slots=True)
class JobServers:
    """The activity of one job's servers, from the nodes' event logs.

    Attributes:
        intervals: Intervals by host and instance.
        has_counts: Whether any node logs the load of its servers.
    """

    intervals: dict[tuple[str, int], list[Interval]] = field(default_factory=dict)
    has_counts: bool = False

    @property
    def is_measured(self) -> bool:
        """Return True if it is known what the servers did: by their counts, or they never ran."""
        states = {i.state for intervals in self.intervals.values() for i in intervals}
        return self.has_counts or (bool(states) and "up" not in states)


def read_job_servers(folder: Path, times: Sequence[tuple[float, float]]) -> list[JobServers]:
    """Read the activity of each job's servers from the nodes' event logs; blocks.

    A node without events for more than a minute before its job's end was lost: its servers are down
    from its last line on.

    Args:
        folder: The servers folder.
        times: Begin and end of each job.

    Raises:
        JournalError: An event log cannot be read.
    """
    found = [JobServers() for _ in times]
    for path in sorted((folder / "logs").glob("*.jsonl")):
        try:
            record = read_events(path)
        except OSError as error:
            raise JournalError(f"{path}: cannot be read: {error.strerror}") from None
        for lines in split_periods(record):
            for job, (begin, end) in zip(found, times, strict=True):
                if begin <= lines[0]["at"] <= end:
                    _add(job, path.stem, lines, end)
    return found


def _add(job: JobServers, host: str, lines: Sequence[Mapping[str, Any]], end: float) -> None:
    """Add one period in which a node was served."""
    job.has_counts = job.has_counts or any(line["event"] == "load" for line in lines)
    for instance in range(max(1, int(lines[0].get("instances", 1)))):
        intervals = job.intervals.setdefault((host, instance), [])
        intervals += _server_intervals(lines, instance, end)


def _server_intervals(
    lines: Sequence[Mapping[str, Any]], instance: int, end: float
) -> list[Interval]:
    """Return the intervals of one server from the first line on."""
    most = max((_read_load(line, instance)[0] for line in lines), default=0)
    found, now = list[Interval](), Interval(lines[0]["at"], end, "starting")
    for line in lines:
        after = _apply_event(now, line, instance, max(1.0, most / _CHANGE_PART))
        if after is not now:
            found.append(now._replace(end=line["at"]))
            now = after._replace(begin=line["at"])
    last = lines[-1]
    if last["event"] == "end":
        state: ServerState = "over" if last.get("why") == "stopped" else "down"
    else:
        state = "down" if end - last["at"] > _LOST_AFTER_S else now.state
    if state != now.state:
        found.append(now._replace(end=last["at"]))
        now = Interval(last["at"], end, state)
    return [interval for interval in (*found, now) if interval.end > interval.begin]


def _apply_event(now: Interval, line: Mapping[str, Any], instance: int, fine: float) -> Interval:
    """Return a server's interval after an event; unchanged if it is nearly the same."""
    if line["event"] == "load":
        items, queued = _read_load(line, instance, (now.items, now.has_queue))
        is_similar = bool(items) == bool(now.items) and abs(items - now.items) < fine
        is_same = is_similar and queued == now.has_queue
        return now if is_same else now._replace(items=items, has_queue=queued)
    if line.get("instance") != instance or line["event"] not in _STATES:
        return now
    after = now._replace(state=_STATES[line["event"]])
    return after._replace(items=0, has_queue=False) if line["event"] in _ENDED else after


def _read_load(
    line: Mapping[str, Any], instance: int, before: tuple[int, bool] = (0, False)
) -> tuple[int, bool]:
    """Return a server's load from a line, or the previous load if the line has none."""
    if line["event"] != "load" or instance >= len(line["running"]):
        return before
    running, waiting = line["running"][instance], line["waiting"][instance]
    return before if running is None else (int(running), bool(waiting))
