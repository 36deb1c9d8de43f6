"""Quantiles of a stream within 1 %, by counts in logarithmic buckets.

The sketch is DDSketch (Masson, Rim and Lee 2019, doi:10.14778/3352063.3352135) with buckets read
off the double's own bits: every octave is cut into 64 equal parts, so that a bucket's middle is
within 1/129 of all that falls in it, and no logarithm is taken that might differ between two
machines. Buckets lie at most 128 octaves below the largest magnitude; what is smaller shares the
lowest bucket. The cut depends on the largest magnitude alone, so the order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor, ldexp
from typing import Final

from .base import tally

MANTISSA_BITS: Final = 53
"""Of a double."""

PARTS: Final = 64
"""Buckets per octave."""

BUCKETS: Final = 128 * PARTS
"""Most buckets of one sign."""

_SHIFT: Final = MANTISSA_BITS - 7


def bucket(mantissa: int, exponent: int) -> int:
    """Return the bucket of a positive double.

    Args:
        mantissa: ``frexp``'s fraction times 2**53, so 53 bits long.
        exponent: ``frexp``'s exponent.
    """
    return exponent * PARTS + (mantissa >> _SHIFT) - PARTS


def merge(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of two sketches of one sign, bounded in number."""
    total = tally(a, b)
    if len(total) <= BUCKETS:
        return total
    # Cutting early changes nothing: the final cut is at least as high.
    return {str(i): n for i, n in cut(total, max(map(int, total))).items()}


def cut(counts: Mapping[str, int], top: int) -> dict[int, int]:
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
    ranks = [(floor(q * (total - 1)), place) for place, q in enumerate(at)]
    found, values, below = [0.0] * len(at), _ascending(negative, zeros, positive), 0
    value = 0.0
    for rank, place in sorted(ranks):
        while below <= rank:
            value, count = next(values)
            below += count
        found[place] = value
    return found


def _ascending(
    negative: Mapping[str, int], zeros: int, positive: Mapping[str, int]
) -> Iterator[tuple[float, int]]:
    top = max((int(name) for name in (*negative, *positive)), default=0)
    for index, count in sorted(cut(negative, top).items(), reverse=True):
        yield -_middle(index), count
    yield 0.0, zeros
    for index, count in sorted(cut(positive, top).items()):
        yield _middle(index), count


def _middle(index: int) -> float:
    """Return the value with the least worst relative error: 2ab / (a + b) of the two edges."""
    exponent, part = divmod(index, PARTS)
    low, high = PARTS + part, PARTS + part + 1
    return ldexp(2 * low * high / ((low + high) * 2 * PARTS), exponent)
