"""Quotas of requests and tokens, of a whole process and of single endpoints."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from threading import Lock
from typing import Final

from ..core.rate_window import RateWindow
from ..core.token_bucket import TokenBucket
from ..core.types import Usage
from .policy import RateLimitPolicy

_BURST_S: Final = 0.05
"""Requests of so many seconds may be sent at once: more per second than the quota by this part."""
_SHORTEST_S: Final = 0.001
_SLOWER: Final = 0.75
_SLOWEST: Final = 0.1
_SLOWED_S: Final = 1.0
"""Refusals within so many seconds lower the rate once."""
_FASTER: Final = 0.05
_FASTER_S: Final = 10.0
"""Every so many seconds without a refusal, a lowered rate is raised by ``_FASTER``."""
_KNOWN: Final = 8
"""So many answers show how many tokens a prompt has per byte."""
_MARGIN: Final = 1.25


class Quota:
    """Limits of requests per second and of tokens within a window; several threads may share it.

    A request is counted when it is sent, never earlier: after a pause nothing is made up for.

    Args:
        requests_per_s: Limit of requests per second, or None.
        tokens: Limit of tokens, prompt and answer, within the length of a window, or None.
        window_s: That length in seconds.
        share: Part of the limits that this process may use.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        requests_per_s: float | None,
        tokens: float | None,
        window_s: float = 60.0,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests_per_s, self._tokens, self._share = requests_per_s, tokens, share
        self._factor, self._slowed_at = 1.0, -math.inf
        self._bucket: TokenBucket | None = None
        if requests_per_s is not None:
            # processes that share a quota begin at different times
            level = random.random() if share < 1.0 else 1.0
            self._bucket = TokenBucket(requests_per_s * share, 1.0, level)
            self._set_rate()
        self._window = RateWindow(tokens * share, window_s) if tokens is not None else None
        self._window_s = window_s
        self._began = -math.inf
        self._clock = clock
        self._lock = Lock()
        self._waiting: dict[Callable[[], None], asyncio.AbstractEventLoop] = {}

    @property
    def counts_tokens(self) -> bool:
        """Return True if it limits tokens."""
        return self._window is not None

    def reserve(self, tokens: int, *, count_reserved: bool = True) -> float:
        """Reserve one request of so many tokens at most, if the quota covers it now.

        Args:
            tokens: Upper estimate of its tokens.
            count_reserved: Whether tokens that are reserved count; not for a request whose item
                ends other requests only after this one.

        Returns:
            0 if it is reserved; else the seconds to wait, infinite if only the end of another
            request helps.
        """
        with self._lock:
            now, wait = self._clock(), 0.0
            if self._bucket is not None:
                self._recover(now)
                wait = self._bucket.due_s(1.0, now)
            if self._window is not None and not self._window.has(
                tokens, now, count_reserved=count_reserved
            ):
                due = self._window.due_s(tokens, now, count_reserved=count_reserved)
                wait = max(wait, due, _SHORTEST_S)
            if wait > 0.0:
                return max(wait, _SHORTEST_S)
            if self._bucket is not None:
                self._bucket.take(1.0, now)
            if self._window is not None:
                self._window.reserve(tokens)
            return 0.0

    def cancel(self, tokens: int) -> None:
        """Release what was reserved for a request that was not sent."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.refund(1.0)
            if self._window is not None:
                self._window.settle(tokens, 0, self._clock())
        self._wake_loops()

    def settle(self, tokens: int, used: int) -> None:
        """Replace the tokens reserved for a request by those that it used."""
        if self._window is None:
            return
        with self._lock:
            now = self._clock()
            self._window.settle(tokens, used, now)
            if used and now - self._began >= self._window_s:
                self._began = now
        self._wake_loops()

    def get_window_left(self) -> float:
        """Return the seconds until the service's window ends, as far as known; never too few."""
        with self._lock:
            passed = self._clock() - self._began
            return self._window_s - passed if passed < self._window_s else self._window_s

    def set_share(self, share: float) -> None:
        """Change the part of the limits that this process may use."""
        with self._lock:
            self._share = share
            self._set_rate()
            if self._window is not None and self._tokens is not None:
                self._window.limit = self._tokens * share
        self._wake_loops(every=True)

    def slow_down(self) -> None:
        """Lower the rate of requests: the service refused one as too early."""
        with self._lock:
            now = self._clock()
            if now - self._slowed_at >= _SLOWED_S:
                self._factor = max(_SLOWEST, self._factor * _SLOWER)
                self._set_rate()
            self._slowed_at = now

    def _recover(self, now: float) -> None:
        if self._factor < 1.0 and now - self._slowed_at >= _FASTER_S:
            self._factor, self._slowed_at = min(1.0, self._factor + _FASTER), now
            self._set_rate()

    def _set_rate(self) -> None:
        if self._bucket is not None and self._requests_per_s is not None:
            rate = self._requests_per_s * self._share * self._factor
            self._bucket.per_s, self._bucket.burst = rate, max(1.0, rate * _BURST_S)

    def on_free(self, wake: Callable[[], None]) -> None:
        """Call a function in the running loop when something is released, once."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._waiting[wake] = loop

    def _wake_loops(self, *, every: bool = False) -> None:
        """Wake the loops that wait; the running one serves its calls by itself.

        Args:
            every: Wake the running loop, too.
        """
        if not self._waiting:
            return
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        with self._lock:
            waking = [w for w, loop in self._waiting.items() if every or loop is not here]
            loops = [(self._waiting.pop(wake), wake) for wake in waking]
        for loop, wake in loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)


class RateLimiter:
    """All quotas of a process; the loops of several threads share them.

    Args:
        policy: The quotas of the whole process.
        clock: Monotonic time in seconds.

    Attributes:
        quota: The quota over all endpoints, or None.
        counts_tokens: Whether any quota counts tokens.
        share: Part of the shared quotas that this process may use now.
        base_share: The same at first: while all processes work.
    """

    def __init__(
        self, policy: RateLimitPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy, self._clock = policy, clock
        self.share = self.base_share = policy.share
        self._endpoints: dict[tuple[object, ...], Quota] = {}
        self._answers, self._ratio, self._longest = 0, 0.0, 0
        limited = policy.requests_per_s is not None or policy.tokens_per_min is not None
        self.quota = (
            Quota(policy.requests_per_s, policy.tokens_per_min, share=policy.share, clock=clock)
            if limited
            else None
        )
        self.counts_tokens = policy.tokens_per_min is not None

    @property
    def has_quota(self) -> bool:
        """Return True if there is any quota."""
        return self.quota is not None or bool(self._endpoints)

    def get_endpoint_quota(
        self, key: str, requests_per_s: float | None, tokens: float | None, window_s: float
    ) -> Quota | None:
        """Return the quota of an endpoint, the same in each loop, or None if it has none.

        Args:
            key: Identifies the endpoint.
            requests_per_s: Limit of requests per second to it, or None.
            tokens: Limit of its tokens within the length of a window, or None.
            window_s: That length in seconds.
        """
        if requests_per_s is None and tokens is None:
            return None
        limits = key, requests_per_s, tokens, window_s
        if limits not in self._endpoints:
            share = self.share if self._policy.shares_endpoints else 1.0
            self._endpoints[limits] = Quota(requests_per_s, tokens, window_s, share, self._clock)
            self.counts_tokens = self.counts_tokens or tokens is not None
        return self._endpoints[limits]

    def set_share(self, share: float) -> None:
        """Change the part of all shared quotas that this process may use."""
        if share == self.share:
            return
        self.share = share
        if self.quota is not None:
            self.quota.set_share(share)
        if self._policy.shares_endpoints:
            for quota in list(self._endpoints.values()):
                quota.set_share(share)

    def estimate_tokens(self, most: Usage) -> int:
        """Estimate the tokens of a request from above.

        Until answers show how many tokens prompts have per byte, each byte counts as one. A request
        without a longest answer counts the longest answer so far.

        Args:
            most: The most tokens that it may use.
        """
        ratio = self._ratio * _MARGIN if self._answers >= _KNOWN else 1.0
        answer = most.completion or math.ceil(self._longest * _MARGIN)
        return math.ceil((most.prompt or 0) * ratio) + answer

    def record_usage(self, most: Usage, used: Usage) -> None:
        """Learn from an answer's usage how many tokens requests use at most."""
        if used.prompt is not None and most.prompt:
            self._answers += 1
            self._ratio = max(self._ratio, used.prompt / most.prompt)
            self._longest = max(self._longest, used.completion or 0)


class TokenNeed:
    """The tokens of one request, estimated when it is sent: answers may have shown more by then.

    Args:
        limiter: Estimates them.
        most: The most tokens that it may use.

    Attributes:
        most: The same.
        tokens: The last estimate.
    """

    __slots__ = ("_limiter", "most", "tokens")

    def __init__(self, limiter: RateLimiter, most: Usage) -> None:
        self._limiter = limiter
        self.most = most
        self.tokens = 0

    def copy(self) -> TokenNeed:
        """Return the need of a second request like it."""
        return TokenNeed(self._limiter, self.most)

    def estimate(self) -> int:
        """Estimate them now."""
        self.tokens = self._limiter.estimate_tokens(self.most)
        return self.tokens

    def settle(self, used: Usage) -> int:
        """Return the tokens that the answer reports, and learn from them; else the estimate."""
        if used.prompt is None:
            return self.tokens
        self._limiter.record_usage(self.most, used)
        return used.prompt + (used.completion or 0)
