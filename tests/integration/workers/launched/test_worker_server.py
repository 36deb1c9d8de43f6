"""The WebSocket server in this process, with workers of the tests that use its protocol."""

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


class WorkerClient:
    """Connects to a server as a worker does."""

    def __init__(self, session: ClientSession, server: WorkerServer) -> None:
        self._session, self._server = session, server

    async def line(self, token: str | None = None) -> ClientWebSocketResponse:
        shown = {"Authorization": f"Bearer {self._server.token if token is None else token}"}
        return await self._session.ws_connect(self._server.url, headers=shown)

    async def worker(self, pid: int = 1, **hello: Any) -> ClientWebSocketResponse:
        line = await self.line()
        first = {"v": 2, "kind": "hello", "fanfold": "0", "host": "n1", "pid": pid} | hello
        await line.send_bytes(orjson.dumps(first))
        return line


@pytest_asyncio.fixture
async def server() -> AsyncIterator[WorkerServer]:
    opened = WorkerServer("127.0.0.1", silence_s=60)
    await opened.open()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def client(server: WorkerServer) -> AsyncIterator[WorkerClient]:
    async with ClientSession() as session:
        yield WorkerClient(session, server)


async def until(true: Any) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - the server sets no event for it
            await asyncio.sleep(0.01)


async def task_of(line: ClientWebSocketResponse) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(await line.receive_bytes(timeout=30))
    return found


async def answer(line: ClientWebSocketResponse, asked: dict[str, Any], **summary: Any) -> None:
    said = {"v": 2, "kind": "result", "id": asked["id"], "result": summary}
    await line.send_bytes(orjson.dumps(said))


@pytest.mark.parametrize("token", ["", "x" * 43])
async def test_only_the_token_opens(server: WorkerServer, client: WorkerClient, token: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await client.line(token)
    assert caught.value.status == 401
    assert server.worker_count == 0


async def test_a_task_goes_to_an_idle_worker(server: WorkerServer, client: WorkerClient) -> None:
    """Two tasks run; a third waits at the server for the first idle worker."""
    first, second = await client.worker(1), await client.worker(2)
    await until(lambda: server.worker_count == 2)
    waiting = [asyncio.ensure_future(server.run_task({"n": n})) for n in range(3)]
    one, two = await task_of(first), await task_of(second)
    await answer(second, two, by="second")
    third = await task_of(second)
    assert [asked["task"] for asked in (one, two, third)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    await answer(second, third, by="second again")
    await answer(first, one, by="first")
    assert [(await one)["by"] for one in waiting] == ["first", "second", "second again"]


async def test_who_goes_loses_what_it_had_and_nobody_elses(
    server: WorkerServer, client: WorkerClient
) -> None:
    first, second = await client.worker(1), await client.worker(2)
    await until(lambda: server.worker_count == 2)
    lost, waits, kept = (asyncio.ensure_future(server.run_task({"n": n})) for n in (0, 1, 2))
    asked = await task_of(second)
    await task_of(first)
    await first.close()
    with pytest.raises(WorkerLostError, match="n1:1: its connection ended"):
        await lost
    assert server.worker_count == 1
    await answer(second, asked, n=asked["task"]["n"])
    assert (await waits)["n"] == 1
    asked = await task_of(second)
    queued = asyncio.ensure_future(server.run_task({"n": 3}))
    await asyncio.sleep(0)
    await second.close()
    for one in (kept, queued):
        with pytest.raises(WorkerLostError):
            await one
    with pytest.raises(BackendError, match="no worker is connected"):
        await server.run_task({})


async def test_nobody_waits_for_an_order_that_was_given_up(
    server: WorkerServer, client: WorkerClient
) -> None:
    """A running task is finished first; a queued one is not sent."""
    worker = await client.worker()
    await until(lambda: server.worker_count == 1)
    running, queued, wanted = (asyncio.ensure_future(server.run_task({"n": n})) for n in (0, 1, 2))
    asked = await task_of(worker)
    running.cancel()
    queued.cancel()
    await asyncio.wait({running, queued})
    await answer(worker, asked)
    asked = await task_of(worker)
    assert asked["task"] == {"n": 2}
    await answer(worker, asked, n=2)
    assert await wanted == {"n": 2}


async def test_another_version_is_refused(server: WorkerServer, client: WorkerClient) -> None:
    line = await client.worker(v=99, fanfold="9.9")
    assert (await line.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    error = await asyncio.wait_for(asyncio.shield(server.refusal), 30)
    assert isinstance(error, ConfigurationError)
    assert "fanfold 9.9" in error.message
    assert server.worker_count == 0


@pytest.mark.parametrize(
    "said", [b"no json", b"[]", b'{"kind":"result","id":7,"result":{}}', b'{"kind":"dance"}']
)
async def test_nonsense_ends_the_connection(
    server: WorkerServer, client: WorkerClient, said: bytes
) -> None:
    worker = await client.worker()
    await until(lambda: server.worker_count == 1)
    working = asyncio.ensure_future(server.run_task({"n": 0}))
    await task_of(worker)
    await worker.send_bytes(said)
    with pytest.raises(WorkerLostError, match="n1:1: "):
        await working
    assert (await worker.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    assert server.worker_count == 0


async def test_a_silent_connection_is_no_worker(server: WorkerServer, client: WorkerClient) -> None:
    line = await client.line()
    await line.send_bytes(b'{"kind":"result","id":1}')
    assert (await line.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    assert (server.worker_count, server.refusal.done()) == (0, True)


async def test_a_worker_that_hears_nothing_any_more_is_gone() -> None:
    """Its connection stands, as with a node that lost its power: no ping is answered."""
    server = WorkerServer("127.0.0.1", silence_s=1.5)
    await server.open()
    try:
        async with ClientSession() as session:
            shown = {"Authorization": f"Bearer {server.token}"}
            line = await session.ws_connect(server.url, headers=shown, autoping=False)
            hello = {"v": 2, "kind": "hello", "fanfold": "0", "host": "n1", "pid": 1}
            await line.send_bytes(orjson.dumps(hello))
            await until(lambda: server.worker_count == 1)
            with pytest.raises(WorkerLostError, match="its connection ended"):
                await asyncio.wait_for(server.run_task({}), 30)
            await line.close()
    finally:
        await server.close()


async def test_a_host_of_somebody_elses() -> None:
    with pytest.raises(ConfigurationError, match="not a name or an address of this machine"):
        await WorkerServer("192.0.2.1", 60).open()
