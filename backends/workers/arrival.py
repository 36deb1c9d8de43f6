"""Whether any worker has come at all: engines take orders whether or not somebody works on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

logger = logging.getLogger(__name__)

_TELL_S: Final = 60.0
_TELL_MOST_S: Final = 3600.0


class Hearing(Protocol):
    """A place that may have been heard of."""

    @property
    def busy(self) -> int:
        """Return how many orders it has."""
        ...

    @property
    def heard(self) -> bool:
        """Say whether a worker there has begun or answered."""
        ...


class Arrival:
    """Looks out for the first worker of all, and tells what is waited for until it comes.

    Args:
        queue_s: Seconds to wait for it.
        clock: Returns the time in seconds, of a clock that never goes back.
    """

    def __init__(self, queue_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_s, self._clock = queue_s, clock
        self._since: float | None = None
        self._tell_s = _TELL_S
        self._over = False

    def sent(self) -> None:
        """Note that an order goes out: from the first one on somebody is waited for."""
        if self._since is None:
            self._since = self._clock()

    def look(self, places: Sequence[Hearing]) -> str | None:
        """Return, once, why nobody is waited for any longer; else None."""
        if self._over or self._since is None:
            return None
        orders = sum(place.busy for place in places)
        if orders == 0:
            self._since = None
            return None
        if any(place.heard for place in places):
            self._over = True
            return None
        return self._waited(self._clock() - self._since, orders)

    def _waited(self, seconds: float, orders: int) -> str | None:
        said = f"no worker has been heard of in the {seconds:.0f} s since the first order"
        if seconds > self._queue_s:
            self._over = True
            return (
                f"{said} (backend.queue_s); see whether workers were started, and what the engine "
                "says of them"
            )
        if seconds >= self._tell_s:
            self._tell_s += min(self._tell_s, _TELL_MOST_S)
            logger.warning(
                "%s (%d are out): workers may still start or wait in a batch system's queue; the "
                "run waits for %.0f s in all (backend.queue_s)",
                said,
                orders,
                self._queue_s,
            )
        return None
