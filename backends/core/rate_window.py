"""Sliding window: bounds what is used within any interval of its length."""

from __future__ import annotations

import math
from typing import Final

_BINS: Final = 100
"""Parts of a window whose uses are summed: memory stays constant, and uses count 1 % longer."""

_LONGEST: Final = 1000
"""Windows for which an amount counts at most, if it exceeds the limit."""


class RateWindow:
    """Bounds what is used within any interval of a given length; pure, time is passed in.

    An amount is reserved at its upper estimate before it is used, and settled when the use is
    known. A service that counts in windows of its own never counts more than the limit, whenever
    its windows begin: what it counted within the length of a window has been settled since, or is
    still reserved.

    Args:
        limit: The most that may be used within the length of a window.
        window_s: That length in seconds.

    Attributes:
        limit: The same; it may change. Nothing may be used while it is 0.
        window_s: The same.
        reserved: What is reserved now.
    """

    __slots__ = ("_bin", "_bin_s", "_ends", "_used", "limit", "reserved", "window_s")

    def __init__(self, limit: float, window_s: float) -> None:
        self.limit = limit
        self.window_s = window_s
        self.reserved = 0
        self._bin_s = window_s / _BINS
        self._bin = -1
        self._used = 0
        self._ends: dict[int, int] = {}

    def has(self, amount: int, now: float, *, count_reserved: bool = True) -> bool:
        """Return True if an amount could be reserved now; one above the limit must be alone.

        Args:
            amount: How much.
            now: Monotonic time in seconds.
            count_reserved: Whether open reservations count.
        """
        self._expire(now)
        taken = self._used + (self.reserved if count_reserved else 0)
        return self.limit > 0 and (taken + amount <= self.limit or taken == 0)

    def due_s(self, amount: int, now: float, *, count_reserved: bool = True) -> float:
        """Return the seconds until an amount fits by time alone; infinite if it never does.

        Args:
            amount: How much.
            now: Monotonic time in seconds.
            count_reserved: Whether open reservations count.
        """
        self._expire(now)
        if self.limit <= 0:
            return math.inf
        taken = self._used + (self.reserved if count_reserved else 0)
        excess = taken + min(amount, self.limit) - self.limit
        if excess <= 0:
            return 0.0
        for end in sorted(self._ends):
            excess -= self._ends[end]
            if excess <= 0:
                return max(0.0, end * self._bin_s - now)
        return math.inf

    def reserve(self, amount: int) -> None:
        """Reserve an amount."""
        self.reserved += amount

    def settle(self, reserved: int, used: int, now: float) -> None:
        """Replace a reservation by what was used, now at the latest.

        What exceeds the limit counts for so much longer that the average holds.
        """
        self.reserved -= reserved
        if used <= 0:
            return
        self._expire(now)
        windows = min(max(1.0, used / self.limit), _LONGEST) if self.limit > 0 else 1.0
        end = self._bin + 1 + math.ceil(_BINS * windows)
        self._ends[end] = self._ends.get(end, 0) + used
        self._used += used

    def _expire(self, now: float) -> None:
        current = math.floor(now / self._bin_s)
        if current <= self._bin:
            return
        self._bin = current
        for end in [end for end in self._ends if end <= current]:
            self._used -= self._ends.pop(end)
