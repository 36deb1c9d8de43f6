"""Resources that several nodes of one run use at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Held(Generic[T]):
    """One resource, opened and closed by a task of its own.

    So it does not matter which user comes first, which leaves last, and which is cancelled.
    """

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self.users = 0
        self._released = asyncio.Event()
        self._ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(manager))

    @property
    def ending(self) -> bool:
        """Say whether nobody can use it any more."""
        return self._released.is_set() or self._task.done()

    async def value(self) -> T:
        """Wait until it is open."""
        await asyncio.wait({self._ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
        return self._ready.result() if self._ready.done() else self._task.result()

    async def ended(self) -> None:
        """Wait until it is closed, however that ended."""
        await asyncio.wait({self._task})

    async def release(self) -> None:
        """Close it, or stop opening it; a cancelled caller leaves the closing to its task.

        Raises:
            Exception: What closing it raised.
        """
        self._released.set()
        if not self._ready.done():
            self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled() and self._ready.done():
            self._task.result()

    async def _hold(self, manager: AbstractAsyncContextManager[T]) -> T:
        async with manager as value:
            self._ready.set_result(value)
            await self._released.wait()
        return value


class Shared(Generic[T]):
    """One resource per key and event loop, opened by its first user, closed by its last."""

    def __init__(self) -> None:
        self._held: dict[Hashable, _Held[T]] = {}

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
            await held.ended()
            if self._held.get(place) is held:
                del self._held[place]
        if held is None:
            held = self._held[place] = _Held(make())
        held.users += 1
        try:
            yield await held.value()
        finally:
            held.users -= 1
            if held.users == 0:
                await self._close(place, held)

    async def _close(self, place: Hashable, held: _Held[T]) -> None:
        try:
            await held.release()
        finally:
            if held.ended_now and self._held.get(place) is held:
                del self._held[place]
