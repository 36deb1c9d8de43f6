"""The HTTP calls of the SDK and of managers, over the task queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from .broker import Broker
from .faults import Faults
from .identity import Identity
from .records import Json, RefusedError
from .task_queue import TaskQueue

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

VERSIONS = {"api": "1.0", "min_ep_version": "2.0.0", "min_sdk_version": "2.0.0"}
LARGEST_BODY = 64 * 1024 * 1024


def make_app(task_queue: TaskQueue, broker: Broker, faults: Faults) -> web.Application:
    """Build the service's HTTP application."""
    calls, login = _Calls(task_queue, broker), _Login()
    app = web.Application(
        client_max_size=LARGEST_BODY, middlewares=[_as_the_service(task_queue, faults)]
    )
    app.add_routes(
        [
            web.get("/v2/version", calls.version),
            web.get("/v2/get_amqp_result_connection_url", calls.result_queue),
            web.post("/v2/functions", calls.register_function),
            web.post("/v3/functions", calls.register_function),
            web.post("/v3/endpoints", calls.register_manager),
            web.put("/v3/endpoints/{id}", calls.register_manager),
            web.post("/v3/endpoints/{id}/submit", calls.submit),
            web.get("/v2/endpoints/{id}/status", calls.endpoint_status),
            web.get("/v2/taskgroup/{id}", calls.group),
            web.get("/v2/tasks/{id}", calls.task),
            web.post("/v2/batch_status", calls.batch_status),
            web.get("/.well-known/openid-configuration", login.configuration),
            web.get("/jwk.json", login.keys),
            web.post("/v2/oauth2/token", login.token),
            web.get("/v2/oauth2/userinfo", login.user),
        ]
    )
    return app


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as refused:
        body = {"code": refused.code, "reason": refused.reason, "status": "Failed"}
        return web.json_response(body | {"http_status_code": refused.status}, status=refused.status)


def _as_the_service(
    task_queue: TaskQueue, faults: Faults
) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        info = request.match_info.route.resource
        with task_queue.lock:
            task_queue.records.stats[
                f"{request.method} {info.canonical if info else request.path}"
            ] += 1
        await asyncio.sleep(faults.latency_s)
        if faults.take("pages"):
            return web.Response(text="<html>Sign in to go on</html>", content_type="text/html")
        return await _refusals(request, handler)

    return middleware


class _Calls:
    """One method per call."""

    def __init__(self, task_queue: TaskQueue, broker: Broker) -> None:
        self._task_queue, self._broker = task_queue, broker

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response(VERSIONS)

    async def result_queue(self, _: web.Request) -> web.Response:
        where = {"queue_prefix": self._broker.group_prefix, "connection_url": self._broker.url}
        return web.json_response(where)

    async def register_function(self, request: web.Request) -> web.Response:
        return web.json_response(self._task_queue.register_function(await request.json()))

    async def register_manager(self, request: web.Request) -> web.Response:
        known = request.match_info.get("id")
        return web.json_response(await asyncio.to_thread(self._task_queue.register_manager, known))

    async def submit(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        size = len(await request.read())
        answer = await asyncio.to_thread(
            self._task_queue.submit, request.match_info["id"], body, size
        )
        return web.json_response(answer)

    async def endpoint_status(self, request: web.Request) -> web.Response:
        endpoint_id = request.match_info["id"]
        online = self._task_queue.online(endpoint_id)
        with self._task_queue.lock:
            if endpoint_id not in self._task_queue.records.endpoints:
                raise RefusedError(404, "ENDPOINT_NOT_FOUND", endpoint_id)
            details = self._task_queue.records.endpoints[endpoint_id].state
        return web.json_response({"status": "online" if online else "offline", "details": details})

    async def group(self, request: web.Request) -> web.Response:
        return web.json_response(self._task_queue.group(request.match_info["id"]))

    async def task(self, request: web.Request) -> web.Response:
        task_id = request.match_info["id"]
        found = self._task_queue.status_of([task_id])
        if task_id not in found:
            raise RefusedError(404, "TASK_NOT_FOUND", task_id)
        return web.json_response(found[task_id])

    async def batch_status(self, request: web.Request) -> web.Response:
        asked: Json = await request.json()
        return web.json_response({"results": self._task_queue.status_of(asked["task_ids"])})


class _Login:
    """The calls of Globus Auth, with which an application logs in."""

    def __init__(self) -> None:
        self._identity = Identity()

    async def configuration(self, request: web.Request) -> web.Response:
        answer = {
            "issuer": "stand-in",
            "jwks_uri": f"http://{request.host}/jwk.json",
            "id_token_signing_alg_values_supported": ["RS512"],
        }
        return web.json_response(answer)

    async def keys(self, _: web.Request) -> web.Response:
        return web.json_response(self._identity.keys())

    async def token(self, request: web.Request) -> web.Response:
        scopes = str((await request.post()).get("scope", ""))
        return web.json_response(
            self._identity.tokens(scopes, request.headers.get("Authorization", ""))
        )

    async def user(self, _: web.Request) -> web.Response:
        return web.json_response(self._identity.user())
