"""Resources that several nodes of one run use at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Opened(Generic[T]):
    manager: AbstractAsyncContextManager[T]
    users: int = 0
    value: T | None = None
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class Shared(Generic[T]):
    """One resource per key and event loop, opened by its first user, closed by its last."""

    def __init__(self) -> None:
        self._opened: dict[Hashable, _Opened[T]] = {}

    @asynccontextmanager
    async def use(
        self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> AsyncIterator[T]:
        """Use the resource of a key, made by ``make`` if it is not open in this loop.

        Whatever opening it raises is raised to every user who waits for it.
        """
        place = (asyncio.get_running_loop(), key)
        entry = self._opened.get(place)
        if entry is None:
            entry = self._opened[place] = _Opened(make())
        entry.users += 1
        entered = False
        try:
            async with entry.opening:
                if entry.value is None:
                    entry.value = await entry.manager.__aenter__()
                entered = True
            yield entry.value
        finally:
            entry.users -= 1
            if entry.users == 0 or not entered:
                self._opened.pop(place, None)
            if entry.users == 0 and entry.value is not None:
                await entry.manager.__aexit__(None, None, None)
