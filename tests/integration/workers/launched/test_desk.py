"""The desk in this process, and workers of the tests' own that speak its language."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientWebSocketResponse

from fanfold.backends.core.errors import BackendError, ConfigurationError, WorkerLostError
from fanfold.backends.workers.launched.server import WorkerServer

pytestmark = pytest.mark.integration


class Comer:
    """Somebody who comes to a desk."""

    def __init__(self, session: ClientSession, desk: WorkerServer) -> None:
        self._session, self._desk = session, desk

    async def line(self, token: str | None = None) -> ClientWebSocketResponse:
        shown = {"Authorization": f"Bearer {self._desk.token if token is None else token}"}
        return await self._session.ws_connect(self._desk.url, headers=shown)

    async def worker(self, pid: int = 1, **hello: Any) -> ClientWebSocketResponse:
        line = await self.line()
        first = {"v": 2, "kind": "hello", "fanfold": "0", "host": "n1", "pid": pid} | hello
        await line.send_bytes(orjson.dumps(first))
        return line


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[WorkerServer]:
    opened = WorkerServer("127.0.0.1", silence_s=60)
    await opened.open()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def comer(desk: WorkerServer) -> AsyncIterator[Comer]:
    async with ClientSession() as session:
        yield Comer(session, desk)


async def until(true: Any) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - the desk sets no event for it
            await asyncio.sleep(0.01)


async def order_of(line: ClientWebSocketResponse) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(await line.receive_bytes(timeout=30))
    return found


async def answer(line: ClientWebSocketResponse, asked: dict[str, Any], **summary: Any) -> None:
    said = {"v": 2, "kind": "result", "id": asked["id"], "result": summary}
    await line.send_bytes(orjson.dumps(said))


@pytest.mark.parametrize("token", ["", "x" * 43])
async def test_only_the_token_opens(desk: WorkerServer, comer: Comer, token: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await comer.line(token)
    assert caught.value.status == 401
    assert desk.worker_count == 0


async def test_an_order_goes_to_who_has_nothing_to_do(desk: WorkerServer, comer: Comer) -> None:
    """Two orders are in work, a third waits at the desk for whoever is ready first."""
    first, second = await comer.worker(1), await comer.worker(2)
    await until(lambda: desk.worker_count == 2)
    waiting = [asyncio.ensure_future(desk.run_task({"n": n})) for n in range(3)]
    one, two = await order_of(first), await order_of(second)
    await answer(second, two, by="second")
    third = await order_of(second)
    assert [asked["task"] for asked in (one, two, third)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    await answer(second, third, by="second again")
    await answer(first, one, by="first")
    assert [(await one)["by"] for one in waiting] == ["first", "second", "second again"]


async def test_who_goes_loses_what_it_had_and_nobody_elses(
    desk: WorkerServer, comer: Comer
) -> None:
    first, second = await comer.worker(1), await comer.worker(2)
    await until(lambda: desk.worker_count == 2)
    lost, waits, kept = (asyncio.ensure_future(desk.run_task({"n": n})) for n in (0, 1, 2))
    asked = await order_of(second)
    await order_of(first)
    await first.close()
    with pytest.raises(WorkerLostError, match="n1:1: its connection ended"):
        await lost
    assert desk.worker_count == 1
    await answer(second, asked, n=asked["task"]["n"])
    assert (await waits)["n"] == 1
    asked = await order_of(second)
    queued = asyncio.ensure_future(desk.run_task({"n": 3}))
    await asyncio.sleep(0)
    await second.close()
    for one in (kept, queued):
        with pytest.raises(WorkerLostError):
            await one
    with pytest.raises(BackendError, match="no worker is there"):
        await desk.run_task({})


async def test_nobody_waits_for_an_order_that_was_given_up(
    desk: WorkerServer, comer: Comer
) -> None:
    """In work it is finished first; at the desk it is left out."""
    worker = await comer.worker()
    await until(lambda: desk.worker_count == 1)
    running, queued, wanted = (asyncio.ensure_future(desk.run_task({"n": n})) for n in (0, 1, 2))
    asked = await order_of(worker)
    running.cancel()
    queued.cancel()
    await asyncio.wait({running, queued})
    await answer(worker, asked)
    asked = await order_of(worker)
    assert asked["task"] == {"n": 2}
    await answer(worker, asked, n=2)
    assert await wanted == {"n": 2}


async def test_who_speaks_another_language_is_told_apart(desk: WorkerServer, comer: Comer) -> None:
    line = await comer.worker(v=99, fanfold="9.9")
    assert (await line.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    error = await asyncio.wait_for(asyncio.shield(desk.refusal), 30)
    assert isinstance(error, ConfigurationError)
    assert "fanfold 9.9" in error.message
    assert desk.worker_count == 0


@pytest.mark.parametrize(
    "said", [b"no json", b"[]", b'{"kind":"result","id":7,"result":{}}', b'{"kind":"dance"}']
)
async def test_nonsense_ends_the_connection(desk: WorkerServer, comer: Comer, said: bytes) -> None:
    worker = await comer.worker()
    await until(lambda: desk.worker_count == 1)
    working = asyncio.ensure_future(desk.run_task({"n": 0}))
    await order_of(worker)
    await worker.send_bytes(said)
    with pytest.raises(WorkerLostError, match="n1:1: "):
        await working
    assert (await worker.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    assert desk.worker_count == 0


async def test_who_says_nothing_first_is_no_worker(desk: WorkerServer, comer: Comer) -> None:
    line = await comer.line()
    await line.send_bytes(b'{"kind":"result","id":1}')
    assert (await line.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    assert (desk.worker_count, desk.refusal.done()) == (0, True)


async def test_a_worker_that_hears_nothing_any_more_is_gone() -> None:
    """Its connection stands, as with a node that lost its power: no ping is answered."""
    desk = WorkerServer("127.0.0.1", silence_s=1.5)
    await desk.open()
    try:
        async with ClientSession() as session:
            shown = {"Authorization": f"Bearer {desk.token}"}
            line = await session.ws_connect(desk.url, headers=shown, autoping=False)
            hello = {"v": 2, "kind": "hello", "fanfold": "0", "host": "n1", "pid": 1}
            await line.send_bytes(orjson.dumps(hello))
            await until(lambda: desk.worker_count == 1)
            with pytest.raises(WorkerLostError, match="its connection ended"):
                await asyncio.wait_for(desk.run_task({}), 30)
            await line.close()
    finally:
        await desk.close()


async def test_a_host_of_somebody_elses() -> None:
    with pytest.raises(ConfigurationError, match="no name or address of this machine"):
        await WorkerServer("192.0.2.1", 60).open()
