"""Stand-ins for servers of a site: a model server, Aegis' registry, a FIRST gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = Any
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve(*routes: web.RouteDef) -> AsyncIterator[str]:
    """Serve on a free port of loopback; yields the URL without a path."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield site.name
    finally:
        await runner.cleanup()


def completion(model: str) -> Json:
    message = {"role": "assistant", "content": "fine"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


@dataclass
class Model:
    """A model server that is not simulated, as far as anybody can tell."""

    ids: list[str] = field(default_factory=lambda: ["m"])
    asked: list[str] = field(default_factory=list)

    def routes(self) -> list[web.RouteDef]:
        async def models(_: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": i, "max_model_len": 4096} for i in self.ids]})

        async def chat(request: web.Request) -> web.Response:
            name = (await request.json())["model"]
            if name not in self.ids:
                error = {"message": f"no model {name}", "type": "NotFoundError", "code": 404}
                return web.json_response({"error": error}, status=404)
            self.asked.append(name)
            return web.json_response(completion(name))

        async def load(_: web.Request) -> web.Response:
            return web.Response(
                text='vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting 5.0\n'
            )

        return [
            web.get("/v1/models", models),
            web.post("/v1/chat/completions", chat),
            web.get("/metrics", load),
        ]


@dataclass
class Registry:
    """Aegis' registry; what it lists may be changed."""

    services: list[Json] = field(default_factory=list)

    def list_url(
        self,
        url: str,
        model: str | None = None,
        status: str = "healthy",
        last_seen: float = 1_000_000.0,
    ) -> None:
        host, _, port = url.partition("//")[2].partition(":")
        service = {"service_id": f"vllm-{host}-{port}", "host": host, "port": int(port)}
        metadata = {"model": model} if model else {}
        self.services = [one for one in self.services if one["service_id"] != service["service_id"]]
        self.services.append(
            {
                **service,
                "service_type": "vllm",
                "status": status,
                "last_seen": last_seen,
                "metadata": metadata,
            }
        )

    def routes(self) -> list[web.RouteDef]:
        async def services(request: web.Request) -> web.Response:
            assert request.query["type"] == "vllm"
            return web.json_response(self.services)

        return [web.get("/services", services)]


@dataclass
class First:
    """A FIRST gateway with two clusters that call one model differently."""

    good: set[str] = field(default_factory=lambda: {"good"})
    asked: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[tuple[int, Json]] = field(default_factory=list)

    def routes(self) -> list[web.RouteDef]:
        def refused(request: web.Request) -> web.Response | None:
            if request.headers.get("Authorization", "").removeprefix("Bearer ") in self.good:
                return None
            error = {"code": "unauthorized", "message": "no such token", "info": {}}
            return web.json_response({"error": error}, status=401)

        async def listed(request: web.Request) -> web.Response:
            offer = {"endpoints": ["/v1/chat/completions"]}
            clusters = {
                "sophia": {"frameworks": {"vllm": {"models": ["org/m"], **offer}}},
                "metis": {"frameworks": {"api": {"models": ["m"], **offer}}},
            }
            return refused(request) or web.json_response({"clusters": clusters})

        async def chat(request: web.Request) -> web.Response:
            if (no := refused(request)) is not None:
                return no
            if self.refusals:
                status, body = self.refusals.pop(0)
                return web.json_response(body, status=status)
            await asyncio.sleep(0.02)  # so that the next request finds this one in flight
            body = await request.json()
            assert not body.get("stream")
            self.asked.append((request.match_info["cluster"], body["model"]))
            return web.json_response(completion(body["model"]))

        return [
            web.get("/resource_server/list-endpoints", listed),
            web.post("/resource_server/{cluster}/{framework}/v1/chat/completions", chat),
        ]
