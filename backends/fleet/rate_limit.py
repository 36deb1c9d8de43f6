"""Quotas of the whole process: requests per second and tokens per minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Final

from ..core.token_bucket import TokenBucket
from .policy import RateLimitPolicy

_BYTES_PER_TOKEN: Final = 4


class RateLimiter:
    """Limits a whole process to its quotas of requests and tokens.

    Tokens are reserved before a request is sent, by an estimate, and settled when its answer has
    come: a service that counts them only afterwards would let a burst overshoot. The loops of
    several threads may share one.

    Args:
        policy: The quotas.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, policy: RateLimitPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        per_s, burst = policy.requests_per_s, policy.burst
        self._requests = TokenBucket(per_s, burst) if per_s else None
        per_min = policy.tokens_per_min
        self._tokens = TokenBucket.per_minute(per_min) if per_min else None
        self._clock = clock
        self._lock = Lock()

    def reserve(self, tokens: int) -> float:
        """Reserve one request of so many tokens; return the seconds to wait first."""
        with self._lock:
            now, waits = self._clock(), [0.0]
            if self._requests is not None:
                waits.append(self._requests.take(1.0, now))
            if self._tokens is not None:
                waits.append(self._tokens.take(tokens, now))
            return max(waits)

    def try_reserve(self, tokens: int) -> bool:
        """Reserve one request of so many tokens if it need not wait."""
        with self._lock:
            now = self._clock()
            short = self._requests is not None and not self._requests.has(1.0, now)
            if short or (self._tokens is not None and not self._tokens.has(tokens, now)):
                return False
        return self.reserve(tokens) <= 0.0

    def settle(self, estimated: int, used: int | None) -> None:
        """Correct a reservation by the actual usage, if the server reported it."""
        if self._tokens is not None and used is not None:
            with self._lock:
                self._tokens.refund(estimated - used)


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request: four bytes each, and the longest answer allowed."""
    text = sum(len(str(m.get("content") or "").encode()) for m in body["messages"])
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return text // _BYTES_PER_TOKEN + int(most)
