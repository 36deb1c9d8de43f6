"""Shards on any ``concurrent.futures.Executor``: processes, Dask, MPI, Ray, Parsl."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from typing import Any

from ..contract.errors import SiteError, WorkerLostError
from ..contract.types import Json

WorkShard = Callable[[dict[str, Json]], dict[str, Json]]
"""An importable function: executors ship it by reference."""


class ExecutorBackend:
    """Runs shards on an executor that a factory makes.

    Args:
        factory: Makes the executor; called off the loop, and again to rebuild.
        work: What runs there.
        workers: Shards that it can work on at a time.
        name: What messages call it.
    """

    def __init__(
        self, factory: Callable[[], Executor], work: WorkShard, workers: int, name: str
    ) -> None:
        self._factory, self._work, self._workers = factory, work, workers
        self._executor: Executor | None = None
        self.name = name

    def capacity(self) -> int:
        """Return the number of workers; none while it is broken."""
        return self._workers if self._executor is not None else 0

    async def start(self) -> None:
        """Make the executor."""
        self._executor = await asyncio.to_thread(self._factory)

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Run one order.

        Raises:
            WorkerLostError: A worker died; the executor may be broken with it.
            SiteError: The executor takes no work.
        """
        try:
            future = self._submitted(order)
        except (BrokenExecutor, RuntimeError) as error:
            raise SiteError(f"{self.name}: takes no work: {error}") from error
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except (BrokenExecutor, CancelledError) as error:
            raise WorkerLostError(f"{self.name}: a worker died: {error}") from error
        except Exception as error:
            raise self._translated(error) from error

    def _submitted(self, order: dict[str, Json]) -> Future[dict[str, Json]]:
        if self._executor is None:
            raise SiteError(f"{self.name}: not started")
        return self._executor.submit(self._work, order)

    def _translated(self, error: Exception) -> SiteError:
        return WorkerLostError(f"{self.name}: {type(error).__name__}: {error}")

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: an executor ends with its coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Throw the executor away and make a new one."""
        await self.close(0.0)
        await self.start()

    async def close(self, grace_s: float = 10.0) -> None:
        """Shut the executor down; what does not end in time is left behind."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        executor.shutdown(wait=False, cancel_futures=True)
        if grace_s > 0:
            try:
                await asyncio.wait_for(asyncio.to_thread(executor.shutdown, True), grace_s)
            except TimeoutError:
                self._abandon(executor)

    def _abandon(self, executor: Executor) -> None:
        """End workers that did not end by themselves, where the executor shows them."""
        processes: dict[int, Any] = getattr(executor, "_processes", None) or {}
        for process in processes.values():
            process.kill()
