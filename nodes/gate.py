"""How many items are in flight, and how that ends."""

from __future__ import annotations

import asyncio
from collections import deque


class Gate:
    """A bound on items in flight that can be closed for good.

    Closing wakes everybody who waits, lets those in flight finish for a while, and keeps the
    reason. LangGraph's own ``max_concurrency`` is no substitute: it also holds back the writes
    of finished tasks.

    Args:
        streams: Most items in flight.
        drain_s: Seconds that :meth:`drained` waits for those in flight.
    """

    def __init__(self, streams: int, drain_s: float) -> None:
        self._free = streams
        self._drain_s = drain_s
        self._waiting = deque[asyncio.Future[bool]]()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.reason: str | None = None
        self.error: Exception | None = None

    @property
    def closed(self) -> bool:
        """Say whether no further item may begin."""
        return self.reason is not None

    async def enter(self) -> bool:
        """Wait for a place.

        Returns:
            True with a place taken; False when the gate is closed.
        """
        if self.closed:
            return False
        if self._free == 0:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                if not await place:
                    return False
            except asyncio.CancelledError:
                if place.done() and not place.cancelled() and place.result():
                    self._hand_on()
                raise
        else:
            self._free -= 1
        self.in_flight += 1
        self._idle.clear()
        return True

    def leave(self) -> None:
        """Give a place back."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()
        self._hand_on()

    def close(self, reason: str, error: Exception | None = None) -> None:
        """Let no further item begin; the first reason and error stay."""
        if self.closed:
            return
        self.reason, self.error = reason, error
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(False)

    async def drained(self) -> bool:
        """Wait for the items in flight, at most ``drain_s`` seconds.

        Returns:
            Whether all of them ended.
        """
        try:
            await asyncio.wait_for(self._idle.wait(), self._drain_s)
        except TimeoutError:
            return False
        return True

    def _hand_on(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(True)
                return
        self._free += 1
