"""Token buckets against services with a quota."""

from __future__ import annotations


class Bucket:
    """Spreads amounts over time; pure, time is passed in.

    Args:
        per_s: Amount that flows in per second.
        burst: Most that can be saved up; one second's worth by default.
    """

    __slots__ = ("_burst", "_level", "_per_s", "_seen")

    def __init__(self, per_s: float, burst: float | None = None) -> None:
        self._per_s = per_s
        self._burst = burst if burst is not None else max(1.0, per_s)
        self._level = self._burst
        self._seen: float | None = None

    def take(self, amount: float, now: float) -> float:
        """Take an amount, at once or on credit.

        Returns:
            Seconds to wait until it has flowed in; callers that come later wait longer.
        """
        if self._seen is not None:
            self._level = min(self._burst, self._level + (now - self._seen) * self._per_s)
        self._seen = now
        self._level -= amount
        return max(0.0, -self._level / self._per_s)

    def refund(self, amount: float) -> None:
        """Put back what was taken but not used; a negative amount takes more."""
        self._level = min(self._burst, self._level + amount)
