from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from fanfold.backends.core.aio import SharedResource


@dataclass
class Maker:
    """Makes resources, and tells what became of them."""

    opened: int = 0
    closed: int = 0
    error: Exception | None = None
    closing_error: Exception | None = None
    opening: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.opening.set()
        self.closing.set()

    def __call__(self) -> AbstractAsyncContextManager[int | None]:
        return self._make()

    @asynccontextmanager
    async def _make(self) -> AsyncIterator[int | None]:
        await self.opening.wait()
        if self.error is not None:
            raise self.error
        self.opened += 1
        async with asyncio.timeout(60):  # must end in the task in which it began
            yield None if self.opened == 1 else self.opened
        await self.closing.wait()
        self.closed += 1
        if self.closing_error is not None:
            raise self.closing_error


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_many_users_share_one(maker: Maker, shared: SharedResource[int | None]) -> None:
    go = asyncio.Event()

    async def user() -> int | None:
        async with shared.use("k", maker) as value:
            await go.wait()
            return value

    users = [asyncio.create_task(user()) for _ in range(5)]
    await settle()
    assert (maker.opened, maker.closed) == (1, 0)
    users.pop().cancel()
    await settle()
    go.set()
    assert await asyncio.gather(*users) == [None] * 4
    assert (maker.opened, maker.closed) == (1, 1)
    assert not shared._resources


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def shared() -> SharedResource[int | None]:
    return SharedResource()


async def hold(shared: SharedResource[int | None], maker: Maker, key: str = "k") -> None:
    async with shared.use(key, maker):
        await asyncio.sleep(0)


async def test_every_waiter_gets_the_error_and_a_later_one_opens_afresh(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.opening.clear()
    maker.error = ValueError("no")
    users = [asyncio.create_task(hold(shared, maker)) for _ in range(3)]
    await settle()
    maker.opening.set()
    ends = await asyncio.gather(*users, return_exceptions=True)
    assert [str(end) for end in ends] == ["no"] * 3
    assert not shared._resources
    maker.error = None
    await hold(shared, maker)
    assert (maker.opened, maker.closed) == (1, 1)


async def test_who_comes_while_a_failed_one_is_left_opens_afresh(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.error = ValueError("no")
    first = asyncio.create_task(hold(shared, maker))
    while not first.done():
        await asyncio.sleep(0)
        if shared._resources and next(iter(shared._resources.values())).task.done():
            maker.error = None
            await hold(shared, maker)
    with pytest.raises(ValueError, match="no"):
        await first
    await hold(shared, maker)
    assert maker.opened == maker.closed > 0


async def test_a_user_cancelled_while_opening_spoils_it_for_nobody(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.opening.clear()
    first, second = (asyncio.create_task(hold(shared, maker)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    maker.opening.set()
    await second
    assert first.cancelled()
    assert (maker.opened, maker.closed) == (1, 1)


async def test_nobody_waits_any_more(maker: Maker, shared: SharedResource[int | None]) -> None:
    maker.opening.clear()
    user = asyncio.create_task(hold(shared, maker))
    await settle()
    user.cancel()
    await settle()
    assert user.cancelled()
    assert not shared._resources
    maker.opening.set()
    await hold(shared, maker)
    assert (maker.opened, maker.closed) == (1, 1)


async def test_a_new_user_waits_for_the_closing(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.closing.clear()
    first = asyncio.create_task(hold(shared, maker))
    await settle()
    second = asyncio.create_task(hold(shared, maker))
    await settle()
    assert maker.opened == 1
    maker.closing.set()
    await asyncio.gather(first, second)
    assert (maker.opened, maker.closed) == (2, 2)


async def test_closing_goes_on_without_its_cancelled_user(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.closing.clear()
    user = asyncio.create_task(hold(shared, maker))
    await settle()
    user.cancel()
    await settle()
    assert user.cancelled()
    maker.closing.set()
    await settle()
    assert maker.closed == 1
    assert not shared._resources


async def test_an_error_in_closing_reaches_the_last_user(
    maker: Maker, shared: SharedResource[int | None]
) -> None:
    maker.closing_error = OSError("flush")
    with pytest.raises(OSError, match="flush"):
        await hold(shared, maker)
    assert not shared._resources


async def test_keys_are_apart(maker: Maker, shared: SharedResource[int | None]) -> None:
    async with shared.use("a", maker), shared.use("b", maker):
        assert maker.opened == 2
    assert maker.closed == 2


async def test_loops_are_apart(maker: Maker, shared: SharedResource[int | None]) -> None:
    other = Maker()

    def elsewhere() -> None:
        asyncio.run(hold(shared, other))

    async with shared.use("k", maker):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert (maker.closed, other.opened, other.closed) == (0, 1, 1)
    assert not shared._resources
