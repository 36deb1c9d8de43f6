"""Token bucket: spreads requests over time."""

from __future__ import annotations

from typing import Final

_ROUNDING: Final = 1e-9


class TokenBucket:
    """Spreads amounts over time; pure, time is passed in.

    Args:
        per_s: Amount added per second.
        burst: Most that can accumulate; one second's worth by default.
        level: Amount at the beginning; the burst by default.

    Attributes:
        per_s: Amount added per second; it may change.
        burst: Most that can accumulate; it may change.
    """

    __slots__ = ("_level", "_seen", "burst", "per_s")

    def __init__(
        self, per_s: float, burst: float | None = None, level: float | None = None
    ) -> None:
        self.per_s = per_s
        self.burst = burst if burst is not None else max(1.0, per_s)
        self._level = level if level is not None else self.burst
        self._seen: float | None = None

    def due_s(self, amount: float, now: float) -> float:
        """Return the seconds until an amount can be taken without credit; infinite if never."""
        self._refill(now)
        short = amount - self._level - _ROUNDING
        if short <= 0:
            return 0.0
        return short / self.per_s if self.per_s > 0 else float("inf")

    def take(self, amount: float, now: float) -> float:
        """Take an amount, at once or on credit.

        Args:
            amount: How much.
            now: Monotonic time in seconds.

        Returns:
            Seconds to wait until it is available; later callers wait longer.
        """
        self._refill(now)
        self._level -= amount
        return max(0.0, -self._level / self.per_s)

    def _refill(self, now: float) -> None:
        if self._seen is not None:
            self._level = min(self.burst, self._level + (now - self._seen) * self.per_s)
        self._seen = now

    def refund(self, amount: float) -> None:
        """Return an unused amount."""
        self._level = min(self.burst, self._level + amount)
