"""Busy, idle and useful node time from server events and journal."""

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
"""Why a node that is paid for does not work at full batch, in the order of a job's life.

``start-up``: the server was not ready yet, or no item had begun in this job; with it counts what
the scheduler says that the job took before fanfold began. ``cold``: it is ready and others work;
it does not yet, or its batch fills for the first time. ``starved``: it has too few items, though
it was full before, or never is in this job. ``tail``: no further item begins because all have.
``drain``: the same, because the job ends. ``down``: it was ready and is not: it is being
restarted, was given up, or its node is lost; only the servers' own records tell of it, by the
journal it is ``starved``. Who wants to know five causes adds it to ``start-up``, for it is time in
which a server starts once more.
"""

FULL_SHARE: Final = 0.9
"""A batch counts as full from this share of its places on, or when something waits for one."""

ServerState = Literal["starting", "up", "down", "over"]


class Interval(NamedTuple):
    """A while in which a server did the same.

    Attributes:
        begin: When it began, in seconds since 1970.
        end: When it ended.
        state: ``starting``: it was never ready so far; ``up``: it is ready; ``down``: not any
            more; ``over``: its node was told to end it.
        items: Requests that it works on at a time.
        has_queue: Whether more of them wait in the server.
    """

    begin: float
    end: float
    state: ServerState = "up"
    items: int = 0
    has_queue: bool = False

    @property
    def is_busy(self) -> bool:
        """Say whether it works on anything."""
        return self.state == "up" and (self.items > 0 or self.has_queue)


@dataclass(frozen=True, slots=True)
class JobTime:
    """A job's time, and what its servers did.

    Attributes:
        nodes: Nodes that it was given.
        begin: When fanfold began in it, in seconds since 1970.
        end: When it ended, or the present time.
        inside_s: Node-seconds paid from begin to end; fewer where nodes were lost.
        overhead_s: Node-seconds besides that the scheduler counts.
        servers: Servers that it should have had.
        first_item_at: When its first item began, or None: none did.
        last_item_at: When its last item began.
        was_stopped: Whether it was ended rather than finished.
        has_counts: Whether the servers' own counts tell what follows; else the journal does.
        intervals: What each server did, in order of time; what is left out is time in which it was
            not there.
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
    """Of node-seconds paid, those with a full batch, and where the others went.

    Attributes:
        paid_s: Node-seconds of all jobs.
        busy_s: Of them those in which servers worked on something; a node with four servers of
            which one works has a quarter.
        full_s: Of these those with a full batch.
        lost_s: All but the full ones by cause.
        full_batch: Items that count as a full batch of one server.
        by_counts: Of the jobs those of which the servers' own counts tell.
        by_journal: Those of which only the journal does.
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
        """Return the useful share, from 0 to 1."""
        return self.full_s / self.paid_s if self.paid_s else 0.0


def compute_utilization(jobs: Sequence[JobTime], places: int | None = None) -> Utilization:
    """Return how much of the jobs' node-seconds had a full batch, and why the rest had not.

    Args:
        jobs: The jobs.
        places: Items of a full batch; None takes the most that a server worked on by its own
            counts, or where there are none, what the busiest kept up for half of its time by the
            journal, for there more seem to be in the batch than have a place.
    """
    counted = [job for job in jobs if job.has_counts]
    most = places or _full_batch(counted, jobs)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    paid = busy = full = 0.0
    for job in jobs:
        paid += job.paid_s
        lost["start-up"] += job.overhead_s
        for (heading, works), seconds in _seconds_by_heading(
            job, max(1.0, FULL_SHARE * most)
        ).items():
            busy += seconds * works
            if heading == "full":
                full += seconds
            else:
                lost[heading] += seconds
    return Utilization(paid, busy, full, lost, most, len(counted), len(jobs) - len(counted))


def _seconds_by_heading(job: JobTime, threshold: float) -> dict[tuple[str, bool], float]:
    """Return the node-seconds paid from begin to end, by heading and whether a server works."""
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    expected = max(job.servers, len(job.intervals), 1)
    absent = expected - len(job.intervals)
    first = (
        job.end if job.first_item_at is None else min(max(job.first_item_at, job.begin), job.end)
    )
    seconds["start-up", False] += absent * (first - job.begin)
    seconds["cold", False] += absent * (job.end - first)
    for did in job.intervals:
        whole = list(_fill_job_time(did, job, first))
        warm = _warm(whole, threshold)
        for stretch in whole:
            heading = _heading(stretch, job, first, warm, threshold)
            seconds[heading, stretch.is_busy] += stretch.end - stretch.begin
    weight = job.nodes / expected
    return _scale_to_paid(job, {heading: weight * each for heading, each in seconds.items()})


def _scale_to_paid(
    job: JobTime, seconds: dict[tuple[str, bool], float]
) -> dict[tuple[str, bool], float]:
    """Return what is paid of node-seconds: a node that is lost costs nothing more."""
    gone, down = sum(seconds.values()) - job.inside_s, ("down", False)
    if gone > 0 and down in seconds:
        seconds[down] = max(0.0, seconds[down] - gone)
    left = sum(seconds.values())
    return {heading: each * job.inside_s / left for heading, each in seconds.items() if left}


def _warm(did: Sequence[Interval], threshold: float) -> float:
    """Return when a server's batch is first full; else when it first works; else never."""
    full = (one.begin for one in did if _full(one, threshold))
    works = (one.begin for one in did if one.is_busy)
    return next(full, next(works, float("inf")))


def _full(one: Interval, threshold: float) -> bool:
    return one.is_busy and (one.items >= threshold or one.has_queue)


def _heading(stretch: Interval, job: JobTime, first: float, warm: float, threshold: float) -> str:
    """Return the heading of a stretch that neither the first nor the last begin divides."""
    closing = job.last_item_at is not None and stretch.begin >= job.last_item_at
    if stretch.state == "down":
        return "down"
    if stretch.state == "starting":
        return "start-up"
    if _full(stretch, threshold):
        return "full"
    if stretch.begin < first or job.first_item_at is None:
        return "start-up"
    if closing or stretch.state == "over":
        return "drain" if job.was_stopped else "tail"
    return "starved" if stretch.begin >= warm else "cold"


def _fill_job_time(did: Iterable[Interval], job: JobTime, first: float) -> Iterator[Interval]:
    """Yield stretches that fill a job's time, and that no item's first or last begin divides."""
    at, state = job.begin, "starting"
    marks = sorted({first, first if job.last_item_at is None else job.last_item_at})
    for one in did:
        begin, end = max(one.begin, at), min(one.end, job.end)
        if end <= begin:
            continue
        yield from _cut(Interval(at, begin, _absent(state)), marks)
        yield from _cut(one._replace(begin=begin, end=end), marks)
        at, state = end, one.state
    yield from _cut(Interval(at, job.end, _absent(state)), marks)


def _absent(before: str) -> ServerState:
    """Return what a server of which nothing is known does after what it did."""
    return "starting" if before == "starting" else "over" if before == "over" else "down"


def _cut(one: Interval, marks: Iterable[float]) -> Iterator[Interval]:
    at = one.begin
    for end in (*(mark for mark in marks if one.begin < mark < one.end), one.end):
        if end > at:
            yield one._replace(begin=at, end=end)
        at = end


def _full_batch(counted: Sequence[JobTime], jobs: Sequence[JobTime]) -> int:
    """Return the items that count as a full batch where nobody says it."""
    if counted:
        seen = (one.items for job in counted for did in job.intervals for one in did if one.is_busy)
        return max(seen, default=1) or 1
    return max((_typical_load(did) for job in jobs for did in job.intervals), default=1)


def _typical_load(did: Iterable[Interval]) -> int:
    """Return the items that a server had at a time for half of the time in which it worked."""
    seconds: dict[int, float] = defaultdict(float)
    for stretch in did:
        if stretch.is_busy:
            seconds[stretch.items] += stretch.end - stretch.begin
    left = sum(seconds.values()) / 2
    for items in sorted(seconds, reverse=True):
        left -= seconds[items]
        if left <= 0:
            return max(1, items)
    return 1


class AnsweredItem(NamedTuple):
    """One item as the journal knows it: where it was answered, and when (seconds since 1970).

    The time includes what the item waited in the client and in the server's queue, so that
    batches look fuller than they are where either holds back.
    """

    endpoint: str
    begin: float
    end: float


def read_answered_items(records: Iterable[Mapping[str, Any]]) -> Iterator[AnsweredItem]:
    """Yield the calls that journal records tell of."""
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
        calls: All of them by endpoint, where they are kept.
    """

    first: float | None = None
    last: float | None = None
    calls: dict[str, list[AnsweredItem]] = field(default_factory=lambda: defaultdict(list))

    def add(self, call: AnsweredItem, earliest: float, keep: bool) -> None:
        """Count one; it did not begin before its job."""
        begin = max(call.begin, earliest)
        self.first = begin if self.first is None else min(self.first, begin)
        self.last = begin if self.last is None else max(self.last, begin)
        if keep:
            self.calls[call.endpoint].append(call._replace(begin=begin))


def group_by_job(
    calls: Iterable[AnsweredItem], times: Sequence[tuple[float, float]], keep: Sequence[bool]
) -> list[JobItems]:
    """Return the items of each job; those that ended outside of all are left out.

    Args:
        calls: Every item that was answered.
        times: Begin and end of each job, one after another.
        keep: Whether a job's calls are kept, which takes some 200 bytes for each.
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
    """Return what a server did by its items: it was there all the time, with so many of them."""
    steps = [(call.begin, 1) for call in calls] + [(call.end, -1) for call in calls]
    did, at, items = list[Interval](), begin, 0
    for time, change in sorted([*steps, (end, 0)]):
        if min(time, end) > at:
            did.append(Interval(at, min(time, end), items=items))
            at = time
        items += change
    return tuple(did)


_SILENT_S: Final = 90.0
"""So long a node may say nothing and be well: it says so once a minute."""

_FINE: Final = 32
"""A change counts from this part of the most that a server worked on."""

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
    """What the nodes of one job tell.

    Attributes:
        intervals: By host and instance, what the server did.
        has_counts: Whether any of them tells what servers work on.
    """

    intervals: dict[tuple[str, int], list[Interval]] = field(default_factory=dict)
    has_counts: bool = False

    @property
    def first_busy_at(self) -> float | None:
        """Return when a server first worked on anything."""
        return min(
            (s.begin for did in self.intervals.values() for s in did if s.is_busy), default=None
        )


def read_job_servers(folder: Path, times: Sequence[tuple[float, float]]) -> list[JobServers]:
    """Return what the nodes tell of each job; blocks.

    A node that falls silent more than a minute before its job's end was lost: its servers are
    down from its last line on.

    Args:
        folder: The servers folder.
        times: Begin and end of each job.

    Raises:
        JournalError: A record cannot be read.
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
    """Add one time that a node was served."""
    job.has_counts = job.has_counts or any(line["event"] == "load" for line in lines)
    for instance in range(max(1, int(lines[0].get("instances", 1)))):
        did = job.intervals.setdefault((host, instance), [])
        did += _server_intervals(lines, instance, end)


def _server_intervals(
    lines: Sequence[Mapping[str, Any]], instance: int, end: float
) -> list[Interval]:
    """Return what one server did from the first line on."""
    most = max((_read_load(line, instance)[0] for line in lines), default=0)
    found, now = list[Interval](), Interval(lines[0]["at"], end, "starting")
    for line in lines:
        after = _apply_event(now, line, instance, max(1.0, most / _FINE))
        if after is not now:
            found.append(now._replace(end=line["at"]))
            now = after._replace(begin=line["at"])
    last = lines[-1]
    if last["event"] == "end":
        state: ServerState = "over" if last.get("why") == "stopped" else "down"
    else:
        state = "down" if end - last["at"] > _SILENT_S else now.state
    if state != now.state:
        found.append(now._replace(end=last["at"]))
        now = Interval(last["at"], end, state)
    return [one for one in (*found, now) if one.end > one.begin]


def _apply_event(now: Interval, line: Mapping[str, Any], instance: int, fine: float) -> Interval:
    """Return what a server does after a line, or the same if that is nearly the same."""
    if line["event"] == "load":
        items, queued = _read_load(line, instance, (now.items, now.has_queue))
        alike = bool(items) == bool(now.items) and abs(items - now.items) < fine
        same = alike and queued == now.has_queue
        return now if same else now._replace(items=items, has_queue=queued)
    if line.get("instance") != instance or line["event"] not in _STATES:
        return now
    after = now._replace(state=_STATES[line["event"]])
    return after._replace(items=0, has_queue=False) if line["event"] in _ENDED else after


def _read_load(
    line: Mapping[str, Any], instance: int, before: tuple[int, bool] = (0, False)
) -> tuple[int, bool]:
    """Return what a line says of a server's load; where it says nothing, what was before."""
    if line["event"] != "load" or instance >= len(line["running"]):
        return before
    running, waiting = line["running"][instance], line["waiting"][instance]
    return before if running is None else (int(running), bool(waiting))
