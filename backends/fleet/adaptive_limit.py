"""Adaptive limit on the requests that one endpoint works on at once (AIMD)."""

from __future__ import annotations

from .policy import AdaptiveLimitPolicy


class AdaptiveLimit:
    """Adaptive limit of requests in flight to one endpoint; pure, time is passed in.

    Args:
        policy: How to adapt it.
        ceiling: Upper bound for this endpoint, or None for the policy's.

    Attributes:
        width: Requests in flight allowed now.
    """

    __slots__ = (
        "_ceiling",
        "_changed",
        "_credit",
        "_done",
        "_doubling",
        "_held_until",
        "_knee",
        "_levels",
        "_policy",
        "width",
    )

    def __init__(self, policy: AdaptiveLimitPolicy, ceiling: int | None = None) -> None:
        self._policy = policy
        self._ceiling = ceiling or policy.ceiling
        self._knee = self._ceiling
        self._levels: dict[int, tuple[int, float]] = {}
        self._done = self._credit = 0
        self._doubling = True
        self._changed = self._held_until = float("-inf")
        self.width = min(policy.start, self._ceiling)

    def _most(self, now: float) -> int:
        return self._knee if now < self._held_until else self._ceiling

    @property
    def is_exploring(self) -> bool:
        """Return True until the first refusal or knee: the endpoint may have capacity for more."""
        return self._doubling

    def widen(self, now: float) -> bool:
        """Raise the limit, after it was reached for a while; return whether it was raised."""
        most = self._most(now)
        if self.width >= most or now - self._changed < self._policy.settle_s:
            return False
        step = max(1, int(self.width * self._policy.step))
        grown = int(self.width * self._policy.widen) if self._doubling else self.width + step
        self.width = min(most, grown)
        self._changed = now
        return True

    def record_answer(self, level: int, seconds: float, now: float) -> None:
        """Count an answer; as many as ``width`` make up for one refusal.

        Args:
            level: Requests in flight, its own included, when it was sent.
            seconds: How long it took.
            now: Monotonic time in seconds.
        """
        key = level.bit_length()
        count, mean = self._levels.get(key, (0, 0.0))
        weight = 1.0 / min(count + 1, 4 * self._policy.samples)
        self._levels[key] = count + 1, mean + (seconds - mean) * weight
        self._done += 1
        if self._done % self._policy.samples == 0:
            self._find_knee(key, now)
        self._credit += not self._doubling
        if self._credit >= self.width:
            self._credit = 0
            self.width = min(self._most(now), self.width + 1)

    def _find_knee(self, key: int, now: float) -> None:
        count, mean = self._levels[key]
        before, base = self._levels.get(key - 1, (0, 0.0))
        if min(count, before) < self._policy.samples or mean <= base * self._policy.knee:
            return
        # The server processes half of this level at once: the rest waits in its queue.
        self._knee = min(self._ceiling, 1 << (key - 1))
        self._levels.clear()
        self._doubling = False
        self._held_until = now + self._policy.explore_s
        self.width = min(self.width, self._knee)

    def record_refusal(self, outstanding: int) -> None:
        """Lower the limit: the endpoint had capacity for the other requests, but not for this one.

        Args:
            outstanding: Requests in flight, the refused one included.
        """
        self._doubling = False
        self._credit = 0
        self.width = max(1, min(self.width, outstanding - 1))

    def shrink(self, now: float) -> None:
        """Lower the limit strongly: answers did not come in time. A burst counts once."""
        self._doubling = False
        if now - self._changed >= self._policy.settle_s:
            self.width = max(1, int(self.width * self._policy.shrink))
            self._changed = now

    def forget_latencies(self) -> None:
        """Forget how long answers took: those of the next requests may have another length."""
        self._levels.clear()

    def reset(self, now: float) -> None:
        """Start with the initial limit again: the endpoint was down."""
        self._levels.clear()
        self._doubling = True
        self._changed = now
        self._held_until = float("-inf")
        self.width = min(self._policy.start, self._ceiling)
