"""Limit on the items in flight, and the stop of a run."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

_POLL_S: Final = 1.0
"""Seconds between checks for a stop that was requested elsewhere, e.g. by a signal."""

_CHECK_S: Final = 0.2
"""Seconds between checks of the items in flight after closing."""


class TurnLock:
    """A lock that is taken by the waiting task with the lowest number."""

    def __init__(self) -> None:
        self._waiting = list[tuple[int, int, asyncio.Future[None]]]()
        self._count = itertools.count()
        self._is_taken = False

    @asynccontextmanager
    async def take(self, turn: int) -> AsyncIterator[None]:
        """Hold the lock while the block runs.

        Args:
            turn: Tasks with a lower number go first.
        """
        if self._is_taken:
            free = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (turn, next(self._count), free))
            try:
                await free
            except asyncio.CancelledError:
                if free.done() and not free.cancelled():
                    self._hand_over()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting:
            free = heapq.heappop(self._waiting)[2]
            if not free.done():
                free.set_result(None)
                return
        self._is_taken = False


class Gate:
    """A limit on items in flight that can be closed permanently.

    Closing wakes all waiting tasks, lets items in flight finish within a time, and keeps the
    reason. LangGraph's ``max_concurrency`` is no substitute: it also delays the writes of
    finished tasks.

    Args:
        streams: Maximum number of items in flight.
        drain_s: Seconds after closing in which items in flight may finish.
        what: What is in flight, for messages; one of them.
        left: What goes on elsewhere after a stop, in words; None: nothing does.

    Attributes:
        drain_s: As given.
        unit: The argument ``what``.
        left: As given.
        in_flight: Slots in use, including those assigned to a waiting task.
        started_at: When the latest slot was taken, in monotonic seconds.
        reason: Why the gate was closed, or None.
        error: The error that closed it, or None.
        is_cancelled: Whether the task that runs the items was cancelled.
        turns: Lets one shard after the other start its items, in an order that is kept.
    """

    def __init__(
        self, streams: int, drain_s: float, what: str = "item", left: str | None = None
    ) -> None:
        self._streams = streams
        self.drain_s, self.unit, self.left = drain_s, what, left
        self._waiting = list[tuple[int, int, asyncio.Future[bool]]]()
        self._count = itertools.count()
        self._over, self._closing = asyncio.Event(), asyncio.Event()
        self._over.set()
        self._deadline = 0.0
        self._stop_checks = dict[object, Callable[[], str | None]]()
        self._polling: asyncio.Task[None] | None = None
        self.in_flight = 0
        self.started_at = 0.0
        self.reason: str | None = None
        self.error: Exception | None = None
        self.is_cancelled = False
        self.turns = TurnLock()

    @property
    def is_closed(self) -> bool:
        """Return True if no further item may begin."""
        return self.reason is not None

    async def acquire(self, turn: int = 0) -> bool:
        """Wait for a slot.

        Args:
            turn: Tasks with a lower number go first, those with the same one as they come. A shard
                that ends early is in the checkpoint; of many half done, none would be.

        Returns:
            True if a slot was taken; False if the gate is closed.
        """
        if self.is_closed:
            return False
        if self.in_flight < self._streams:
            self.in_flight += 1
            self.started_at = time.monotonic()
            self._over.clear()
            return True
        slot: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (turn, next(self._count), slot))
        try:
            granted = await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled() and slot.result():
                self.release()
            raise
        if granted and self.is_closed:
            self.release()
            return False
        return granted

    def release(self) -> None:
        """Free a slot, or give it to the waiting task whose turn it is."""
        while self._waiting:
            slot = heapq.heappop(self._waiting)[2]
            if not slot.done():
                slot.set_result(True)
                self.started_at = time.monotonic()
                return
        self.in_flight -= 1
        if self.in_flight == 0:
            self._over.set()

    def close(self, reason: str, error: Exception | None = None, early_s: float = 0.0) -> None:
        """Let no further item begin; the first reason and error are kept.

        Args:
            reason: Why.
            error: The error that is the reason, if one is.
            early_s: Further seconds in which items in flight may finish.
        """
        if self.is_closed:
            return
        self.reason, self.error = reason, error
        self._deadline = time.monotonic() + self.drain_s + early_s
        self._closing.set()
        for *_, slot in self._waiting:
            if not slot.done():
                slot.set_result(False)
        self._waiting.clear()

    @contextmanager
    def poll_stop(self, stop_reason: Callable[[], str | None]) -> Iterator[None]:
        """Poll for a stop while the block runs, and close the gate when one is requested.

        One task polls for all shards: thousands of them may wait for hours.

        Args:
            stop_reason: Returns why no further item may begin, or None.
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
        """Close the gate because the task that runs the items was cancelled."""
        self.close("cancelled")
        self.is_cancelled = True

    async def wait_closed(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` seconds for the gate to close; return True if it did."""
        return await _wait_event(self._closing, timeout_s)

    async def wait_drained(self, check: Callable[[], None] | None = None) -> bool:
        """Wait, after the gate was closed, for the items in flight.

        Args:
            check: Called at once, and repeatedly while they are waited for.

        Returns:
            Whether all of them ended within the time of ``close``; False at once
            after ``stop_waiting``.
        """
        while True:
            if check is not None:
                check()
            left = max(0.0, self._deadline - time.monotonic())
            slice_s = left if check is None else min(left, _CHECK_S)
            if await _wait_event(self._over, slice_s) or slice_s == left:
                return self.in_flight == 0

    def stop_waiting(self) -> None:
        """Wait no longer for items in flight; for a closed gate."""
        self._deadline = 0.0
        self._over.set()


async def _wait_event(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True
