from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
import pytest
from aiohttp import web

Json = Any


@dataclass
class Canned:
    """One answer of a stub: bytes as they are, anything else as JSON; None drops the call.

    A held one comes when the test is over.
    """

    status: int = 200
    body: Json | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    held: bool = False


@dataclass
class Stub:
    """A chat server in a thread of its own; the answer is chosen by the request's model."""

    url: str = ""
    answers: dict[str, list[Canned]] = field(default_factory=dict)
    bodies: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    on_call: Callable[[], object] = lambda: None
    over: threading.Event = field(default_factory=threading.Event)

    def next(self, model: str) -> Canned:
        queue = self.answers[model]
        return queue.pop(0) if len(queue) > 1 else queue[0]


def completion(content: str | None = "hello", **changes: Json) -> dict[str, Json]:
    message = {"role": "assistant", "content": content, **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish", "stop")}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [choice | changes.pop("choice", {})],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **changes,
    }


def chunk(text: str, finish: str | None = None, **more: Json) -> dict[str, Json]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "served"}
    return head | {"choices": [choice]} | more


def event(document: Json) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def text_of(body: Json) -> str:
    """Return the text of a request's last message."""
    return str(body["messages"][-1]["content"])


@asynccontextmanager
async def serving(
    answer: Callable[[web.Request, Json], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """Serve chat completions in this loop, and ``/models``; yield the base URL."""

    async def chat(request: web.Request) -> web.StreamResponse:
        return await answer(request, await request.json())

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds; fail after 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def handler_of(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            request = orjson.loads(raw)
            stub.bodies.append(request)
            stub.keys.append(self.headers["Authorization"])
            stub.on_call()
            answer = stub.next(request["model"])
            if answer.held:
                stub.over.wait()
            if answer.body is None:
                self.close_connection = True
                return
            body = answer.body if isinstance(answer.body, bytes) else orjson.dumps(answer.body)
            self.send_response(answer.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            for name, value in (headers | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256


@pytest.fixture
def make_stub() -> Iterator[Callable[[], Stub]]:
    servers: list[ThreadingHTTPServer] = []
    stubs: list[Stub] = []

    def make() -> Stub:
        stub = Stub()
        server = Server(("127.0.0.1", 0), handler_of(stub))
        servers.append(server)
        stubs.append(stub)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return stub

    yield make
    for stub in stubs:
        stub.over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def stub(make_stub: Callable[[], Stub]) -> Stub:
    return make_stub()
