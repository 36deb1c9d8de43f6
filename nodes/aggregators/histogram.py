"""Aggregator ``histogram``: counts of each value, or of each range of a number."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from typing import ClassVar, Final

from ...backends.core.errors import ConfigurationError
from ...backends.core.types import Json, Outcome
from .base import (
    Aggregator,
    State,
    add_counts,
    done_outcomes,
    finite_number,
    no_missing,
    pick_usable,
    show_missing,
    sum_counts,
    sum_missing,
    to_countable,
)

MAX_DISTINCT: Final = 1_000
"""Maximum number of different values, and of bins."""


@dataclass(frozen=True, slots=True)
class Histogram(Aggregator):
    """Counts of a value in the output.

    Without bins each value (text, boolean or number) is counted separately. With bins, numbers
    are counted by range: a bin includes its lower edge, and the last one its upper edge too.

    Attributes:
        field: Name of the field. Null, lists and objects count as missing.
        bins: Number of equal bins from ``low`` to ``high``, or the edges, or None.
        low: Lower end of the bins.
        high: Upper end of the bins.
        categories: Values to show even if they do not occur.
        edges: (bins + 1,) edges, computed from the others; empty without bins.
    """

    op: ClassVar[str] = "histogram"
    field: str
    bins: int | tuple[float, ...] | None = None
    low: float | None = None
    high: float | None = None
    categories: tuple[str | bool | int | float, ...] = ()
    edges: tuple[float, ...] = dataclasses.field(init=False, default=(), repr=False)

    def __post_init__(self) -> None:
        """Reject invalid bins, and compute the edges."""
        if isinstance(self.bins, int):
            low, high = self._range(self.bins)
            edges = _equal(low, high, self.bins)
            if not _is_rising(edges):
                raise self.parameter_error(
                    "high", f"above low ({low!r}) by more than rounding errors"
                )
        elif self.low is not None or self.high is not None:
            raise self.parameter_error("bins", "a number of bins, where low and high are given")
        else:
            edges = self.bins or ()
            if self.bins is not None and not (
                1 < len(edges) <= MAX_DISTINCT + 1 and _is_rising(edges)
            ):
                raise self.parameter_error(
                    "bins", f"from 2 to {MAX_DISTINCT + 1:,} rising, finite edges"
                )
        object.__setattr__(self, "edges", edges)

    def _range(self, bins: int) -> tuple[float, float]:
        if isinstance(bins, bool) or not 1 <= bins <= MAX_DISTINCT:
            raise self.parameter_error("bins", f"from 1 to {MAX_DISTINCT:,}")
        if self.low is None or not isfinite(self.low):
            raise self.parameter_error("low", "a number, where bins is a number of bins")
        if self.high is None or not isfinite(self.high):
            raise self.parameter_error("high", "a number, where bins is a number of bins")
        return self.low, self.high

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return {"of": self.to_spec(), "counts": {}, **no_missing(self.field)}

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state.

        Raises:
            ConfigurationError: Too many different values.
        """
        done = done_outcomes(outcomes)
        if self.bins is None:
            values, missing = pick_usable(self.field, done, to_countable)
            add_counts(state["counts"], _count_values(values))
            _check_distinct(state["counts"], self.field)
        else:
            numbers, missing = pick_usable(self.field, done, finite_number)
            add_counts(state["counts"], _count_bins(numbers, self.edges))
        add_counts(state, missing)

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both.

        Raises:
            ConfigurationError: Too many different values.
        """
        counts = sum_counts(a["counts"], b["counts"])
        if a["of"]["bins"] is None:
            _check_distinct(counts, a["of"]["field"])
        return {"of": a["of"], "counts": counts, **sum_missing(a, b)}

    def present(self, state: State) -> dict[str, Json]:
        """Return the counts: by bin, or by value (numbers rising, else the most frequent first)."""
        head = {"op": self.op, "field": self.field}
        counts, tail = state["counts"], show_missing(state)
        if self.bins is None:
            shown = [value for c in self.categories if (value := to_countable(c)) is not None]
            none = dict.fromkeys(map(_to_name, shown), 0)
            return head | {"counts": _rank_counts(none | counts)} | tail
        bins = [
            {"low": low, "high": high, "count": counts.get(str(n), 0)}
            for n, (low, high) in enumerate(pairwise(self.edges))
        ]
        outside = {"under": counts.get("under", 0), "over": counts.get("over", 0)}
        return head | {"bins": bins} | outside | tail


def _equal(low: float, high: float, bins: int) -> tuple[float, ...]:
    """Return the edges of equal bins, each correctly rounded."""
    start, width = Fraction(low), (Fraction(high) - Fraction(low)) / bins
    return tuple(float(start + n * width) for n in range(bins + 1))


def _is_rising(edges: Sequence[float]) -> bool:
    return all(isfinite(a) and isfinite(b) and a < b for a, b in pairwise(edges))


def _count_values(values: Sequence[Json]) -> dict[str, int]:
    # True == 1 in Python, so the key also says whether the value is a boolean.
    seen = Counter((isinstance(value, bool), value) for value in values)
    return {_to_name(value): count for (_, value), count in seen.items()}


def _to_name(value: Json) -> str:
    """Return the key of a value in the counts."""
    return json.dumps(value)


def _count_bins(values: Sequence[float], edges: Sequence[float]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for n, count in Counter(_find_bin(value, edges) for value in values).items():
        counts["under" if n < 0 else "over" if n > len(edges) - 2 else str(n)] = count
    return dict(counts)


def _find_bin(value: float, edges: Sequence[float]) -> int:
    n = bisect_right(edges, value) - 1
    return n - 1 if value == edges[-1] else n


def _check_distinct(counts: Mapping[str, int], field: str) -> None:
    if len(counts) > MAX_DISTINCT:
        raise ConfigurationError(
            f"reduce: histogram of '{field}' met more than {MAX_DISTINCT:,} different values; give "
            "the field an enum in the schema, or the histogram bins, low and high"
        )


def _rank_counts(counts: Mapping[str, int]) -> list[dict[str, Json]]:
    rows = [(json.loads(name), count, name) for name, count in counts.items()]
    if any(isinstance(value, str | bool) for value, _, _ in rows):
        rows.sort(key=lambda row: (-row[1], row[2]))
    else:
        rows.sort(key=lambda row: row[0])
    return [{"value": value, "count": count} for value, count, _ in rows]
