"""An HTTP server that answers with the bytes of a test, and records what it received."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import orjson

from .conftest import completion


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Request], Iterable[bytes]]


def head(status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def plain(body: bytes, status: str = "200 OK", **headers: str) -> list[bytes]:
    told = {"Content_Type": "application/json", "Content_Length": str(len(body))} | headers
    return [head(status, **told), body]


def good(_: Request) -> list[bytes]:
    return plain(orjson.dumps(completion()))


@dataclass
class RawServer:
    """Serves one answer to every request; closes the connection after each."""

    answer: Answer = good
    seen: list[Request] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {n.lower(): v.strip() for n, _, v in (x.partition(":") for x in lines if x)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, target, _ = first.split(" ")
            request = Request(method, target, headers, body)
            self.seen.append(request)
            for block in self.answer(request):
                writer.write(block)
                self.sent += len(block)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(answer: Answer = good) -> AsyncIterator[RawServer]:
    """Serve on a free port of the loopback."""
    raw = RawServer(answer)
    server = await asyncio.start_server(raw.attend, "127.0.0.1", 0)
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
