"""Calls that block, off the loop: paced, and in one daemon thread of their own.

Unlike a pool's threads it holds nobody up: neither the end of the loop nor of the process waits
for a request that nobody answers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from ...core.errors import SiteError
from .pace import Bucket, Pace
from .service import Service

T = TypeVar("T")
_CLOSE_S = 1.0


class Line:
    """Runs one call at a time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function and return its value; needs a running loop.

        A caller that is cancelled leaves; the call itself goes on.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
                _tell(loop, _fail, answer, error)
            else:
                _tell(loop, _end, answer, value)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="globus", daemon=True)
            self._thread.start()
        self._calls.put(run)
        return await answer

    def hang_up(self) -> None:
        """End the thread after the calls that wait; does not wait for it."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Talk:
    """A run's connection to the service.

    Args:
        connect: Makes the service; blocks.
        pace: How often it is asked.
    """

    def __init__(self, connect: Callable[[], Service], pace: Pace) -> None:
        self._connect, self._line = connect, Line()
        self._bucket, self._asking = Bucket(pace, time.monotonic), asyncio.Lock()
        self._service: Service | None = None

    async def open(self) -> None:
        """Connect.

        Raises:
            FanfoldError: There is no login, or the service refused or did not answer.
        """
        self._service = await self._line.call(self._connect)

    async def ask(self, what: Callable[[Service], T]) -> T:
        """Ask the service, when there is a turn.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        async with self._asking:  # else turns would gather behind a slow answer, and go at once
            await self._bucket.turn()
            if self._service is None:
                raise SiteError("globus_compute: not connected")
            return await self._line.call(what, self._service)

    async def close(self) -> None:
        """Close the connection; a request that is held up is left behind."""
        service, self._service = self._service, None
        if service is not None:
            closed = asyncio.ensure_future(self._line.call(service.close))
            await asyncio.wait({closed}, timeout=_CLOSE_S)
            closed.cancel()
        self._line.hang_up()


def _tell(loop: asyncio.AbstractEventLoop, told: Callable[..., None], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the loop has ended, and nobody listens
        loop.call_soon_threadsafe(told, *arguments)


def _end(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
