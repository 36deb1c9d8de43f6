"""Exact sums and quantile sketch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isqrt, ldexp
from typing import Final

from ...backends.core.types import Json
from .base import sum_counts

MANTISSA_BITS: Final = 53
"""Bits of a double's mantissa."""

PARTS: Final = 64
"""Buckets per octave."""

BUCKETS: Final = 128 * PARTS
"""Maximum number of buckets of one sign."""

_SHIFT: Final = MANTISSA_BITS - 7


def bucket_index(mantissa: int, exponent: int) -> int:
    """Return the bucket of a positive double.

    Args:
        mantissa: ``frexp``'s fraction times 2**53, so 53 bits long.
        exponent: ``frexp``'s exponent.
    """
    return exponent * PARTS + (mantissa >> _SHIFT) - PARTS


def merge_buckets(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of two sketches of one sign, bounded in number."""
    total = sum_counts(a, b)
    if len(total) <= BUCKETS:
        return total
    # Cutting early changes nothing: the final cut is at least as high.
    return {str(i): n for i, n in clip_buckets(total, max(map(int, total))).items()}


def clip_buckets(counts: Mapping[str, int], top: int) -> dict[int, int]:
    """Return the counts by bucket, those too far below bucket ``top`` in the lowest."""
    lowest, result = top - BUCKETS + 1, dict[int, int]()
    for name, count in counts.items():
        index = max(int(name), lowest)
        result[index] = result.get(index, 0) + count
    return result


def quantiles(
    negative: Mapping[str, int], zeros: int, positive: Mapping[str, int], at: Sequence[float]
) -> list[float]:
    """Return quantiles by nearest rank: the value of rank floor(q * (n - 1)), from 0.

    Args:
        negative: Counts of negative values by the bucket of their magnitude; not all are empty.
        zeros: Count of zeros.
        positive: Counts of positive values by bucket.
        at: (k,) the q, each in [0, 1].

    Returns:
        (k,) values, each within 1 % of the exact one.
    """
    total = sum(negative.values()) + zeros + sum(positive.values())
    ranks = [(floor(q * (total - 1)), n) for n, q in enumerate(at)]
    found, values, below = [0.0] * len(at), _ascending(negative, zeros, positive), 0
    value = 0.0
    for rank, n in sorted(ranks):
        while below <= rank:
            value, count = next(values)
            below += count
        found[n] = value
    return found


def _ascending(
    negative: Mapping[str, int], zeros: int, positive: Mapping[str, int]
) -> Iterator[tuple[float, int]]:
    top = max((int(name) for name in (*negative, *positive)), default=0)
    for index, count in sorted(clip_buckets(negative, top).items(), reverse=True):
        yield -_middle(index), count
    yield 0.0, zeros
    for index, count in sorted(clip_buckets(positive, top).items()):
        yield _middle(index), count


def _middle(index: int) -> float:
    """Return the value with the least worst relative error: 2ab / (a + b) of the two edges."""
    exponent, part = divmod(index, PARTS)
    low, high = PARTS + part, PARTS + part + 1
    return ldexp(2 * low * high / ((low + high) * 2 * PARTS), exponent)


@dataclass(frozen=True, slots=True)
class ExactSum:
    """The number n * 2**e."""

    n: int = 0
    e: int = 0

    @classmethod
    def from_json(cls, written: Json) -> ExactSum:
        """Return the number that ``write`` wrote."""
        return cls(int(written[0], 16), written[1])

    def to_json(self) -> list[Json]:
        """Return the number as JSON, the same for equal numbers."""
        if self.n == 0:
            return ["0", 0]
        zeros = (self.n & -self.n).bit_length() - 1
        return [format(self.n >> zeros, "x"), self.e + zeros]

    def __add__(self, other: ExactSum) -> ExactSum:
        """Add exactly."""
        if self.e > other.e:
            return ExactSum(other.n + (self.n << (self.e - other.e)), other.e)
        return ExactSum(self.n + (other.n << (other.e - self.e)), self.e)


def mean(total: ExactSum, count: int) -> float:
    """Return total / count, correctly rounded.

    Args:
        total: Sum of the values.
        count: How many, at least 1.
    """
    if total.e >= 0:
        return (total.n << total.e) / count
    return total.n / (count << -total.e)


def sample_sd(total: ExactSum, squares: ExactSum, count: int) -> float | None:
    """Return the sample standard deviation, correctly rounded.

    sd**2 = (count * squares - total**2) / (count * (count - 1)), all in integers.

    Args:
        total: Sum of the values.
        squares: Sum of their squares.
        count: How many.

    Returns:
        None for fewer than two values, and where the result exceeds the range of doubles.
    """
    if count <= 1:
        return None
    spread = ExactSum(count * squares.n, squares.e) + ExactSum(-total.n * total.n, 2 * total.e)
    try:
        return _root(spread, count * (count - 1))
    except OverflowError:
        return None


def _root(square: ExactSum, divisor: int) -> float:
    """Return sqrt(square / divisor), rounded once: the root has 64 bits and a sticky last one."""
    if square.n == 0:
        return 0.0
    shift = 128 + divisor.bit_length() - square.n.bit_length()
    shift += (square.e - shift) % 2
    scaled = square.n << shift if shift >= 0 else square.n
    scale = divisor if shift >= 0 else divisor << -shift
    quotient, rest = divmod(scaled, scale)
    root = isqrt(quotient)
    sticky = rest or root * root != quotient
    return ldexp((root << 1) | bool(sticky), (square.e - shift) // 2 - 1)
