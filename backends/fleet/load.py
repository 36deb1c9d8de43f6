"""Servers' own load from /metrics or /load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import orjson

from ..core.parsing import ServerLoad, parse_load_metrics
from .endpoint import Endpoint, EndpointSpec
from .failures import HTTPAnswer
from .policy import FleetPolicy, LoadPolicy
from .transport import Transport

_GAUGES_AT_ONCE: Final = 64
_OK: Final = 200


async def read_server_loads(
    specs: Sequence[EndpointSpec], timeout_s: float = 2.0
) -> list[ServerLoad]:
    """Ask endpoints for their load: by ``/metrics``, or else ``/load``.

    Args:
        specs: The endpoints.
        timeout_s: Longest wait for one answer, in seconds.
    """
    gate, transport = asyncio.Semaphore(_GAUGES_AT_ONCE), Transport(FleetPolicy())

    async def one(spec: EndpointSpec) -> ServerLoad:
        async with gate:
            return await _ask(transport, Endpoint(spec), timeout_s)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(spec)) for spec in specs]
    finally:
        await transport.aclose()
    return [task.result() for task in tasks]


async def _ask(transport: Transport, endpoint: Endpoint, timeout_s: float) -> ServerLoad:
    root = endpoint.url.rpartition("/")[0]
    for path in ("metrics", "load"):
        try:
            answer = await transport.get(
                f"{root}/{path}", await endpoint.headers(), timeout_s, endpoint.spec.proxied
            )
        except (aiohttp.ClientError, TimeoutError):
            return ServerLoad()
        gauges = parse_server_load(answer.body) if answer.status == _OK else None
        if gauges is not None and gauges != ServerLoad(
            0
        ):  # a server that does not count says 0 too
            return gauges
    return ServerLoad()


def parse_server_load(body: bytes) -> ServerLoad | None:
    """Read the answer of vLLM's ``/metrics`` or ``/load``; None where it says neither."""
    if (gauges := parse_load_metrics(body)) is not None:
        return gauges
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    load = document.get("server_load") if isinstance(document, dict) else None
    return ServerLoad(load) if isinstance(load, int) else None


_LOG: Final = logging.getLogger(__name__)
_AT_ONCE: Final = 32


class LoadPoller:
    """Asks all endpoints for their load, again and again.

    Args:
        policy: What to ask, and how often.
        endpoints: All members; the list may change.
        transport: The connections.
        refresh: Called with an endpoint whose foreign load has changed.
    """

    def __init__(
        self,
        policy: LoadPolicy,
        endpoints: Sequence[Endpoint],
        transport: Transport,
        refresh: Callable[[Endpoint], None],
    ) -> None:
        self._policy = policy
        self._endpoints = endpoints
        self._transport = transport
        self._refresh = refresh
        self._task: asyncio.Task[None] | None = None
        self._silent: set[Endpoint] = set()

    def start(self) -> None:
        """Begin to look, in the running loop; no effect when it has begun."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(endpoint: Endpoint) -> None:
            async with gate:
                await self._poll(endpoint)

        while True:
            async with asyncio.TaskGroup() as group:
                for endpoint in self._endpoints:
                    if endpoint.alive:
                        group.create_task(one(endpoint))
            await asyncio.sleep(self._policy.every_s)

    async def _poll(self, endpoint: Endpoint) -> None:
        """Ask one endpoint; who says nothing is judged by the fleet's own requests alone."""
        root = endpoint.url.rpartition("/")[0]
        try:
            answer = await self._transport.get(
                f"{root}/{self._policy.source}",
                await endpoint.headers(),
                self._policy.timeout_s,
                endpoint.spec.proxied,
            )
            total = count_requests(answer)
        except (aiohttp.ClientError, TimeoutError):
            total = None
        if total is None and endpoint not in self._silent:
            self._silent.add(endpoint)
            _LOG.info("endpoint %s does not tell its load", endpoint.label)
        foreign = max(0, (total or 0) - endpoint.in_flight)
        if foreign != endpoint.foreign_load:
            endpoint.foreign_load = foreign
            self._refresh(endpoint)


def count_requests(answer: HTTPAnswer) -> int | None:
    """Return the requests that a server works on or has waiting, or None when it does not say."""
    gauges = parse_server_load(answer.body) if answer.status == _OK else None
    return None if gauges is None else (gauges.running or 0) + (gauges.waiting or 0)
