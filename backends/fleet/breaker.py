"""A circuit breaker: a dead endpoint costs a few calls, not a timeout for every item."""

from __future__ import annotations

import enum

from .policy import BreakerPolicy


class State(enum.Enum):
    """How much an endpoint is trusted."""

    CLOSED = "in use"
    OPEN = "left alone"
    HALF_OPEN = "tried with one request"


class Breaker:
    """Pure state; who owns it sets the timers.

    Args:
        policy: When to open, and for how long.

    Attributes:
        state: Closed, open or half-open.
        opened: Times that it opened.
    """

    __slots__ = ("_in_a_row", "_pauses", "_policy", "opened", "state")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._in_a_row = 0
        self._pauses = 0
        self.state = State.CLOSED
        self.opened = 0

    @property
    def pause_s(self) -> float:
        """Seconds to stay open now; doubled while the endpoint does not recover."""
        # The exponent is bounded, for 2.0**1024 overflows.
        doubled = self._policy.open_s * 2.0 ** min(max(self._pauses - 1, 0), 32)
        return min(self._policy.open_max_s, doubled)

    def fail(self, at_once: bool = False) -> bool:
        """Count a failure; return True when it opens the breaker.

        Calls that were in flight when it opened fail late; they open nothing again.
        """
        if self.state is State.OPEN:
            return False
        self._in_a_row += 1
        tried = self.state is State.HALF_OPEN
        if not (at_once or tried or self._in_a_row >= self._policy.failures):
            return False
        self.state = State.OPEN
        self._pauses += 1
        self.opened += not tried
        return True

    def miss(self) -> None:
        """Stay open longer: a probe found nobody."""
        self._pauses += 1

    def probed(self) -> None:
        """Let one request through: a probe was answered."""
        self.state = State.HALF_OPEN

    def succeed(self) -> bool:
        """Count a success; return True when it closes the breaker."""
        self._in_a_row = 0
        if self.state is not State.HALF_OPEN:
            # An answer that was under way when the breaker opened says nothing of now.
            return False
        self._pauses = 0
        self.state = State.CLOSED
        return True
