"""When an order counts as lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Beat = Callable[[], float | None]
"""Returns for how many seconds a worker has been silent, or None before its first sign of life."""


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How patient a pool is.

    Attributes:
        attempts: Most orders for one shard that were begun.
        deadline_s: Seconds after its first sign of life until an order counts as lost.
        silence_s: Seconds without a sign of life until an order that gave one counts as lost.
        queue_s: Seconds that an order may wait before it begins, besides those in which the ones
            before it are worked on.
        ahead: Orders that a worker holds: the one in work and those that wait for it.
        rebuild_s: Pause before a broken place is rebuilt, doubled at each further time.
        tick_s: Seconds between two looks at what is out.
    """

    attempts: int = 3
    deadline_s: float = 7200.0
    silence_s: float = 120.0
    queue_s: float = 86400.0
    ahead: int = 2
    rebuild_s: float = 1.0
    tick_s: float = 0.5


class Answering(Protocol):
    """A place that has answered before, or not yet."""

    @property
    def answered(self) -> float | None:
        """Return when it last answered (monotonic seconds)."""
        ...


class Watch:
    """Tells whether an order is lost.

    Without signs of life the clock starts when the place answers something else: before that the
    order may wait in a batch system's queue.

    Args:
        policy: How patient to be.
        beat: Tells how long the worker has been silent; None where nothing can tell.
        place: Where the order went.
    """

    def __init__(self, policy: PoolPolicy, beat: Beat | None, place: Answering) -> None:
        self._policy, self._beat, self._place = policy, beat, place
        self._ordered = time.monotonic()
        self._first: float | None = None

    @property
    def begun(self) -> bool:
        """Say whether a worker had begun, as far as anybody can tell."""
        return self._beat is None or self.heard

    @property
    def heard(self) -> bool:
        """Say whether its worker has given a sign of life."""
        return self._beat is not None and self._beat() is not None

    def verdict(self) -> str | None:
        """Return why the order counts as lost, or None."""
        now, policy = time.monotonic(), self._policy
        silent = self._beat() if self._beat is not None else None
        if silent is not None:
            self._first = self._first or now
            if silent > policy.silence_s:
                return f"no sign of life for {silent:.0f} s"
        elif self._beat is None and self._first is None:
            answered = self._place.answered
            self._first = answered if answered and answered > self._ordered else None
        if self._first is not None and now - self._first > policy.deadline_s:
            return f"not finished {policy.deadline_s:.0f} s after it began"
        waited = now - max(self._ordered, self._place.answered or 0.0)
        if self._first is None and waited > policy.queue_s + (policy.ahead - 1) * policy.deadline_s:
            return f"not begun {waited:.0f} s after it was sent, or its place last answered"
        return None
