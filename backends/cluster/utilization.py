"""Compute busy, idle and useful node time from server events and the journal."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ..core.errors import JournalError
from ..servers.events import read_events, split_periods

CAUSES: Final = ("start-up", "cold", "starved", "tail", "drain", "down")
"""Causes for which paid node time has no full batch, in the order of a job.

``start-up``: the server was not ready yet, or no item had begun in this job; includes the time that
the scheduler counts before fanfold began. ``cold``: the server is ready and others work, but it
does not yet, or its batch fills for the first time. ``starved``: it has too few items, though its
batch was full before, or it never is full in this job. ``tail``: no further item begins because all
have. ``drain``: the same, because the job ends. ``down``: it was ready and is not: restarted, given
up, or its node is lost. Only the servers' event logs show ``down``; from the journal alone it
counts as ``starved``. To report five causes, add ``down`` to ``start-up``: both are time in which a
server starts.
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
        first_item_at: When its first item began, or None if none did.
        last_item_at: When its last item began.
        was_stopped: Whether it was stopped rather than finished.
        has_counts: Whether ``intervals`` are from the servers' own counts; else from the journal.
        intervals: Activity of each server in order of time; gaps are time in which it did not run.
    """

    nodes: int
    begin: float
    end: float
    inside_s: float
    overhead_s: float
    servers: int
    first_item_at: float | None
    last_item_at: float | None
    was_stopped: bool
    has_counts: bool
    intervals: tuple[tuple[Interval, ...], ...] = field(repr=False, default=())

    @property
    def paid_s(self) -> float:
        """Return its node-seconds."""
        return self.inside_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class Utilization:
    """Node-seconds paid, those with a full batch, and the causes of the rest.

    Attributes:
        paid_s: Node-seconds of all jobs.
        busy_s: Those in which servers had requests; a node with four servers of which one works
            counts a quarter.
        full_s: Those with a full batch.
        lost_s: All others by cause.
        full_batch: Items that count as a full batch of one server.
        by_counts: Number of jobs measured by the servers' own counts.
        by_journal: Number of jobs measured by the journal only.
    """

    paid_s: float
    busy_s: float
    full_s: float
    lost_s: Mapping[str, float]
    full_batch: int
    by_counts: int
    by_journal: int

    @property
    def useful_share(self) -> float:
        """Return the share of node-seconds with a full batch, from 0 to 1."""
        return self.full_s / self.paid_s if self.paid_s else 0.0


def compute_utilization(jobs: Sequence[JobTime], batch_size: int | None = None) -> Utilization:
    """Return how many of the jobs' node-seconds had a full batch, and the causes of the rest.

    Args:
        jobs: The jobs.
        batch_size: Items of a full batch; None is the largest load in the servers' own counts.
            Without counts it is the load that the busiest server kept for half of its time by the
            journal, as the journal includes items that wait for a slot.
    """
    counted = [job for job in jobs if job.has_counts]
    most = batch_size or _full_batch(counted, jobs)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    paid = busy = full = 0.0
    for job in jobs:
        paid += job.paid_s
        lost["start-up"] += job.overhead_s
        for (cause, is_busy), seconds in _seconds_by_cause(
            job, max(1.0, FULL_SHARE * most)
        ).items():
            busy += seconds * is_busy
            if cause == "full":
                full += seconds
            else:
                lost[cause] += seconds
    return Utilization(paid, busy, full, lost, most, len(counted), len(jobs) - len(counted))


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


def _full_batch(counted: Sequence[JobTime], jobs: Sequence[JobTime]) -> int:
    """Return the items that count as a full batch if the caller sets none."""
    if counted:
        loads = (
            interval.items
            for job in counted
            for intervals in job.intervals
            for interval in intervals
            if interval.is_busy
        )
        return max(loads, default=1) or 1
    return max((_typical_load(intervals) for job in jobs for intervals in job.intervals), default=1)


def _typical_load(intervals: Iterable[Interval]) -> int:
    """Return the load that a server had for half of the time in which it worked."""
    seconds: dict[int, float] = defaultdict(float)
    for interval in intervals:
        if interval.is_busy:
            seconds[interval.items] += interval.end - interval.begin
    left = sum(seconds.values()) / 2
    for items in sorted(seconds, reverse=True):
        left -= seconds[items]
        if left <= 0:
            return max(1, items)
    return 1


class AnsweredItem(NamedTuple):
    """An item in the journal: its endpoint, begin and end (seconds since 1970).

    The time includes the item's wait in the client and in the server's queue, so that batches look
    fuller than they are where either limits them.
    """

    endpoint: str
    begin: float
    end: float


def read_answered_items(records: Iterable[Mapping[str, Any]]) -> Iterator[AnsweredItem]:
    """Yield the items that journal records describe."""
    for record in records:
        endpoint, took = record.get("endpoint"), record.get("latency_s")
        if endpoint and took is not None:
            end = datetime.fromisoformat(record["finished_at"]).timestamp()
            yield AnsweredItem(str(endpoint), end - float(took), end)


@dataclass(slots=True)
class JobItems:
    """The items that ended within a job.

    Attributes:
        first: When the first of them began, or None.
        last: When the last of them began.
        calls: All of them by endpoint, if they are kept.
    """

    first: float | None = None
    last: float | None = None
    calls: dict[str, list[AnsweredItem]] = field(default_factory=lambda: defaultdict(list))

    def add(self, call: AnsweredItem, earliest: float, keep: bool) -> None:
        """Count one; its begin is at least ``earliest``, the begin of the job."""
        begin = max(call.begin, earliest)
        self.first = begin if self.first is None else min(self.first, begin)
        self.last = begin if self.last is None else max(self.last, begin)
        if keep:
            self.calls[call.endpoint].append(call._replace(begin=begin))


def group_by_job(
    calls: Iterable[AnsweredItem], times: Sequence[tuple[float, float]], keep: Sequence[bool]
) -> list[JobItems]:
    """Return the items of each job; those that ended outside all jobs are left out.

    Args:
        calls: Every item that was answered.
        times: Begin and end of each job, in order.
        keep: Whether to keep a job's items, which takes some 200 bytes each.
    """
    begins, found = [begin for begin, _ in times], [JobItems() for _ in times]
    for call in calls:
        number = bisect_right(begins, call.end) - 1
        if number >= 0 and call.end <= times[number][1]:
            found[number].add(call, begins[number], keep[number])
    return found


def intervals_of_items(
    calls: Iterable[AnsweredItem], begin: float, end: float
) -> tuple[Interval, ...]:
    """Return the intervals of a server from its items, as if it ran all the time."""
    steps = [(call.begin, 1) for call in calls] + [(call.end, -1) for call in calls]
    intervals, at, items = list[Interval](), begin, 0
    for time, change in sorted([*steps, (end, 0)]):
        if min(time, end) > at:
            intervals.append(Interval(at, min(time, end), items=items))
            at = time
        items += change
    return tuple(intervals)


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
    def first_busy_at(self) -> float | None:
        """Return when a server first had a request."""
        return min(
            (s.begin for intervals in self.intervals.values() for s in intervals if s.is_busy),
            default=None,
        )


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
