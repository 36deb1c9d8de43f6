"""What the journal tells of servers: which items each of them had, and when."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from .utilization import Stretch


class Call(NamedTuple):
    """One item as the journal knows it: where it was answered, and when (seconds since 1970).

    The time includes what the item waited in the client and in the server's queue, so that
    batches look fuller than they are where either holds back.
    """

    endpoint: str
    begin: float
    end: float


def calls_of(records: Iterable[Mapping[str, Any]]) -> Iterator[Call]:
    """Yield the calls that journal records tell of."""
    for record in records:
        endpoint, took = record.get("endpoint"), record.get("latency_s")
        if endpoint and took is not None:
            end = datetime.fromisoformat(record["finished_at"]).timestamp()
            yield Call(str(endpoint), end - float(took), end)


@dataclass(slots=True)
class Items:
    """The items that ended within a job.

    Attributes:
        first: When the first of them began, or None.
        last: When the last of them began.
        calls: All of them by endpoint, where they are kept.
    """

    first: float | None = None
    last: float | None = None
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))

    def add(self, call: Call, earliest: float, keep: bool) -> None:
        """Count one; it did not begin before its job."""
        begin = max(call.begin, earliest)
        self.first = begin if self.first is None else min(self.first, begin)
        self.last = begin if self.last is None else max(self.last, begin)
        if keep:
            self.calls[call.endpoint].append(call._replace(begin=begin))


def by_job(
    calls: Iterable[Call], times: Sequence[tuple[float, float]], keep: Sequence[bool]
) -> list[Items]:
    """Return the items of each job; those that ended outside of all are left out.

    Args:
        calls: Every item that was answered.
        times: Begin and end of each job, one after another.
        keep: Whether a job's calls are kept, which takes some 200 bytes for each.
    """
    begins, found = [begin for begin, _ in times], [Items() for _ in times]
    for call in calls:
        number = bisect_right(begins, call.end) - 1
        if number >= 0 and call.end <= times[number][1]:
            found[number].add(call, begins[number], keep[number])
    return found


def levels(calls: Iterable[Call], begin: float, end: float) -> tuple[Stretch, ...]:
    """Return what a server did by its items: it was there all the time, with so many of them."""
    steps = [(call.begin, 1) for call in calls] + [(call.end, -1) for call in calls]
    did, at, items = list[Stretch](), begin, 0
    for time, change in sorted([*steps, (end, 0)]):
        if min(time, end) > at:
            did.append(Stretch(at, min(time, end), items=items))
            at = time
        items += change
    return tuple(did)
