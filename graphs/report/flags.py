"""Flags of rows, and the rows that a table shows of a run that is too large for it."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import quantiles
from typing import Any, Final

from ...backends.core.errors import AnswerError, RefusedAnswerError, TruncatedAnswerError
from ...backends.core.fields import FieldPath
from ...backends.storage.results_schema import INPUT_ROW, ResultRow

FLAGS: Final = {
    "truncated": "the answer reached the limit of tokens",
    "refused": "the model refused, or a content filter withheld the answer",
    "repaired": "an answer was invalid and was sent back to the model",
    "in pieces": "the part of a document was too long for the model, and was asked in pieces",
    "repetitive": "a text of the model repeats itself: it compresses to less than a tenth",
    "duplicate": "an earlier item has the same messages",
    "slow": "the item took far longer than most: above the upper quartile by three times the "
    "distance between the quartiles, and twice the median",
}
"""Flags in the order of their bits, with their meaning."""

_BITS: Final = {name: 1 << n for n, name in enumerate(FLAGS)}

_REPETITIVE_FROM: Final = 400
_REPETITIVE_PART: Final = 4_000
_REPETITIVE_SHARE: Final = 0.1
_LEAST_TIMES: Final = 20
"""Times from which quartiles say something."""

MOST_ROWS: Final = 100_000
_MOST_FAILED: Final = 20_000
_MOST_FLAGGED: Final = 20_000
_MOST_ENDS: Final = 10_000


@dataclass(slots=True)
class RowFacts:
    """What is known of each row that has ended, in input order.

    Attributes:
        rank: The field that ranks the rows, or None.
        flags: Flags of each row as bits.
        failed: Whether each row failed.
        times: Seconds that each row took.
        values: Value of the ranking field; not a number where there is none.
    """

    rank: FieldPath | None = None
    flags: bytearray = field(default_factory=bytearray)
    failed: bytearray = field(default_factory=bytearray)
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    _questions: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.flags)

    def add(self, row: ResultRow) -> None:
        """Add the next row."""
        self.flags.append(self._find_flags(row))
        self.failed.append(row.get("status") == "failed")
        time = row.get("latency_s") if row.get("attempts") else None
        self.times.append(_to_number(time))
        output, inputs = row.get("output"), row.get(INPUT_ROW) or {}
        value = None if self.rank is None else self.rank.pick(output, inputs)
        self.values.append(_to_number(value))

    def _find_flags(self, row: ResultRow) -> int:
        error = row.get("error_class")
        bits = 0
        if error == TruncatedAnswerError.__name__:
            bits |= _BITS["truncated"]
        if error == RefusedAnswerError.__name__:
            bits |= _BITS["refused"]
        if row.get("repairs"):
            bits |= _BITS["repaired"]
        if row.get("pieces"):
            bits |= _BITS["in pieces"]
        if error == AnswerError.__name__ or any(map(is_repetitive, _texts(row))):
            bits |= _BITS["repetitive"]
        if question := row.get("question"):
            digest = hash(question)
            bits |= _BITS["duplicate"] if digest in self._questions else 0
            self._questions.add(digest)
        return bits

    def mark_slow(self) -> None:
        """Flag the slow rows, when all rows are known."""
        known = [time for time in self.times if isfinite(time)]
        if len(known) < _LEAST_TIMES:
            return
        low, middle, high = quantiles(known, n=4)
        limit = max(high + 3 * (high - low), 2 * middle)
        for n, time in enumerate(self.times):
            if time > limit:
                self.flags[n] |= _BITS["slow"]

    def count_flags(self) -> dict[str, int]:
        """Return the number of rows of each flag that occurs."""
        seen = [self.flags.count(bits) for bits in range(1 << len(FLAGS))]
        counts = {
            name: sum(count for bits, count in enumerate(seen) if bits & bit)
            for name, bit in _BITS.items()
        }
        return {name: count for name, count in counts.items() if count}

    def choose(self) -> tuple[list[int], list[str]]:
        """Choose the rows of the table; return their numbers, and in words what was chosen."""
        draw = random.Random(0)  # the same run gives the same page
        chosen, words = set[int](), list[str]()

        def add(rows: Sequence[int], most: int, what: str) -> None:
            part = rows if len(rows) <= most else sorted(draw.sample(rows, most))
            chosen.update(part)
            if part:
                kept = "all" if len(part) == len(rows) else f"{len(part):,} of"
                words.append(f"{kept} {len(rows):,} {what}")

        add([n for n, failed in enumerate(self.failed) if failed], _MOST_FAILED, "failed")
        add([n for n, bits in enumerate(self.flags) if bits], _MOST_FLAGGED, "flagged")
        ranked = sorted(
            (n for n, value in enumerate(self.values) if isfinite(value)),
            key=self.values.__getitem__,
        )
        if ranked:
            ends = {*ranked[:_MOST_ENDS], *ranked[-_MOST_ENDS:]}
            chosen |= ends
            words.append(f"the {_MOST_ENDS:,} lowest and highest by {self.rank}")
        others = [n for n in range(len(self)) if n not in chosen]
        sample = draw.sample(others, min(len(others), MOST_ROWS - len(chosen)))
        chosen.update(sample)
        words.append(f"a random sample of {len(sample):,} others")
        return sorted(chosen), words


def _to_number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else float("nan")  # type: ignore[arg-type]
    except OverflowError:
        return float("nan")


def is_repetitive(text: str) -> bool:
    """Return True if a long text repeats itself, judged by how far its end can be compressed."""
    if len(text) < _REPETITIVE_FROM:
        return False
    part = text[-_REPETITIVE_PART:].encode(errors="replace")
    return len(zlib.compress(part, 1)) < _REPETITIVE_SHARE * len(part)


def _texts(row: ResultRow) -> Iterator[str]:
    """Yield the long texts that the model wrote."""
    for name in ("reasoning", "raw"):
        if isinstance(text := row.get(name), str):
            yield text
    yield from _strings(row.get("output"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            if not isinstance(one, int | float):
                yield from _strings(one)
