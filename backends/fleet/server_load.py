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
    """Query endpoints for their load: from ``/metrics``, or else ``/load``.

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
        # a server that does not count requests reports 0 too
        if gauges is not None and gauges != ServerLoad(0):
            return gauges
    return ServerLoad()


def parse_server_load(body: bytes) -> ServerLoad | None:
    """Parse the answer of vLLM's ``/metrics`` or ``/load``; None if it is neither."""
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
    """Polls all endpoints for their load.

    Args:
        policy: What to poll, and how often.
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
        """Start polling in the running loop; no effect if it has started."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop polling."""
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
        """Poll one endpoint; if it reports no load, only the fleet's own requests count."""
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
            _LOG.info("endpoint %s does not report its load", endpoint.label)
        foreign = max(0, (total or 0) - endpoint.in_flight)
        if foreign != endpoint.foreign_load:
            endpoint.foreign_load = foreign
            self._refresh(endpoint)


def count_requests(answer: HTTPAnswer) -> int | None:
    """Return the number of running and waiting requests of a server, or None if it is unknown."""
    gauges = parse_server_load(answer.body) if answer.status == _OK else None
    return None if gauges is None else (gauges.running or 0) + (gauges.waiting or 0)
