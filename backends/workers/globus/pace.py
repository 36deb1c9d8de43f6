"""How often the service may be asked, over all endpoints of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the talk with the service.

    The service allows 20 requests in 10 s; with these numbers a run makes 17 at most, and two more
    while requests fail and are repeated.

    Attributes:
        burst: Requests that may be made at once.
        per_s: Requests per second after that.
        first_s: Pause before tasks are asked after, while some end.
        last_s: The longest such pause, while none ends.
        look_s: Seconds between looks at an endpoint's health.
        missing_s: Seconds for which the service may say nothing of a task that it took.
    """

    burst: int = 5
    per_s: float = 1.2
    first_s: float = 1.0
    last_s: float = 5.0
    look_s: float = 10.0
    missing_s: float = 20.0


class Bucket:
    """Spends turns: as many at once as the burst, then so many per second.

    Args:
        pace: The numbers.
        clock: Returns the time in seconds, of a clock that never goes back.
    """

    def __init__(self, pace: Pace, clock: Callable[[], float]) -> None:
        self._pace, self._clock = pace, clock
        self._full_at = clock()  # when all turns of the burst will be there again

    async def turn(self) -> None:
        """Wait for a turn; those who wait go in the order in which they came."""
        now, gap = self._clock(), 1.0 / self._pace.per_s
        self._full_at = max(self._full_at, now) + gap
        await asyncio.sleep(max(0.0, self._full_at - now - self._pace.burst * gap))
