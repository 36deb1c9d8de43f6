"""Servers' own load from /metrics or /load."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import orjson

from ..core.lazy_tls import aiohttp
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
_LEAST_AHEAD: Final = 2
_FORGET: Final = 0.95
"""Factor on the largest number of requests that a server has processed, from poll to poll."""


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
        self._processed: dict[Endpoint, int] = {}
        self._queueing: set[Endpoint] = set()
        self._look_ahead = policy.look_ahead if policy.source == "metrics" else None

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

        policy = self._policy
        while True:
            async with asyncio.TaskGroup() as group:
                for endpoint in self._endpoints:
                    if endpoint.alive and (policy.shared or self._is_polled(endpoint)):
                        group.create_task(one(endpoint))
            least_s = 0.0 if policy.shared else len(self._endpoints) / policy.polls_per_s
            await asyncio.sleep(max(policy.every_s, least_s))

    def _is_polled(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint that is not shared is a server with metrics of its own.

        Gateways and services have none, and count each request.
        """
        spec = endpoint.spec
        behind = spec.proxied or spec.watch is not None or spec.probe_model is not None
        return not (behind or endpoint.quota is not None or endpoint in self._silent)

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
            load = read_load(answer)
        except (aiohttp.ClientError, TimeoutError):
            load = None
        if load is not None and self._look_ahead is not None:
            self._set_queue_width(endpoint, load, self._look_ahead)
        if load is None and endpoint not in self._silent:
            self._silent.add(endpoint)
            _LOG.info("endpoint %s does not report its load", endpoint.label)
        if not self._policy.shared:
            return
        foreign = max(0, count_requests(load) - endpoint.in_flight)
        if foreign != endpoint.foreign_load:
            endpoint.foreign_load = foreign
            self._refresh(endpoint)

    def _set_queue_width(self, endpoint: Endpoint, load: ServerLoad, look_ahead: float) -> None:
        """Limit the requests in flight to those that the server processes, and a few that wait.

        A server that was just sent many requests has not started them all yet. So the limit is
        lowered only if two polls in a row show too many that wait, and never below what the server
        has processed lately. A server without a queue may process more.
        """
        running, waiting = load.running or 0, load.waiting or 0
        most = max(running, math.floor(_FORGET * self._processed.get(endpoint, 0)))
        self._processed[endpoint] = most
        ahead = max(_LEAST_AHEAD, math.ceil(look_ahead * most))
        width = endpoint.queue_width
        if waiting > ahead:
            if endpoint not in self._queueing:
                self._queueing.add(endpoint)
                return
            width = max(most + ahead, endpoint.in_flight + ahead - waiting)
        elif width is not None and endpoint.in_flight >= width and waiting < ahead:
            width = endpoint.in_flight + ahead - waiting if waiting else 2 * width
        self._queueing.discard(endpoint)
        if width != endpoint.queue_width:
            endpoint.queue_width = width
            self._refresh(endpoint)


def read_load(answer: HTTPAnswer) -> ServerLoad | None:
    """Return the load that a server reports, or None if it reports none."""
    return parse_server_load(answer.body) if answer.status == _OK else None


def count_requests(load: ServerLoad | None) -> int:
    """Return the number of running and waiting requests of a server; 0 if it is unknown."""
    return 0 if load is None else (load.running or 0) + (load.waiting or 0)
