"""How many items are in flight, and how that ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_POLL_S: Final = 1.0
"""Seconds between looks at whether somebody else has asked for a stop."""


class Gate:
    """A bound on items in flight that can be closed for good.

    Closing wakes everybody who waits, lets those in flight finish for a while, and keeps the
    reason. LangGraph's own ``max_concurrency`` is no substitute: it also holds back the writes
    of finished tasks.

    Args:
        streams: Most items in flight.
        drain_s: Seconds from the closing that those in flight are waited for.
        unit: What is in flight, for messages.

    Attributes:
        drain_s: As given.
        unit: As given.
        in_flight: Places taken, those on their way to somebody who waits included.
        reason: Why the gate was closed, or None.
        error: The error that closed it, or None.
        is_cancelled: Whether whoever works behind it is cancelled.
    """

    def __init__(self, streams: int, drain_s: float, what: str = "items") -> None:
        self._streams = streams
        self.drain_s, self.unit = drain_s, what
        self._waiting = deque[asyncio.Future[bool]]()
        self._over, self._closing = asyncio.Event(), asyncio.Event()
        self._over.set()
        self._deadline = 0.0
        self._stop_checks = dict[object, Callable[[], str | None]]()
        self._polling: asyncio.Task[None] | None = None
        self.in_flight = 0
        self.reason: str | None = None
        self.error: Exception | None = None
        self.is_cancelled = False

    @property
    def is_closed(self) -> bool:
        """Say whether no further item may begin."""
        return self.reason is not None

    async def acquire(self) -> bool:
        """Wait for a place, first come, first served.

        Returns:
            True with a place taken; False when the gate is closed.
        """
        if self.is_closed:
            return False
        if self.in_flight < self._streams:
            self.in_flight += 1
            self._over.clear()
            return True
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            granted = await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.result():
                self.release()
            raise
        if granted and self.is_closed:
            self.release()
            return False
        return granted

    def release(self) -> None:
        """Give a place back, or on to whoever waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(True)
                return
        self.in_flight -= 1
        if self.in_flight == 0:
            self._over.set()

    def close(self, reason: str, error: Exception | None = None) -> None:
        """Let no further item begin; the first reason and error stay."""
        if self.is_closed:
            return
        self.reason, self.error = reason, error
        self._deadline = time.monotonic() + self.drain_s
        self._closing.set()
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(False)

    @contextmanager
    def poll_stop(self, stop_reason: Callable[[], str | None]) -> Iterator[None]:
        """Close the gate, while the block runs, once a stop is asked for that nothing announces.

        One task asks for all: a shard may wait for hours, and thousands of shards do.

        Args:
            stop_reason: Tells why no further item shall begin, or None.
        """
        key = object()
        self._stop_checks[key] = stop_reason
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll_stops())
        try:
            yield
        finally:
            del self._stop_checks[key]
            if not self._stop_checks:
                self._polling.cancel()
                self._polling = None

    async def _poll_stops(self) -> None:
        while not self.is_closed:
            await asyncio.sleep(_POLL_S)
            for drain in self._stop_checks.values():
                if reason := drain():
                    self.close(reason)
                    return

    def cancel(self) -> None:
        """Close it because whoever works behind it is cancelled."""
        self.close("cancelled")
        self.is_cancelled = True

    async def wait_closed(self, timeout_s: float) -> bool:
        """Wait until the gate is closed, at most ``timeout_s`` seconds; say whether it is."""
        return await _wait_event(self._closing, timeout_s)

    async def wait_drained(self) -> bool:
        """Wait, once the gate is closed, for the items in flight.

        Returns:
            Whether all of them ended within ``drain_s`` seconds of the closing; False at once
            when they are not to be waited for.
        """
        await _wait_event(self._over, max(0.0, self._deadline - time.monotonic()))
        return self.in_flight == 0

    def stop_waiting(self) -> None:
        """Wait no longer for those in flight; for a gate that is closed."""
        self._deadline = 0.0
        self._over.set()


async def _wait_event(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True
