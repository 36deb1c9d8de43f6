"""One endpoint of Globus Compute as a place where shards run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Final

from ...core.errors import SiteError, WorkerLostError
from ...core.protocols import Backend
from ...core.types import Json
from .desk import Desk

logger = logging.getLogger(__name__)

_RETURN_S: Final = 600.0
"""Seconds for which an endpoint that went offline is waited for at a time."""


class GlobusBackend:
    """One endpoint.

    Args:
        endpoint: The endpoint's UUID.
        desk: The run's desk, shared by its endpoints.
        endpoints: UUIDs of all of the run's endpoints.
        workers: Shards that this one works on at a time.
    """

    def __init__(self, endpoint: str, desk: Desk, endpoints: Sequence[str], workers: int) -> None:
        self._endpoint, self.name = endpoint, f"endpoint {endpoint}"
        self._desk, self._endpoints = desk, list(endpoints)
        self._workers, self._started = workers, False

    def capacity(self) -> int:
        """Return the number of workers; none while the endpoint is offline."""
        return self._workers if self._started and self._desk.asking.up(self._endpoint) else 0

    async def start(self) -> None:
        """Connect, and see that the endpoint is online.

        Raises:
            ConfigurationError: No login, or the service knows no such endpoint or refuses it.
            SiteError: The endpoint is offline, or the service does not answer.
        """
        if not self._started:
            await self._desk.open()
            self._started = True
        try:
            await self._desk.asking.check(self._endpoint)
        except SiteError:
            self._desk.asking.suspect(self._endpoint)
            raise

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on.

        Raises:
            WorkerLostError: The endpoint went offline, or the task failed.
            SiteError: The order could not be posted.
            ConfigurationError: It never can be: no permission, no such function, too large.
            RunStoppedError: The result is too large to be carried.
        """
        if not self._started:
            raise SiteError(f"{self.name}: not started")
        try:
            return await self._desk.submit(self._endpoint, order)
        except WorkerLostError:
            raise
        except SiteError:
            self._desk.asking.suspect(self._endpoint)
            raise

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return, by shard, what earlier coordinators of the run posted to the endpoint.

        Each answer raises :class:`WorkerLostError` when its tasks failed, are forgotten, or take
        longer than their worker was given.
        """
        found = self._desk.tasks.leavings(self._endpoint, self._endpoints, self._desk.asking)
        if found:
            logger.warning(
                "%s: %d shards of an earlier life are asked after", self.name, len(found)
            )
        return dict(found)

    async def rebuild(self) -> None:
        """Wait until the endpoint is online again; nothing else of it can break.

        Raises:
            SiteError: It is not, after ten minutes.
            ConfigurationError: The service refuses it.
        """
        if not self._started:
            return await self.start()
        loop = asyncio.get_running_loop()
        end = loop.time() + _RETURN_S
        while True:
            try:
                return await self._desk.asking.check(self._endpoint)
            except SiteError:
                if loop.time() > end:
                    raise
            await asyncio.sleep(self._desk.pace.last_s)

    async def stop(self) -> None:
        """Leave summaries that come from now on for a later coordinator, too; workers go on."""
        self._desk.tasks.leave()

    async def close(self, grace_s: float = 10.0) -> None:  # noqa: ARG002 - it never waits
        """Leave at once; tasks go on at the endpoint, for a later coordinator to find."""
        if self._started:
            self._started = False
            await self._desk.close()


def globus_backends(endpoints: Sequence[str], workers: int, desk: Desk) -> list[Backend]:
    """Return a backend per endpoint, the workers divided among them.

    Args:
        endpoints: UUIDs of the endpoints.
        workers: Workers over all endpoints; each endpoint has at least one.
        desk: The run's desk.
    """
    count = len(endpoints)
    shares = [max(1, workers // count + (n < workers % count)) for n in range(count)]
    return [
        GlobusBackend(endpoint, desk, endpoints, share)
        for endpoint, share in zip(endpoints, shares, strict=True)
    ]
