"""Agreement of two values per item: labels or numbers, each figure with a 95 % interval.

Wilson's interval is used for shares (Wilson 1927, doi:10.2307/2276774), the standard error of
Bonett and Wright for Spearman's correlation (2000, doi:10.1007/BF02294183), and percentiles of a
bootstrap over items with a fixed seed for all others (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Method: TypeAlias = Literal["wilson", "bootstrap", "fisher"]

_Z: Final = 1.959963984540054
"""Quantile of the normal distribution for 95 %."""
_SEED: Final = 20_250_101
_REPLICATES: Final = 1_000
_GROUPS: Final = 2_000
"""Items, or random groups of items if there are more, that a bootstrap draws."""
_CELLS: Final = 4_000_000
"""Numbers that a bootstrap holds in memory at a time."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its 95 % interval; None where it is not defined.

    Attributes:
        value: The figure.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of items that it is computed from.
        method: How the interval is computed.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: Method

    def to_json(self) -> dict[str, Any]:
        """Return the figure as plain data."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "method": self.method,
        }


def share(count: int, n: int) -> Figure:
    """Return a share of items with Wilson's interval.

    Args:
        count: Items that count.
        n: All items.
    """
    if not n:
        return Figure(None, None, None, 0, "wilson")
    p, z2 = count / n, _Z * _Z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if count == 0 else max(0.0, center - half)
    high = 1.0 if count == n else min(1.0, center + half)
    return Figure(p, low, high, n, "wilson")


@dataclass(frozen=True, slots=True)
class LabelPairs:
    """Two labels per item, counted: the cells of the confusion matrix that are not zero.

    Attributes:
        size: Number of labels.
        rows: First label of each cell, as a number from 0.
        columns: Its second label.
        counts: Its items.
    """

    size: int
    rows: Integers
    columns: Integers
    counts: Integers

    @classmethod
    def count(cls, first: Integers, second: Integers, size: int) -> LabelPairs:
        """Count the pairs of labels.

        Args:
            first: The first label of each item, as a number from 0.
            second: Its second label.
            size: Number of labels.
        """
        cells, counts = np.unique(first * size + second, return_counts=True)
        return cls(size, cells // max(size, 1), cells % max(size, 1), counts.astype(np.int64))

    @property
    def n(self) -> int:
        """Return the number of items."""
        return int(self.counts.sum())

    def matrix(self) -> Integers:
        """Return the whole matrix."""
        found = np.zeros((self.size, self.size), np.int64)
        found[self.rows, self.columns] = self.counts
        return found

    def sums(self) -> tuple[Integers, Integers, Integers]:
        """Return, by label, the items with the same label twice, with it first, and second."""
        first, second = (
            np.bincount(index, self.counts, self.size).astype(np.int64)
            for index in (self.rows, self.columns)
        )
        return np.diagonal(self.matrix()), first, second


_Sums: TypeAlias = tuple[Floats, Floats, Floats]
"""By replicate and label: items with the same label twice, with it first, with it second."""


def compare_labels(pairs: LabelPairs) -> dict[str, Figure]:
    """Return accuracy, averages of precision, recall and F1, Cohen's kappa, Krippendorff's alpha.

    The averages are those of scikit-learn with ``zero_division=0``: over all labels that occur
    first or second, ``macro`` with equal weights, ``weighted`` by the first labels.

    Args:
        pairs: The right label of each item first, and its answer second.
    """
    figures = {"accuracy": share(int(pairs.sums()[0].sum()), pairs.n)}
    return figures | _bootstrap_labels(pairs, _average_scores)


def agree_on_labels(pairs: LabelPairs) -> dict[str, Figure]:
    """Return the share of equal labels, Cohen's kappa and Krippendorff's alpha."""
    figures = {"agreement": share(int(pairs.sums()[0].sum()), pairs.n)}
    return figures | _bootstrap_labels(pairs, _chance_corrected)


def f1_scores(pairs: LabelPairs) -> list[Figure]:
    """Return the F1 of each label; it is not defined for labels that never occur."""
    names = [str(label) for label in range(pairs.size)]

    def scores(sums: _Sums) -> Iterator[tuple[str, Floats]]:
        yield from zip(names, _f1(sums).T, strict=True)

    found = _bootstrap_labels(pairs, scores)
    return [found[name] for name in names]


def _f1(sums: _Sums) -> Floats:
    hits, first, second = sums
    return _divide(2 * hits, first + second)


def _average_scores(sums: _Sums) -> Iterator[tuple[str, Floats]]:
    hits, first, second = sums
    occurs = (first + second) > 0
    scores = {
        "precision": _divide(hits, second),
        "recall": _divide(hits, first),
        "f1": _f1(sums),
    }
    for kind, weights in (("macro", occurs.astype(np.float64)), ("weighted", first)):
        for name, found in scores.items():
            total = (np.nan_to_num(found) * weights).sum(axis=1)
            yield f"{name}_{kind}", _divide(total, weights.sum(axis=1))
    yield from _chance_corrected(sums)


def _chance_corrected(sums: _Sums) -> Iterator[tuple[str, Floats]]:
    hits, first, second = sums
    n = first.sum(axis=1)
    agreed = _divide(hits.sum(axis=1), n)
    expected = _divide((first * second).sum(axis=1), n * n)
    yield "kappa", _divide(agreed - expected, 1 - expected)
    both = first + second
    by_chance = _divide((both * (both - 1)).sum(axis=1), 2 * n * (2 * n - 1))
    yield "alpha", 1 - _divide(1 - agreed, 1 - by_chance)


def _divide(a: Floats, b: Floats) -> Floats:
    """Return quotients; NaN where the divisor is zero."""
    with np.errstate(all="ignore"):
        return np.where(b == 0, np.nan, a / np.where(b == 0, 1.0, b))


def _bootstrap_labels(
    pairs: LabelPairs, compute: Callable[[_Sums], Iterator[tuple[str, Floats]]]
) -> dict[str, Figure]:
    n = pairs.n
    if not n:
        return {
            name: Figure(None, None, None, 0, "bootstrap")
            for name, _ in compute(_sum_labels(pairs, np.zeros((1, 0))))
        }
    values = {k: float(v[0]) for k, v in compute(_sum_labels(pairs, pairs.counts[None, :]))}
    drawn: dict[str, list[Floats]] = {name: [] for name in values}
    generator = np.random.default_rng(_SEED)
    for some in _split(len(pairs.counts) + 3 * pairs.size):
        counts = generator.multinomial(n, pairs.counts / n, size=some)
        for name, found in compute(_sum_labels(pairs, counts)):
            drawn[name].append(found)
    return {
        name: _make_figure(value, np.concatenate(drawn[name]), n) for name, value in values.items()
    }


def _sum_labels(pairs: LabelPairs, counts: npt.NDArray[Any]) -> _Sums:
    equal = pairs.rows == pairs.columns
    return (
        _sum_by(pairs.rows[equal], counts[:, equal], pairs.size),
        _sum_by(pairs.rows, counts, pairs.size),
        _sum_by(pairs.columns, counts, pairs.size),
    )


def _sum_by(index: Integers, counts: npt.NDArray[Any], size: int) -> Floats:
    found = np.zeros((len(counts), size))
    order = np.argsort(index, kind="stable")
    present, starts = np.unique(index[order], return_index=True)
    if len(present):
        found[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return found


def _split(width: int) -> Iterator[int]:
    """Yield numbers of replicates whose rows of this width fit into memory together."""
    left, most = _REPLICATES, max(1, _CELLS // max(1, width))
    while left > 0:
        yield min(left, most)
        left -= most


def _make_figure(value: float, drawn: Floats, n: int) -> Figure:
    """Return a figure with percentiles; without an interval if most replicates have no value."""
    known = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or n < 2 or 2 * len(known) < len(drawn):  # noqa: PLR2004
        return Figure(value if math.isfinite(value) else None, None, None, n, "bootstrap")
    low, high = np.percentile(known, [2.5, 97.5])
    return Figure(value, float(low), float(high), n, "bootstrap")


def compare_numbers(first: Floats, second: Floats) -> dict[str, Figure]:
    """Return mean absolute error, root of the mean squared error, Spearman's rho, and alpha.

    Alpha is Krippendorff's for interval data.

    Args:
        first: The first number of each item.
        second: Its second number.
    """
    n = len(first)
    if not n:
        figures = {
            name: Figure(None, None, None, 0, "bootstrap") for name in ("mae", "rmse", "alpha")
        }
        return figures | {"spearman": Figure(None, None, None, 0, "fisher")}
    with np.errstate(all="ignore"):
        center = (float(first.mean()) + float(second.mean())) / 2
        a, b = first - center, second - center
        columns = np.stack([np.ones(n), np.abs(a - b), (a - b) ** 2, a + b, a * a + b * b], axis=1)
        figures = bootstrap_sums(columns, _number_scores, n)
    return figures | {"spearman": correlate_ranks(first, second)}


def _number_scores(sums: Floats) -> Mapping[str, Floats]:
    n, absolute, squared, total, squares = sums.T
    spread = (squares - total * total / (2 * n)) / (2 * n - 1)
    return {
        "mae": absolute / n,
        "rmse": np.sqrt(squared / n),
        "alpha": 1 - _divide(squared / n, 2 * spread),
    }


def mean_difference(first: Floats, second: Floats) -> Figure:
    """Return the mean of the differences of two values per item (first minus second)."""
    n = len(first)
    if not n:
        return Figure(None, None, None, 0, "bootstrap")
    columns = np.stack([np.ones(n), first - second], axis=1)
    found = bootstrap_sums(columns, lambda sums: {"mean": sums[:, 1] / sums[:, 0]}, n)
    return found["mean"]


def bootstrap_sums(
    columns: Floats, compute: Callable[[Floats], Mapping[str, Floats]], n: int
) -> dict[str, Figure]:
    """Return figures that depend on sums over items, with their intervals.

    Many items are first summed in random groups of equal size, which are drawn in their place: for
    sums, the groups vary as the items do.

    Args:
        columns: The values to sum, a row per item.
        compute: Returns the figures of sums, a row per replicate.
        n: Number of items.
    """
    generator = np.random.default_rng(_SEED)
    values = {name: float(v[0]) for name, v in compute(columns.sum(axis=0)[None, :]).items()}
    if n > _GROUPS:
        shuffled = columns[generator.permutation(n)]
        columns = np.add.reduceat(shuffled, np.arange(_GROUPS) * n // _GROUPS, axis=0)
    drawn: dict[str, list[Floats]] = {name: [] for name in values}
    size = len(columns)
    for some in _split(size * (columns.shape[1] + 1)):
        chosen = generator.integers(0, size, (some, size))
        for name, found in compute(columns[chosen].sum(axis=1)).items():
            drawn[name].append(found)
    return {
        name: _make_figure(value, np.concatenate(drawn[name]), n) for name, value in values.items()
    }


def correlate_ranks(first: Floats, second: Floats) -> Figure:
    """Return Spearman's rank correlation; ties have their mean rank."""
    n = len(first)
    a, b = (ranks - (n + 1) / 2 for ranks in (_rank(first), _rank(second)))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    if n < 2 or spread == 0:  # noqa: PLR2004
        return Figure(None, None, None, n, "fisher")
    rho = max(-1.0, min(1.0, float(a @ b) / spread))
    if n < 4:  # noqa: PLR2004 - the standard error needs four items
        return Figure(rho, None, None, n, "fisher")
    if abs(rho) > 1 - 1e-12:
        return Figure(rho, rho, rho, n, "fisher")
    half = _Z * math.sqrt((1 + rho * rho / 2) / (n - 3))
    z = math.atanh(rho)
    return Figure(rho, math.tanh(z - half), math.tanh(z + half), n, "fisher")


def _rank(values: Floats) -> Floats:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[index]
    return ranks


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p value of McNemar's exact test.

    Args:
        only_first: Items that only the first run has right.
        only_second: Items that only the second run has right.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if not n:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    most = max(logs)
    tail = math.exp(most) * math.fsum(math.exp(one - most) for one in logs)
    return min(1.0, 2 * tail)
