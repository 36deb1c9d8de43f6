"""Network errors in plain words; each is made by a real connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from fanfold.backends.core.connection_errors import describe_connection_error

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listen(handle: Handle) -> AsyncIterator[int]:
    tasks = set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await handle(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*tasks)


def answer(data: bytes) -> Handle:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(data)

    return handle


async def fail(url: str, timeout_s: float = 5.0) -> str:
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, TimeoutError)) as caught:
            async with session.get(url, timeout=aiohttp.ClientTimeout(timeout_s)) as found:
                await found.read()
    text = describe_connection_error(caught.value)
    for internal in ("ssl:", "Errno", "Connect call", "\n", "Error(", "b'"):
        assert internal not in text
    return text


async def test_a_port_without_a_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "refused" in await fail(f"http://127.0.0.1:{port}/v1")
    assert "refused" in await fail(f"https://127.0.0.1:{port}/v1")


async def test_a_host_that_does_not_exist() -> None:
    assert "name of the host is unknown" in await fail("http://no-such-host.invalid/v1")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "closed"),
        (b"AMQP\0\0\x09\x01", "not valid HTTP"),
        (b"-ERR unknown command\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf", "not completed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "not valid HTTP"),
    ],
)
async def test_a_server_that_speaks_no_http(data: bytes, words: str) -> None:
    async with listen(answer(data)) as port:
        assert words.lower() in (await fail(f"http://127.0.0.1:{port}/v1")).lower()


async def test_a_server_without_tls() -> None:
    async with listen(answer(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert "TLS" in await fail(f"https://127.0.0.1:{port}/v1")


async def test_a_silent_server() -> None:
    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listen(wait) as port:
        assert await fail(f"http://127.0.0.1:{port}/v1", 0.2) == "no answer in time"
