"""Model servers in this process, under the real fleet: no sockets, and the engine's own times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import aiohttp
import orjson
from multidict import CIMultiDict

from fanfold.backends.core.parsing import ServerLoad
from fanfold.backends.fleet.failures import HTTPAnswer
from fanfold.backends.fleet.policy import FleetPolicy
from fanfold.backends.fleet.transport import Transport
from fanfold.backends.simulated.engine import (
    BLOCK_TOKENS,
    Engine,
    EngineDriver,
    EngineRequest,
    EngineSpec,
    hash_blocks,
)

MODEL = "in-memory"
CHARS_PER_TOKEN = 4
_HEADERS = CIMultiDict[str]()

AnswerLength: TypeAlias = Callable[[Mapping[str, Any]], int]
"""Returns the tokens of the answer to a request."""


class MemoryServer:
    """One model server.

    Attributes:
        engine: Its engine.
        alive: Whether it accepts connections.
        requests: Requests that it has received.
        metrics_reads: Requests for its metrics.
        seen: Running and waiting requests, as a test has noted them.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.engine = Engine(spec)
        self.alive = True
        self.requests = 0
        self.metrics_reads = 0
        self.seen = (0, 0)
        self._driver = EngineDriver(self.engine)
        self._open = dict[EngineRequest, asyncio.Future[None]]()

    async def complete(self, body: Mapping[str, Any], answer_tokens: int) -> dict[str, Any]:
        """Answer a request when the engine has computed it, with ``max_tokens`` at most.

        Raises:
            aiohttp.ClientError: The server is dead, or dies.
        """
        if not self.alive:
            raise aiohttp.ClientConnectionError("connection refused")
        self.requests += 1
        limit = int(body.get("max_tokens") or answer_tokens)
        text = "\n".join(f"{message['role']}:{message['content']}" for message in body["messages"])
        tokens = -(-len(text) // CHARS_PER_TOKEN)
        keys = hash_blocks(text, BLOCK_TOKENS * CHARS_PER_TOKEN)
        future = asyncio.get_running_loop().create_future()
        written = min(answer_tokens, limit)
        request = EngineRequest(keys, tokens, written, on_progress=self._on_progress)
        self._open[request] = future
        self._driver.submit(request)
        try:
            await future
        except asyncio.CancelledError:
            self._driver.cancel(request)
            raise
        finally:
            self._open.pop(request, None)
        return _completion(request, "stop" if answer_tokens <= limit else "length")

    def _on_progress(self, request: EngineRequest) -> None:
        future = self._open.get(request)
        if request.ended_at is not None and future is not None and not future.done():
            future.set_result(None)

    def kill(self) -> None:
        """Break all connections, and refuse new ones."""
        self.alive = False
        for request, future in list(self._open.items()):
            self._driver.cancel(request)
            if not future.done():
                future.set_exception(aiohttp.ServerDisconnectedError())

    def revive(self) -> None:
        """Start again with an empty cache."""
        self.engine = Engine(self.engine.spec)
        self._driver = EngineDriver(self.engine)
        self.alive = True

    @property
    def load(self) -> ServerLoad:
        """Return running and waiting requests."""
        return ServerLoad(self.engine.running, self.engine.waiting)


def _completion(request: EngineRequest, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "yes"}
    total = request.prompt_tokens + request.answer_tokens
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.answer_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
        },
    }


class MemoryTransport(Transport):
    """Transport to servers in this process.

    Args:
        policy: The fleet's policy.
        servers: The servers by base URL.
        answer_length: Returns the tokens of an answer; None: ``max_tokens`` of the request.
    """

    def __init__(
        self,
        policy: FleetPolicy,
        servers: Mapping[str, MemoryServer],
        answer_length: AnswerLength | None = None,
    ) -> None:
        super().__init__(policy)
        self._servers = servers
        self._answer_length = answer_length or (lambda body: int(body["max_tokens"]))
        self._request_s = policy.timeout.request_s

    async def send(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        proxied: bool = False,  # noqa: ARG002 - the interface
    ) -> HTTPAnswer:
        """Answer one request.

        Raises:
            aiohttp.ClientError: The server is dead, or dies.
            TimeoutError: No answer in time.
        """
        self.loop = asyncio.get_running_loop()
        request = orjson.loads(body)
        server = self._servers[url.removesuffix("/chat/completions")]
        async with asyncio.timeout(self._request_s):
            document = await server.complete(request, self._answer_length(request))
        return HTTPAnswer(200, _HEADERS, orjson.dumps(document), headers)

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,  # noqa: ARG002 - the interface
        proxied: bool = False,  # noqa: ARG002 - the interface
    ) -> HTTPAnswer:
        """Answer a request for the list of models, or for metrics.

        Raises:
            aiohttp.ClientError: The server is dead.
        """
        root = url.rpartition("/")[0]
        server = self._servers[root if root in self._servers else f"{root}/v1"]
        if not server.alive:
            raise aiohttp.ClientConnectionError("connection refused")
        if url.endswith("/models"):
            document: Any = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            return HTTPAnswer(200, _HEADERS, orjson.dumps(document), headers)
        if url.endswith("/metrics"):
            server.metrics_reads += 1
            load = server.load
            lines = (
                "# TYPE vllm:num_requests_running gauge",
                f"vllm:num_requests_running {load.running}",
                "# TYPE vllm:num_requests_waiting gauge",
                f"vllm:num_requests_waiting {load.waiting}",
            )
            return HTTPAnswer(200, _HEADERS, "\n".join(lines).encode() + b"\n", headers)
        return HTTPAnswer(404, _HEADERS, b"", headers)


def open_servers(spec: EngineSpec, count: int) -> dict[str, MemoryServer]:
    """Return servers by base URL."""
    return {f"http://server-{n}.test:8000/v1": MemoryServer(spec) for n in range(count)}


def sum_hits(servers: Sequence[MemoryServer]) -> float:
    """Return the share of prompt blocks that were found in the servers' caches."""
    queries = sum(server.engine.cache.queries for server in servers)
    return sum(server.engine.cache.hits for server in servers) / max(queries, 1)
