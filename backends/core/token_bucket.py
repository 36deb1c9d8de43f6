"""Token bucket: spreads requests or tokens over time."""

from __future__ import annotations

from typing import Final, Self

_MINUTE_S: Final = 60.0


class TokenBucket:
    """Spreads amounts over time; pure, time is passed in.

    Args:
        per_s: Amount added per second.
        burst: Most that can accumulate; one second's worth by default.
    """

    __slots__ = ("_burst", "_level", "_per_s", "_seen")

    def __init__(self, per_s: float, burst: float | None = None) -> None:
        self._per_s = per_s
        self._burst = burst if burst is not None else max(1.0, per_s)
        self._level = self._burst
        self._seen: float | None = None

    @classmethod
    def per_minute(cls, amount: float) -> Self:
        """Build a bucket that holds a minute's worth."""
        return cls(amount / _MINUTE_S, amount)

    def has(self, amount: float, now: float) -> bool:
        """Return True if an amount could be taken at once."""
        self._refill(now)
        return self._level >= amount

    def take(self, amount: float, now: float, reserve: float = 0.0) -> float:
        """Take an amount, at once or on credit.

        Args:
            amount: How much.
            now: Monotonic time in seconds.
            reserve: Amount that must be available when the wait is over.

        Returns:
            Seconds to wait until it is available; later callers wait longer.
        """
        self._refill(now)
        self._level -= amount
        return max(0.0, (reserve - self._level) / self._per_s)

    def _refill(self, now: float) -> None:
        if self._seen is not None:
            self._level = min(self._burst, self._level + (now - self._seen) * self._per_s)
        self._seen = now

    def refund(self, amount: float) -> None:
        """Return an unused amount; a negative amount takes more."""
        self._level = min(self._burst, self._level + amount)
