"""The endpoints' own word on their load, for servers that others use too.

vLLM names the requests that it runs and those that wait; what is more than the fleet's own is
foreign, and counts like the fleet's own when an endpoint is chosen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp

from .answer import RawAnswer
from .endpoint import Endpoint
from .gauges import parse_gauges
from .policy import LoadPolicy
from .transport import Transport

_LOG: Final = logging.getLogger(__name__)
_OK: Final = 200
_AT_ONCE: Final = 32


class LoadWatch:
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
                await self._look(endpoint)

        while True:
            async with asyncio.TaskGroup() as group:
                for endpoint in self._endpoints:
                    if endpoint.alive:
                        group.create_task(one(endpoint))
            await asyncio.sleep(self._policy.every_s)

    async def _look(self, endpoint: Endpoint) -> None:
        """Ask one endpoint; who says nothing is judged by the fleet's own requests alone."""
        root = endpoint.url.rpartition("/")[0]
        try:
            answer = await self._transport.get(
                f"{root}/{self._policy.source}",
                await endpoint.headers(),
                self._policy.timeout_s,
                endpoint.spec.proxied,
            )
            total = read_load(answer)
        except (aiohttp.ClientError, TimeoutError):
            total = None
        if total is None and endpoint not in self._silent:
            self._silent.add(endpoint)
            _LOG.info("endpoint %s does not tell its load", endpoint.label)
        foreign = max(0, (total or 0) - endpoint.outstanding)
        if foreign != endpoint.foreign:
            endpoint.foreign = foreign
            self._refresh(endpoint)


def read_load(answer: RawAnswer) -> int | None:
    """Return the requests that a server works on or has waiting, or None when it does not say."""
    gauges = parse_gauges(answer.body) if answer.status == _OK else None
    return None if gauges is None else (gauges.running or 0) + (gauges.waiting or 0)
