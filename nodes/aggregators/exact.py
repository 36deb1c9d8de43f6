"""Sums of doubles without rounding.

A double is an integer times a power of two, so a sum of doubles is one too. Kept as such it is
associative, which floating-point addition is not; rounding happens once, when it is presented.
A sum is written ``[n, e]`` for n * 2**e, n as hexadecimal text and odd or zero. Its size is
bounded by the range of doubles: some 540 digits, 1,080 for squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, ldexp

from ...backends.core.types import Json


@dataclass(frozen=True, slots=True)
class Exact:
    """The number n * 2**e."""

    n: int = 0
    e: int = 0

    @classmethod
    def of(cls, parts: Mapping[int, int]) -> Exact:
        """Return the sum of ``n * 2**e`` over the pairs e: n."""
        if not parts:
            return cls()
        least = min(parts)
        return cls(sum(n << (e - least) for e, n in parts.items()), least)

    @classmethod
    def read(cls, written: Json) -> Exact:
        """Return the number that ``write`` wrote."""
        return cls(int(written[0], 16), written[1])

    def write(self) -> list[Json]:
        """Return the number as JSON, the same for equal numbers."""
        if self.n == 0:
            return ["0", 0]
        zeros = (self.n & -self.n).bit_length() - 1
        return [format(self.n >> zeros, "x"), self.e + zeros]

    def __add__(self, other: Exact) -> Exact:
        """Add exactly."""
        if self.e > other.e:
            return Exact(other.n + (self.n << (self.e - other.e)), other.e)
        return Exact(self.n + (other.n << (other.e - self.e)), self.e)


def mean(total: Exact, count: int) -> float:
    """Return total / count, correctly rounded.

    Args:
        total: Sum of the values.
        count: How many, at least 1.
    """
    if total.e >= 0:
        return (total.n << total.e) / count
    return total.n / (count << -total.e)


def sample_sd(total: Exact, squares: Exact, count: int) -> float | None:
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
    spread = Exact(count * squares.n, squares.e) + Exact(-total.n * total.n, 2 * total.e)
    try:
        return _root(spread, count * (count - 1))
    except OverflowError:
        return None


def _root(square: Exact, divisor: int) -> float:
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
