"""Of the node-seconds of jobs, those in which the servers' batches were full, and why others not.

What a server did comes as stretches of time, from whichever source: its own counts in the nodes'
records, or the journal. Each second of each server falls under exactly one heading; a node's
servers have equal parts of its seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

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

NEARLY: Final = 0.9
"""A batch counts as full from this share of its places on, or when something waits for one."""

State = Literal["starting", "up", "down", "over"]


class Stretch(NamedTuple):
    """A while in which a server did the same.

    Attributes:
        begin: When it began, in seconds since 1970.
        end: When it ended.
        state: ``starting``: it was never ready so far; ``up``: it is ready; ``down``: not any
            more; ``over``: its node was told to end it.
        items: Requests that it works on at a time.
        queued: Whether more of them wait in the server.
    """

    begin: float
    end: float
    state: State = "up"
    items: int = 0
    queued: bool = False

    @property
    def busy(self) -> bool:
        """Say whether it works on anything."""
        return self.state == "up" and (self.items > 0 or self.queued)


@dataclass(frozen=True, slots=True)
class JobTime:
    """A job's time, and what its servers did.

    Attributes:
        nodes: Nodes that it was given.
        begin: When fanfold began in it, in seconds since 1970.
        end: When it ended, or the present time.
        inside_s: Node-seconds paid from begin to end; fewer where nodes were lost.
        before_s: Node-seconds besides that the scheduler counts.
        servers: Servers that it should have had.
        first: When its first item began, or None: none did.
        last: When its last item began.
        stopped: Whether it was ended rather than finished.
        by_counts: Whether the servers' own counts tell what follows; else the journal does.
        did: What each server did, in order of time; what is left out is time in which it was not
            there.
    """

    nodes: int
    begin: float
    end: float
    inside_s: float
    before_s: float
    servers: int
    first: float | None
    last: float | None
    stopped: bool
    by_counts: bool
    did: tuple[tuple[Stretch, ...], ...] = field(repr=False, default=())

    @property
    def paid_s(self) -> float:
        """Return its node-seconds."""
        return self.inside_s + self.before_s


@dataclass(frozen=True, slots=True)
class Share:
    """Of node-seconds paid, those with a full batch, and where the others went.

    Attributes:
        paid_s: Node-seconds of all jobs.
        busy_s: Of them those in which servers worked on something; a node with four servers of
            which one works has a quarter.
        full_s: Of these those with a full batch.
        lost_s: All but the full ones by cause.
        places: Items that count as a full batch of one server.
        by_counts: Of the jobs those of which the servers' own counts tell.
        by_journal: Those of which only the journal does.
    """

    paid_s: float
    busy_s: float
    full_s: float
    lost_s: Mapping[str, float]
    places: int
    by_counts: int
    by_journal: int

    @property
    def useful(self) -> float:
        """Return the useful share, from 0 to 1."""
        return self.full_s / self.paid_s if self.paid_s else 0.0


def useful_share(jobs: Sequence[JobTime], places: int | None = None) -> Share:
    """Return how much of the jobs' node-seconds had a full batch, and why the rest had not.

    Args:
        jobs: The jobs.
        places: Items of a full batch; None takes the most that a server worked on by its own
            counts, or where there are none, what the busiest kept up for half of its time by the
            journal, for there more seem to be in the batch than have a place.
    """
    counted = [job for job in jobs if job.by_counts]
    most = places or _places(counted, jobs)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    paid = busy = full = 0.0
    for job in jobs:
        paid += job.paid_s
        lost["start-up"] += job.before_s
        for (heading, works), seconds in _headings(job, max(1.0, NEARLY * most)).items():
            busy += seconds * works
            if heading == "full":
                full += seconds
            else:
                lost[heading] += seconds
    return Share(paid, busy, full, lost, most, len(counted), len(jobs) - len(counted))


def _headings(job: JobTime, threshold: float) -> dict[tuple[str, bool], float]:
    """Return the node-seconds paid from begin to end, by heading and whether a server works."""
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    expected = max(job.servers, len(job.did), 1)
    absent = expected - len(job.did)
    first = job.end if job.first is None else min(max(job.first, job.begin), job.end)
    seconds["start-up", False] += absent * (first - job.begin)
    seconds["cold", False] += absent * (job.end - first)
    for did in job.did:
        whole = list(_whole(did, job, first))
        warm = _warm(whole, threshold)
        for stretch in whole:
            heading = _heading(stretch, job, first, warm, threshold)
            seconds[heading, stretch.busy] += stretch.end - stretch.begin
    weight = job.nodes / expected
    return _paid(job, {heading: weight * each for heading, each in seconds.items()})


def _paid(job: JobTime, seconds: dict[tuple[str, bool], float]) -> dict[tuple[str, bool], float]:
    """Return what is paid of node-seconds: a node that is lost costs nothing more."""
    gone, down = sum(seconds.values()) - job.inside_s, ("down", False)
    if gone > 0 and down in seconds:
        seconds[down] = max(0.0, seconds[down] - gone)
    left = sum(seconds.values())
    return {heading: each * job.inside_s / left for heading, each in seconds.items() if left}


def _warm(did: Sequence[Stretch], threshold: float) -> float:
    """Return when a server's batch is first full; else when it first works; else never."""
    full = (one.begin for one in did if _full(one, threshold))
    works = (one.begin for one in did if one.busy)
    return next(full, next(works, float("inf")))


def _full(one: Stretch, threshold: float) -> bool:
    return one.busy and (one.items >= threshold or one.queued)


def _heading(stretch: Stretch, job: JobTime, first: float, warm: float, threshold: float) -> str:
    """Return the heading of a stretch that neither the first nor the last begin divides."""
    closing = job.last is not None and stretch.begin >= job.last
    if stretch.state == "down":
        return "down"
    if stretch.state == "starting":
        return "start-up"
    if _full(stretch, threshold):
        return "full"
    if stretch.begin < first or job.first is None:
        return "start-up"
    if closing or stretch.state == "over":
        return "drain" if job.stopped else "tail"
    return "starved" if stretch.begin >= warm else "cold"


def _whole(did: Iterable[Stretch], job: JobTime, first: float) -> Iterator[Stretch]:
    """Yield stretches that fill a job's time, and that no item's first or last begin divides."""
    at, state = job.begin, "starting"
    marks = sorted({first, first if job.last is None else job.last})
    for one in did:
        begin, end = max(one.begin, at), min(one.end, job.end)
        if end <= begin:
            continue
        yield from _cut(Stretch(at, begin, _absent(state)), marks)
        yield from _cut(one._replace(begin=begin, end=end), marks)
        at, state = end, one.state
    yield from _cut(Stretch(at, job.end, _absent(state)), marks)


def _absent(before: str) -> State:
    """Return what a server of which nothing is known does after what it did."""
    return "starting" if before == "starting" else "over" if before == "over" else "down"


def _cut(one: Stretch, marks: Iterable[float]) -> Iterator[Stretch]:
    at = one.begin
    for end in (*(mark for mark in marks if one.begin < mark < one.end), one.end):
        if end > at:
            yield one._replace(begin=at, end=end)
        at = end


def _places(counted: Sequence[JobTime], jobs: Sequence[JobTime]) -> int:
    """Return the items that count as a full batch where nobody says it."""
    if counted:
        seen = (one.items for job in counted for did in job.did for one in did if one.busy)
        return max(seen, default=1) or 1
    return max((_kept_up(did) for job in jobs for did in job.did), default=1)


def _kept_up(did: Iterable[Stretch]) -> int:
    """Return the items that a server had at a time for half of the time in which it worked."""
    seconds: dict[int, float] = defaultdict(float)
    for stretch in did:
        if stretch.busy:
            seconds[stretch.items] += stretch.end - stretch.begin
    left = sum(seconds.values()) / 2
    for items in sorted(seconds, reverse=True):
        left -= seconds[items]
        if left <= 0:
            return max(1, items)
    return 1
