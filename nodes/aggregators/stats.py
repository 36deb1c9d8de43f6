"""Aggregator ``stats``: mean, standard deviation, extremes and quantiles of a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import frexp, ldexp
from typing import ClassVar, Final

from ...backends.core.types import Json, Outcome
from . import numeric
from .base import (
    Aggregator,
    State,
    add_counts,
    done_outcomes,
    finite_number,
    no_missing,
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
        return {
            "of": self.to_spec(),
            "count": 0,
            **no_missing(self.field),
            "min": None,
            "max": None,
            "sum": ExactSum().to_json(),
            "squares": ExactSum().to_json(),
            "negative": {},
            "zeros": 0,
            "positive": {},
        }

    def add(self, state: State, outcomes: Sequence[Outcome]) -> None:
        """Add a batch of outcomes to a state."""
        found, missing = pick_usable(self.field, done_outcomes(outcomes), finite_number)
        add_counts(state, missing)
        if not found:
            return
        # Adding 0.0 turns -0.0 into 0.0; otherwise the order decides which one is the minimum.
        values = [value + 0.0 for value in found]
        least, most = state["min"], state["max"]
        state["count"] += len(values)
        state["min"] = min(values) if least is None else min(least, *values)
        state["max"] = max(values) if most is None else max(most, *values)
        _add_values(state, values)

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


def _add_values(state: State, values: Iterable[float]) -> None:
    """Add exact sums and bucket counts; one pass, as it runs for every item."""
    total, squares = ExactSum.from_json(state["sum"]), ExactSum.from_json(state["squares"])
    n, e, nn, ee = total.n, total.e, squares.n, squares.e
    negative, positive = state["negative"], state["positive"]
    for value in values:
        fraction, exponent = frexp(value)
        mantissa = int(fraction * _SCALE)
        if not mantissa:
            state["zeros"] += 1
            continue
        counts = positive if mantissa > 0 else negative
        bucket = str(numeric.bucket_index(abs(mantissa), exponent))
        counts[bucket] = counts.get(bucket, 0) + 1
        exponent -= numeric.MANTISSA_BITS
        # n * 2**e and nn * 2**ee, with the least exponent so far
        if exponent < e:
            n, e = n << (e - exponent), exponent
        n += mantissa << (exponent - e)
        if 2 * exponent < ee:
            nn, ee = nn << (ee - 2 * exponent), 2 * exponent
        nn += mantissa * mantissa << (2 * exponent - ee)
    state["sum"], state["squares"] = ExactSum(n, e).to_json(), ExactSum(nn, ee).to_json()
    for name, counts in (("negative", negative), ("positive", positive)):
        if len(counts) > numeric.BUCKETS:
            state[name] = numeric.merge_buckets(counts, {})


def _drop_none(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]
