"""What endpoints say of their load, for people to look at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import aiohttp
import orjson

from ..core.parsing import Gauges, read_metrics
from .address import EndpointSpec
from .endpoint import Endpoint
from .policy import FleetPolicy
from .transport import Transport

_AT_ONCE: Final = 64
_OK: Final = 200


async def read_gauges(specs: Sequence[EndpointSpec], timeout_s: float = 2.0) -> list[Gauges]:
    """Ask endpoints for their load: by ``/metrics``, or else ``/load``.

    Args:
        specs: The endpoints.
        timeout_s: Longest wait for one answer, in seconds.
    """
    gate, transport = asyncio.Semaphore(_AT_ONCE), Transport(FleetPolicy())

    async def one(spec: EndpointSpec) -> Gauges:
        async with gate:
            return await _ask(transport, Endpoint(spec), timeout_s)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(spec)) for spec in specs]
    finally:
        await transport.aclose()
    return [task.result() for task in tasks]


async def _ask(transport: Transport, endpoint: Endpoint, timeout_s: float) -> Gauges:
    root = endpoint.url.rpartition("/")[0]
    for path in ("metrics", "load"):
        try:
            answer = await transport.get(
                f"{root}/{path}", await endpoint.headers(), timeout_s, endpoint.spec.proxied
            )
        except (aiohttp.ClientError, TimeoutError):
            return Gauges()
        gauges = parse_gauges(answer.body) if answer.status == _OK else None
        if gauges is not None and gauges != Gauges(0):  # a server that does not count says 0 too
            return gauges
    return Gauges()


def parse_gauges(body: bytes) -> Gauges | None:
    """Read the answer of vLLM's ``/metrics`` or ``/load``; None where it says neither."""
    if (gauges := read_metrics(body)) is not None:
        return gauges
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    load = document.get("server_load") if isinstance(document, dict) else None
    return Gauges(load) if isinstance(load, int) else None
