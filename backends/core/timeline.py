"""What endpoints did in short spans of time, as processes report it to the run's timeline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from .types import Json
from .values import is_count, replace_surrogates

DELTA_VERSION: Final = 1
"""Version of the JSON form of a :class:`TimelineDelta`."""
BASE_MS: Final = 250
"""Width of the shortest bins in ms; all others are this width, doubled some times."""
_MOST_DOUBLINGS: Final = 24
_MOST_MS: Final = 1 << 44
"""Latest time in ms since 1970 that a report may have."""
_MOST_NAME: Final = 1_000
_MOST_CLASS: Final = 100
_MOST_ROWS: Final = 1 << 20
_ROW_BYTES: Final = 64
"""Bytes of a row as JSON, at most, without failures and the endpoint's name."""
_FAILURE_BYTES: Final = 40


@dataclass(slots=True)
class BinCounts:
    """What one endpoint did in one bin.

    Attributes:
        calls: Requests that ended.
        failures: Failed ones by error class.
        flight_s: Seconds in flight, summed over its requests.
        input_tokens: Prompt tokens of the answers.
        output_tokens: Completion tokens of the answers.
        latency_s: Seconds to the answers, summed over the requests that were answered.
    """

    calls: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    flight_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    latency_s: float = 0.0

    def add(self, other: BinCounts) -> None:
        """Add other counts to these."""
        self.calls += other.calls
        self.flight_s += other.flight_s
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.latency_s += other.latency_s
        for name, count in other.failures.items():
            self.failures[name] = self.failures.get(name, 0) + count


class TimelineDelta:
    """What the endpoints of one process did since its last report, in bins.

    Bins begin at multiples of their width since 1970. If there are too many of them, the width
    doubles.

    Args:
        width_ms: Width of a bin in ms.
        most_bins: Limit of bins.

    Attributes:
        width_ms: Width of a bin in ms.
        cells: Counts by the start of the bin, in ms since 1970, and endpoint.
        sent_ms: When it was sent, in ms since 1970 by the clock of its process.
    """

    def __init__(self, width_ms: int = BASE_MS, most_bins: int = 256) -> None:
        self.width_ms, self._most_bins = width_ms, most_bins
        self.cells: dict[tuple[int, str], BinCounts] = {}
        self._starts = set[int]()
        self.sent_ms = 0

    @property
    def first_ms(self) -> int:
        """Return the start of the first bin; 0 if there is none."""
        return min(self._starts, default=0)

    def __bool__(self) -> bool:
        """Return True if there is something to report."""
        return bool(self.cells)

    def add(self, at_ms: int, endpoint: str, counts: BinCounts) -> None:
        """Add what an endpoint did at a time; the counts must not be used afterwards."""
        start = at_ms - at_ms % self.width_ms
        found = self.cells.get((start, endpoint))
        if found is not None:
            found.add(counts)
            return
        self.cells[start, endpoint] = counts
        self._starts.add(start)
        if len(self._starts) > self._most_bins:
            self.widen()

    def add_flight(self, lo_ms: float, hi_ms: float, endpoint: str, seconds: float) -> None:
        """Add seconds in flight, spread evenly over a span of time.

        Args:
            lo_ms: Begin of the span, in ms since 1970.
            hi_ms: Its end.
            endpoint: The endpoint.
            seconds: Seconds in flight in the span.
        """
        first, last = int(lo_ms) // self.width_ms, int(hi_ms) // self.width_ms
        if last - first > self._most_bins:  # the process was suspended
            first = last
        if first == last:
            self.add(int(hi_ms), endpoint, BinCounts(flight_s=seconds))
            return
        width, span = self.width_ms, hi_ms - lo_ms
        for bin_ in range(first, last + 1):
            part = min(hi_ms, (bin_ + 1) * width) - max(lo_ms, bin_ * width)
            if part > 0:
                self.add(bin_ * width, endpoint, BinCounts(flight_s=seconds * part / span))

    def merge(self, other: TimelineDelta) -> None:
        """Add another report to this one; the other must not be used afterwards."""
        while self.width_ms < other.width_ms:
            self.widen()
        for (start, endpoint), counts in other.cells.items():
            self.add(start, endpoint, counts)

    def widen(self) -> None:
        """Double the width of the bins."""
        self.width_ms *= 2
        cells, self.cells, self._starts = self.cells, {}, set()
        for (start, endpoint), counts in cells.items():
            self.add(start, endpoint, counts)

    def shift(self, by_ms: int) -> None:
        """Move all bins in time, to the nearest multiple of their width."""
        steps = round(by_ms / self.width_ms) * self.width_ms
        if steps:
            self.cells = {(max(0, at + steps), e): one for (at, e), one in self.cells.items()}
            self._starts = {at for at, _ in self.cells}

    def to_json(self, most_bytes: int) -> dict[str, Json]:
        """Return the report as compact JSON.

        Args:
            most_bytes: Size to keep to by wider bins; one bin per endpoint is never too much.
        """
        while len(self._starts) > 1 and self._size() > most_bytes:
            self.widen()
        names = list(dict.fromkeys(endpoint for _, endpoint in self.cells))
        ids = {name: number for number, name in enumerate(names)}
        first = self.first_ms
        rows: list[Json] = [
            [
                (start - first) // self.width_ms,
                ids[endpoint],
                one.calls,
                round(1000 * one.flight_s),
                one.input_tokens,
                one.output_tokens,
                round(1000 * one.latency_s),
                *([dict(one.failures)] if one.failures else []),
            ]
            for (start, endpoint), one in self.cells.items()
        ]
        return {
            "v": DELTA_VERSION,
            "sent": int(1000 * time.time()),
            "first": first,
            "width": self.width_ms,
            "endpoints": [*names],
            "rows": rows,
        }

    def _size(self) -> int:
        """Return the bytes of the report as JSON, at most."""
        names = sum(len(name) + 4 for name in {endpoint for _, endpoint in self.cells})
        failures = sum(len(one.failures) for one in self.cells.values())
        return names + _ROW_BYTES * len(self.cells) + _FAILURE_BYTES * failures

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Parse a report of another process.

        Raises:
            ValueError: It is not a report, or a number in it is out of range.
        """
        if not isinstance(data, Mapping) or data.get("v") != DELTA_VERSION:
            raise ValueError(f"not version {DELTA_VERSION} of a report for the timeline")
        sent, first, width = (data.get(name, 0) for name in ("sent", "first", "width"))
        names, rows = data.get("endpoints"), data.get("rows")
        if not all(is_count(number) for number in (sent, first, width)) or width not in _WIDTHS:
            raise ValueError("its times are not counts of ms")
        if max(sent, first) > _MOST_MS or first % width:
            raise ValueError("its times are out of range")
        if not isinstance(names, list) or not isinstance(rows, list) or len(rows) > _MOST_ROWS:
            raise ValueError("endpoints and rows are not lists, or too long")
        if not all(isinstance(name, str) and len(name) <= _MOST_NAME for name in names):
            raise ValueError("the name of an endpoint is not a text, or too long")
        names = [replace_surrogates(name) for name in names]
        delta = cls(width)
        delta.sent_ms = sent
        for row in rows:
            step, number, counts = _parse_row(row)
            if number >= len(names) or first + step * width > _MOST_MS:
                raise ValueError("a row of an endpoint without a name, or too late")
            delta.add(first + step * width, names[number], counts)
        return delta


_WIDTHS: Final = frozenset(BASE_MS << power for power in range(_MOST_DOUBLINGS))
_NUMBERS: Final = 7


def _parse_row(row: object) -> tuple[int, int, BinCounts]:
    """Return the bin's number, the endpoint's number and the counts of a row.

    Raises:
        ValueError: It is not a row.
    """
    if not isinstance(row, list) or len(row) not in {_NUMBERS, _NUMBERS + 1}:
        raise ValueError("a row is not a list of numbers")
    if not all(is_count(number) for number in row[:_NUMBERS]):
        raise ValueError("a number in a row is not a count")
    step, endpoint, calls, flight_ms, prompt, completion, latency_ms = row[:_NUMBERS]
    failures = row[_NUMBERS] if len(row) > _NUMBERS else {}
    if not isinstance(failures, Mapping) or not all(
        isinstance(name, str) and is_error_class(name) and is_count(count)
        for name, count in failures.items()
    ):
        raise ValueError("failures are not counts by error class")
    if sum(failures.values()) > calls:
        raise ValueError("more failures than calls")
    return (
        step,
        endpoint,
        BinCounts(calls, dict(failures), flight_ms / 1000, prompt, completion, latency_ms / 1000),
    )


def is_error_class(name: str) -> bool:
    """Return True if a text can be the name of an error class."""
    return name.isidentifier() and len(name) <= _MOST_CLASS


class ClockAlignment:
    """How far to shift the times of a worker, whose clock may be wrong; pure.

    A worker has done what it reports after its task was sent, and before the report arrived, both
    by the coordinator's clock. Its times are shifted by the least that fits all its reports: not at
    all if its clock is right. A clock that is wrong is off by less than the way of a message
    afterwards.
    """

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf

    def update(self, delta: TimelineDelta, task_sent_ms: float | None, arrived_ms: float) -> int:
        """Return by how many ms to shift the times of a report.

        Args:
            delta: The report, with times by the worker's clock.
            task_sent_ms: When the worker's task was sent, by the coordinator's clock; None if an
                earlier session sent it.
            arrived_ms: When the report arrived, by the coordinator's clock.
        """
        self._most = min(self._most, arrived_ms - delta.sent_ms)
        if task_sent_ms is not None:
            self._least = max(self._least, task_sent_ms - delta.first_ms - delta.width_ms)
        return round(min(max(0.0, self._least), self._most))
