"""Aggregator ``stats``: mean, standard deviation, extremes and quantiles of a number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import frexp, ldexp
from typing import ClassVar, Final

from ...backends.core.types import Json, Outcome
from . import numeric
from .base import (
    Aggregator,
    State,
    done_outcomes,
    finite_number,
    pick_usable,
    show_missing,
    sum_missing,
)
from .numeric import ExactSum, mean, sample_sd

_SCALE: Final = ldexp(1.0, numeric.MANTISSA_BITS)


@dataclass(frozen=True, slots=True)
class Stats(Aggregator):
    """Statistics of a number in the output, taken as a double.

    Mean and standard deviation are exact except for one rounding; quantiles are within 1 %.

    Attributes:
        field: Name of the field. A value that is not a finite number counts as missing; in the
            elements of a list, an item without such a number does.
        quantiles: Which quantiles, each in [0, 1].
    """

    op: ClassVar[str] = "stats"
    field: str
    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __post_init__(self) -> None:
        """Reject quantiles outside [0, 1]."""
        if not all(0 <= q <= 1 for q in self.quantiles):
            raise self.parameter_error("quantiles", "numbers from 0 to 1")

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return self.lift(())

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        found, missing = pick_usable(self.field, done_outcomes(outcomes), finite_number)
        # Adding 0.0 turns -0.0 into 0.0; otherwise the order decides which one is the minimum.
        values = [value + 0.0 for value in found]
        return {
            "of": self.to_spec(),
            "count": len(values),
            **missing,
            "min": min(values, default=None),
            "max": max(values, default=None),
            **_sums(values),
        }

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        return {
            "of": a["of"],
            "min": min(_drop_none(a["min"], b["min"]), default=None),
            "max": max(_drop_none(a["max"], b["max"]), default=None),
            **{name: a[name] + b[name] for name in ("count", "zeros")},
            **sum_missing(a, b),
            **{
                n: (ExactSum.from_json(a[n]) + ExactSum.from_json(b[n])).to_json()
                for n in ("sum", "squares")
            },
            **{n: numeric.merge_buckets(a[n], b[n]) for n in ("negative", "positive")},
        }

    def present(self, state: State) -> dict[str, Json]:
        """Return the statistics, None where there are too few values for one."""
        count, total = state["count"], ExactSum.from_json(state["sum"])
        return {
            "op": self.op,
            "field": self.field,
            "count": count,
            **show_missing(state),
            "mean": mean(total, count) if count else None,
            "sd": sample_sd(total, ExactSum.from_json(state["squares"]), count),
            "min": state["min"],
            "max": state["max"],
            "quantiles": self._quantiles(state),
            "note": "quantiles within 1 %",
        }

    def _quantiles(self, state: State) -> dict[str, float | None]:
        names = [str(q) for q in self.quantiles]
        if not state["count"]:
            return dict.fromkeys(names)
        low, high = state["min"], state["max"]
        found = numeric.quantiles(
            state["negative"], state["zeros"], state["positive"], self.quantiles
        )
        return {name: min(max(q, low), high) for name, q in zip(names, found, strict=True)}


def _sums(values: Iterable[float]) -> State:
    """Return exact sums and bucket counts; one pass, as it runs for every item."""
    sums: defaultdict[int, int] = defaultdict(int)
    squares: defaultdict[int, int] = defaultdict(int)
    buckets: tuple[defaultdict[int, int], ...] = (defaultdict(int), defaultdict(int))
    zeros = 0
    for value in values:
        fraction, exponent = frexp(value)
        n = int(fraction * _SCALE)
        if n:
            sums[exponent] += n
            squares[2 * exponent] += n * n
            buckets[n > 0][numeric.bucket_index(abs(n), exponent)] += 1
        else:
            zeros += 1
    total, square = ExactSum.from_parts(sums), ExactSum.from_parts(squares)
    return {
        "sum": ExactSum(total.n, total.e - numeric.MANTISSA_BITS).to_json(),
        "squares": ExactSum(square.n, square.e - 2 * numeric.MANTISSA_BITS).to_json(),
        "negative": {str(index): count for index, count in buckets[False].items()},
        "zeros": zeros,
        "positive": {str(index): count for index, count in buckets[True].items()},
    }


def _drop_none(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]
