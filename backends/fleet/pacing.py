"""Token buckets against services with a quota."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Final, Self

from .policy import PacePolicy

_BYTES_PER_TOKEN: Final = 4
_MINUTE_S: Final = 60.0


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

    @classmethod
    def per_minute(cls, amount: float) -> Self:
        """Build a bucket that holds a minute's worth."""
        return cls(amount / _MINUTE_S, amount)

    def has(self, amount: float, now: float) -> bool:
        """Tell whether an amount could be taken at once."""
        self._flow(now)
        return self._level >= amount

    def take(self, amount: float, now: float, reserve: float = 0.0) -> float:
        """Take an amount, at once or on credit.

        Args:
            amount: How much.
            now: Monotonic time in seconds.
            reserve: What shall be there when the wait is over.

        Returns:
            Seconds to wait until it has flowed in; callers that come later wait longer.
        """
        self._flow(now)
        self._level -= amount
        return max(0.0, (reserve - self._level) / self._per_s)

    def _flow(self, now: float) -> None:
        if self._seen is not None:
            self._level = min(self._burst, self._level + (now - self._seen) * self._per_s)
        self._seen = now

    def refund(self, amount: float) -> None:
        """Put back what was taken but not used; a negative amount takes more."""
        self._level = min(self._burst, self._level + amount)


class Pacer:
    """Holds a whole process to its quotas of requests and tokens.

    Tokens are reserved before a request is sent, by an estimate, and settled when its answer
    has come: a service that counts them only afterwards would let a burst overshoot. The loops
    of several threads may share one.

    Args:
        policy: The quotas.
        clock: Monotonic time in seconds.
    """

    def __init__(self, policy: PacePolicy, clock: Callable[[], float] = time.monotonic) -> None:
        per_s, burst = policy.requests_per_s, policy.burst
        self._requests = Bucket(per_s, burst) if per_s else None
        per_min = policy.tokens_per_min
        self._tokens = Bucket.per_minute(per_min) if per_min else None
        self._clock = clock
        self._lock = Lock()

    def admit(self, tokens: int) -> float:
        """Reserve one request of so many tokens; return the seconds to wait first."""
        with self._lock:
            now, waits = self._clock(), [0.0]
            if self._requests is not None:
                waits.append(self._requests.take(1.0, now))
            if self._tokens is not None:
                waits.append(self._tokens.take(tokens, now))
            return max(waits)

    def spare(self, tokens: int) -> bool:
        """Reserve one request of so many tokens if none has to wait for it."""
        with self._lock:
            now = self._clock()
            short = self._requests is not None and not self._requests.has(1.0, now)
            if short or (self._tokens is not None and not self._tokens.has(tokens, now)):
                return False
        return self.admit(tokens) <= 0.0

    def settle(self, estimated: int, used: int | None) -> None:
        """Correct a reservation by what was used, where the server said so."""
        if self._tokens is not None and used is not None:
            with self._lock:
                self._tokens.refund(estimated - used)


def estimate(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request: four bytes each, and the longest answer allowed."""
    text = sum(len(str(m.get("content") or "").encode()) for m in body["messages"])
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return text // _BYTES_PER_TOKEN + int(most)
