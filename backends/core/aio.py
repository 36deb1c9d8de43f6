"""Resources that several nodes of one run use at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

from .kept_tasks import create_kept_task

T = TypeVar("T")

_Place = tuple[asyncio.AbstractEventLoop, Hashable]


class _Held(Generic[T]):
    """One resource, opened and closed by a task of its own.

    So it does not matter which user comes first, which leaves last, and which is cancelled.
    """

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self.users = 0
        self.released = asyncio.Event()
        self.ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.task = create_kept_task(self._hold(manager), with_its_own=True)

    async def _hold(self, manager: AbstractAsyncContextManager[T]) -> T:
        async with manager as value:
            self.ready.set_result(value)
            await self.released.wait()
        return value

    @property
    def ending(self) -> bool:
        """Say whether nobody can use it any more."""
        return self.released.is_set() or self.task.done()

    async def value(self) -> T:
        """Wait until it is open.

        Raises:
            Exception: What opening it raised.
        """
        await asyncio.wait({self.ready, self.task}, return_when=asyncio.FIRST_COMPLETED)
        return self.ready.result() if self.ready.done() else self.task.result()

    async def release(self) -> None:
        """Close it, or stop opening it; if the caller is cancelled the task closes it alone.

        Raises:
            Exception: What closing it raised.
        """
        self.released.set()
        if not self.ready.done():
            self.task.cancel()
        await asyncio.wait({self.task})
        error = None if self.task.cancelled() else self.task.exception()
        if error is not None and self.ready.done():
            raise error


class Shared(Generic[T]):
    """One resource per key and event loop, opened by its first user, closed by its last."""

    def __init__(self) -> None:
        self._held: dict[_Place, _Held[T]] = {}

    @asynccontextmanager
    async def use(
        self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> AsyncIterator[T]:
        """Use the resource of a key, made by ``make`` if it is not open in this loop.

        Whatever opening it raises is raised to every user who waits for it; whoever comes later
        opens it afresh. While it is being closed, a new user waits.
        """
        place = (asyncio.get_running_loop(), key)
        while (held := self._held.get(place)) is not None and held.ending:
            await asyncio.wait({held.task})
            self._forget(place, held)
        if held is None:
            held = self._held[place] = _Held(make())
            held.task.add_done_callback(partial(self._forget, place, held))
        held.users += 1
        try:
            yield await held.value()
        finally:
            held.users -= 1
            if held.users == 0:
                await held.release()

    def opened(self, key: Hashable) -> T | None:
        """Return what is open under a key in this loop, or None."""
        held = self._held.get((asyncio.get_running_loop(), key))
        ready = held is not None and held.ready.done() and not held.ending
        return held.ready.result() if held is not None and ready else None

    def _forget(self, place: _Place, held: _Held[T], _: object = None) -> None:
        if self._held.get(place) is held:
            del self._held[place]
