"""Figures that are not known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

_SIGMAS: Final = 2.0
"""Standard errors to either side: about 95 of 100 such ranges hold the true mean."""


@dataclass(frozen=True, slots=True)
class Span:
    """A figure with its range.

    Attributes:
        low: The least that it may be.
        likely: The best guess.
        high: The most that it may be.
    """

    low: float
    likely: float
    high: float

    @classmethod
    def of(cls, value: float) -> Self:
        """Return a figure that is known."""
        return cls(value, value, value)

    @classmethod
    def mean(cls, values: Sequence[float], total: int) -> Self:
        """Return the mean over all of a population by a sample of it.

        Args:
            values: The sample; empty means 0.
            total: How large the population is; a sample that is all of it is exact.
        """
        count = len(values)
        if not count:
            return cls.of(0.0)
        mean = math.fsum(values) / count
        if count >= total:
            return cls.of(mean)
        if count == 1:
            return cls(0.0, mean, 2 * mean)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        left = (total - count) / max(1, total - 1)
        error = _SIGMAS * math.sqrt(variance / count * left)
        return cls(max(0.0, mean - error), mean, mean + error)

    def map(self, change: Callable[[float], float]) -> Self:
        """Return the same under a function that does not fall."""
        return type(self)(change(self.low), change(self.likely), change(self.high))

    def __add__(self, other: Span) -> Span:
        """Add two figures."""
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, other: Span) -> Span:
        """Multiply two figures, neither below 0."""
        return Span(self.low * other.low, self.likely * other.likely, self.high * other.high)

    def most(self, other: Span) -> Span:
        """Return the larger of each."""
        return Span(
            max(self.low, other.low), max(self.likely, other.likely), max(self.high, other.high)
        )

    def to_json(self, digits: int | None = 0) -> dict[str, float]:
        """Return it as plain data, rounded; to whole numbers with 0 digits."""
        figures = {"low": self.low, "likely": self.likely, "high": self.high}
        if digits == 0:
            return {name: round(value) for name, value in figures.items()}
        return {name: round(value, digits) for name, value in figures.items()}
