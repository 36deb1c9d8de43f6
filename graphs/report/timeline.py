"""A run over time: its timeline, endpoints as a heat map, and where the time went."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from ...backends.core.errors import JournalError

MOST_TIMES: Final = 200
MOST_ENDPOINTS: Final = 120
"""Most columns and rows of the heat map."""

_PAIRS: Final = pa.list_(pa.struct([("key", pa.string()), ("value", pa.int64())]))
"""Type of the column of failures, as a list."""

_GAP_S: Final = 30.0
"""A longer time without requests between two sessions is left out of the charts."""

_FULL: Final = 0.8
"""Share of the sustained level below which the end of a run is its tail."""


@dataclass(slots=True)
class Bin:
    """A part of the time, over all endpoints or for one.

    Attributes:
        start: Its start in seconds since 1970.
        seconds: Its length.
        in_flight: Requests in flight, on average.
    """

    start: float
    seconds: float
    calls: int = 0
    failed: int = 0
    in_flight: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def end(self) -> float:
        """Return its end."""
        return self.start + self.seconds

    def add(self, calls: int, failed: int, in_flight: float, tokens: tuple[int, int]) -> None:
        """Add what happened at an endpoint."""
        self.calls += calls
        self.failed += failed
        self.in_flight += in_flight
        self.input_tokens += tokens[0]
        self.output_tokens += tokens[1]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run over time.

    Attributes:
        bins: All endpoints together, by time.
        by_endpoint: Bins of each endpoint.
        failures: Failed requests by error class.
    """

    bins: Sequence[Bin]
    by_endpoint: Mapping[str, Sequence[Bin]]
    failures: Mapping[str, int]


def read_timeline(path: Path) -> Timeline | None:
    """Read the timeline of a run; None if it has none.

    Raises:
        JournalError: The file is damaged.
    """
    try:
        with pa.OSFile(str(path), "r") as file, pa.ipc.open_file(file) as reader:
            table = reader.read_all()
        return _fold(table) if table.num_rows else None
    except FileNotFoundError:
        return None
    except (OSError, KeyError, pa.ArrowException) as error:
        msg = f"{path}: cannot be read: {error}; remove it, and the report leaves the timeline out"
        raise JournalError(msg) from error


def _fold(table: pa.Table) -> Timeline:
    """Sum the rows of a timeline over endpoints."""
    starts = [ms / 1000 for ms in _read_numbers(pc.cast(table.column("start"), pa.int64()))]
    failed, failures = _count_failures(table.column("failures"))
    names = pc.cast(table.column("endpoint"), pa.string()).to_pylist()
    numbers = [
        _read_numbers(table.column(name))
        for name in ("seconds", "calls", "in_flight", "input_tokens", "output_tokens")
    ]
    whole = dict[tuple[float, float], Bin]()
    parts = defaultdict[str, dict[tuple[float, float], Bin]](dict)
    for start, name, bad, seconds, calls, level, tokens_in, tokens_out in zip(
        starts, names, failed, *numbers, strict=True
    ):
        key = start, seconds
        for bins in (whole, parts[str(name)]):
            if (found := bins.get(key)) is None:
                found = bins[key] = Bin(*key)
            found.add(calls, bad, level, (tokens_in, tokens_out))
    return Timeline(
        [whole[key] for key in sorted(whole)],
        {name: [bins[key] for key in sorted(bins)] for name, bins in parts.items()},
        failures,
    )


def _read_numbers(column: Any) -> list[Any]:
    return list(pc.fill_null(column, 0).to_pylist())


def _count_failures(column: Any) -> tuple[list[int], dict[str, int]]:
    """Return the failed requests of each row, and of each class."""
    failed, classes = [0] * len(column), Counter[str]()
    counts = pc.fill_null(pc.list_value_length(pc.cast(column, _PAIRS)), 0)
    for n in pc.indices_nonzero(counts).to_pylist():
        pairs = dict(column[n].as_py())
        failed[n] = sum(pairs.values())
        classes.update(pairs)
    return failed, dict(classes.most_common())


@dataclass(frozen=True, slots=True)
class Clock:
    """Working time: the time since the start of a run without its long pauses.

    Attributes:
        starts: Where each stretch of work begins, in seconds since 1970.
        offsets: Working time at these points.
    """

    starts: Sequence[float]
    offsets: Sequence[float]

    @classmethod
    def of(cls, bins: Sequence[Bin]) -> Clock:
        """Return the clock of bins in order of time."""
        starts, offsets, end = [bins[0].start], [0.0], bins[0].end
        for before, after in pairwise(bins):
            end = max(end, before.end)
            if after.start - end > _GAP_S:
                offsets.append(offsets[-1] + end - starts[-1])
                starts.append(after.start)
        return cls(starts, offsets)

    def convert(self, time: float) -> float:
        """Return the working time of a time."""
        n = max(0, bisect_right(self.starts, time) - 1)
        return self.offsets[n] + time - self.starts[n]


def scale_time(seconds: float) -> tuple[float, str]:
    """Return the divisor and the name of the unit in which a time of this length is shown."""
    for limit, unit, name in ((180, 1.0, "seconds"), (3 * 3600, 60.0, "minutes")):
        if seconds <= limit:
            return unit, name
    return 3600.0, "hours"


def list_points(timeline: Timeline) -> tuple[list[dict[str, float]], list[float], str]:
    """Return the steps of the charts by working time, the pauses, and the unit of time."""
    clock, bins = Clock.of(timeline.bins), timeline.bins
    unit, name = scale_time(clock.convert(bins[-1].start) + bins[-1].seconds)
    points = list[dict[str, float]]()
    for one, after in zip(bins, [*bins[1:], None], strict=True):
        begin, seconds = clock.convert(one.start), one.seconds or 1.0
        points.append(
            {
                "at": begin / unit,
                "in_flight": one.in_flight,
                "rate": one.calls / seconds,
                "failed": one.failed / seconds,
                "tokens": one.output_tokens / seconds,
            }
        )
        end = begin + one.seconds
        if after is None or clock.convert(after.start) > end + 0.01 * seconds:
            nothing = dict.fromkeys(("in_flight", "rate", "failed", "tokens"), 0.0)
            points.append({"at": end / unit, **nothing})
    return points, [offset / unit for offset in clock.offsets[1:]], name


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Endpoints over time, at most :data:`MOST_TIMES` by :data:`MOST_ENDPOINTS` cells.

    Attributes:
        cells: Column, row, requests in flight per endpoint, and share of failed requests.
        names: Name of each row.
        width: Length of a column in units of time.
        unit: The unit of time.
    """

    cells: Sequence[tuple[int, int, float, float]]
    names: Sequence[str]
    width: float
    unit: str


def make_heat_map(timeline: Timeline) -> HeatMap:
    """Return the endpoints over time; neighbours share a row if there are too many."""
    clock = Clock.of(timeline.bins)
    last = clock.convert(timeline.bins[-1].start) + timeline.bins[-1].seconds
    shortest = min(one.seconds for one in timeline.bins)
    columns = max(1, min(MOST_TIMES, round(last / shortest) if shortest else 1))
    width = last / columns or 1.0
    names = sorted(timeline.by_endpoint, key=_natural)
    size = -(-len(names) // MOST_ENDPOINTS)
    groups = [names[n : n + size] for n in range(0, len(names), size)]
    work = defaultdict[tuple[int, int], list[float]](lambda: [0.0, 0.0, 0.0])
    for row, group in enumerate(groups):
        for name in group:
            for one in timeline.by_endpoint[name]:
                begin = clock.convert(one.start)
                for column, seconds in _spread(begin, one.seconds, width, columns):
                    cell, share = work[column, row], seconds / (one.seconds or 1.0)
                    cell[0] += one.in_flight * seconds / (width * len(group))
                    cell[1] += one.calls * share
                    cell[2] += one.failed * share
    cells = [
        (column, row, level, failed / calls if calls else 0.0)
        for (column, row), (level, calls, failed) in sorted(work.items())
        if level or calls
    ]
    shown = [one[0] if len(one) == 1 else f"{one[0]} … {one[-1]}" for one in groups]
    unit, unit_name = scale_time(last)
    return HeatMap(cells, shown, width / unit, unit_name)


def _spread(
    begin: float, seconds: float, width: float, columns: int
) -> Iterator[tuple[int, float]]:
    """Yield the columns that a time overlaps, and for how long."""
    first, end = min(columns - 1, int(begin / width)), begin + seconds
    for column in range(first, columns):
        low, high = max(begin, column * width), min(end, (column + 1) * width)
        if high > low:
            yield column, high - low
        if (column + 1) * width >= end:
            return


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a key that sorts ``node-9`` before ``node-10``."""
    parts, text = [], ""
    for character in f"{name} ":
        if text and character.isdecimal() != text[-1].isdecimal():
            parts.append(text)
            text = ""
        text += character
    return tuple(
        (part.isascii() and part.isdecimal(), 0 if not part.isdecimal() else int(part), part)
        for part in [*parts, text]
    )


@dataclass(frozen=True, slots=True)
class TimeUse:
    """Where the time of a run went.

    Attributes:
        ideal: Seconds that the useful requests take at the sustained level.
        actual: Seconds of all sessions.
        level: Requests in flight that the run sustained.
        parts: Seconds by what they went to; they add up to ``actual``.
    """

    ideal: float
    actual: float
    level: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Return ideal over actual."""
        return self.ideal / self.actual if self.actual else 0.0


def measure_time_use(
    timeline: Timeline, sessions: Sequence[tuple[datetime | None, datetime | None]]
) -> TimeUse | None:
    """Return where the time of a run went; None if no request was in flight.

    Args:
        timeline: The run over time.
        sessions: Start and end of each session; of one that was killed or goes on, the end is the
            last request.
    """
    busy = [one for one in timeline.bins if one.in_flight > 0]
    if not busy:
        return None
    level = _find_level(busy)
    parts = dict.fromkeys(
        ("useful requests", "failed requests", "start", "free slots", "tail", "end"), 0.0
    )
    for begin, end in _find_spans(busy, sessions):
        own = [one for one in busy if begin <= one.start + one.seconds / 2 <= end]
        if not own:
            parts["start"] += end - begin
            continue
        first, last = max(begin, own[0].start), min(end, max(one.end for one in own))
        parts["start"] += first - begin
        parts["end"] += end - last
        full = [one.end for one in own if one.in_flight >= _FULL * level]
        tail = max(full, default=first)
        covered = 0.0
        for one in own:
            seconds = max(0.0, min(one.end, last) - max(one.start, first))
            covered += seconds
            used = min(1.0, one.in_flight / level) * seconds
            failed = min(1.0, one.failed / one.calls) if one.calls else 0.0
            parts["failed requests"] += used * failed
            parts["useful requests"] += used * (1 - failed)
            parts["tail" if one.start >= tail else "free slots"] += seconds - used
        parts["free slots"] += max(0.0, last - first - covered)
    return TimeUse(parts["useful requests"], sum(parts.values()), level, parts)


def _find_level(bins: Sequence[Bin]) -> float:
    """Return the requests in flight that are exceeded in a twentieth of the time."""
    ranked = sorted(bins, key=lambda one: -one.in_flight)
    left = 0.05 * sum(one.seconds for one in bins)
    for one in ranked:
        left -= one.seconds
        if left <= 0:
            return one.in_flight
    return ranked[-1].in_flight


def _find_spans(
    bins: Sequence[Bin], sessions: Sequence[tuple[datetime | None, datetime | None]]
) -> list[tuple[float, float]]:
    """Return start and end of each session that had a start."""
    known = [(start.timestamp(), end) for start, end in sessions if start is not None]
    limits = [*(start for start, _ in known[1:]), float("inf")]
    spans = list[tuple[float, float]]()
    for (begin, end), limit in zip(known, limits, strict=True):
        inside = [one.end for one in bins if begin <= one.start < limit]
        last = max(inside, default=begin) if end is None else end.timestamp()
        if last > begin:
            spans.append((begin, last))
    return spans
