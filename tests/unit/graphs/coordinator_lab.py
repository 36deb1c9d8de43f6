"""A coordinator over backends whose answers the test gives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fanfold.backends.budget.leases import LeaseManager
from fanfold.backends.core.messages import ShardResult
from fanfold.backends.core.types import Item, Json, Shard
from fanfold.backends.storage.journal import Journal
from fanfold.backends.workers.member import PoolPolicy
from fanfold.backends.workers.pool import BackendPool
from fanfold.configs.loader import load_config
from fanfold.graphs.remote.coordinator import Coordinator
from fanfold.graphs.remote.heartbeat import heartbeat_file
from fanfold.graphs.remote.task_template import TaskTemplate
from fanfold.nodes.context import AnsweredTask
from fanfold.nodes.shard.progress import Progress

ITEMS = 100
POLICY = PoolPolicy(poll_s=0.005, rebuild_pause_s=0.001)


def template(
    folder: Path,
    *,
    shared: bool = True,
    backend: dict[str, Any] | None = None,
    streams: int = 1,
    **changes: Any,
) -> TaskTemplate:
    """Return the template of tasks for one worker, which by default runs one item at a time."""
    config = load_config(
        {
            "task": {"prompt": "{x}"},
            "endpoints": {"urls": ["http://127.0.0.1:9/v1"]},
            "limits": {"streams": streams},
            "backend": backend or {},
        }
    ).config
    fields: dict[str, Any] = {
        "config": config,
        "settings": {},
        "run": {"token": "t", "id": "r", "model": "m"},
        "folder": folder,
        "journal": folder if shared else None,
        "token_prices": {},
    }
    return TaskTemplate(**fields | changes)


class Site:
    """A backend whose answers the test gives."""

    def __init__(self, name: str = "site", room: int = 8) -> None:
        self.name, self.room = name, room
        self.orders = list[dict[str, Json]]()
        self.answers = list[asyncio.Future[dict[str, Json]]]()
        self.left = dict[str, Awaitable[dict[str, Json]]]()
        self.fails = list[Exception]()
        self.started = self.rebuilt = self.stops = self.closed = 0

    def capacity(self) -> int:
        return self.room

    async def start(self) -> None:
        if self.fails:
            raise self.fails.pop(0)
        self.started += 1

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        self.orders.append(order)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        return self.left

    async def rebuild(self) -> None:
        self.rebuilt += 1
        if self.fails:
            raise self.fails.pop(0)
        self.room = 1

    async def stop(self) -> None:
        self.stops += 1
        await asyncio.sleep(0)

    async def close(self, grace_s: float = 10.0) -> None:
        self.closed += grace_s > 0

    def answer(self, n: int) -> None:
        self.answers[n].set_result(summary(self.orders[n]["shard"], range(1)))


class Lab:
    """A coordinator over some backends, by default one."""

    def __init__(
        self,
        folder: Path,
        *sites: Site,
        shared: bool = True,
        policy: PoolPolicy = POLICY,
        backend: dict[str, Any] | None = None,
        streams: int = 1,
    ) -> None:
        self.folder, self.sites = folder, sites or (Site(),)
        self.site = self.sites[0]
        self.ledger = Journal(folder, "r", ITEMS)
        self.ledger.start_session("test", 1.0)
        self.progress = Progress(total=ITEMS)
        terms = template(folder, shared=shared, backend=backend, streams=streams)
        self.pool = BackendPool(self.sites, policy)
        lender = LeaseManager(None, terms.config, "m", self.pool.capacity)
        self.coordinator = Coordinator(self.pool, terms, self.ledger, self.progress, lender)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        try:
            async with self.coordinator.open_pool():
                yield
        finally:
            await self.ledger.aclose()

    def send(self, lo: int, hi: int) -> asyncio.Task[AnsweredTask | None]:
        """Run a shard until its first answer; None without one."""
        return asyncio.create_task(self._first_answer(lo, hi))

    async def _first_answer(self, lo: int, hi: int) -> AnsweredTask | None:
        async with aclosing(self.answers(lo, hi)) as answers:
            async for answer in answers:
                return answer
        return None

    def answers(self, lo: int, hi: int) -> AsyncGenerator[AnsweredTask, None]:
        """Run a shard, and yield its answers."""

        async def remaining() -> list[Item]:
            open_ = [n for n in range(lo, hi) if not self.ledger.is_finished(n)]
            return [Item(n, str(n), {}, None) for n in open_]

        return self.coordinator.run_shard(Shard(lo, hi), remaining)

    def begin(self, shard: str, attempt: int) -> None:
        """Mark a task as begun, as its worker does."""
        os.utime(heartbeat_file(self.folder, "t", shard, attempt), (1, 1))

    def names(self) -> set[str]:
        return {file.name for file in self.folder.iterdir() if not file.name.endswith("jsonl")}

    def ordered(self) -> list[int]:
        return sorted(item[0] for order in self.site.orders for item in order["items"])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


def record(index: int, status: str = "done") -> dict[str, Json]:
    numbers = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "lost_tokens")
    kept = {"index": index, "id": str(index), "status": status, "finished_at": "2026-01-01"}
    return (
        kept
        | {"reused": 0}
        | dict.fromkeys((*numbers, "useful_tokens", "nano_usd", "useful_nano_usd"), 1)
    )


def summary(shard: str, indices: range, **more: Any) -> dict[str, Json]:
    tally = {"done": len(indices)}
    return ShardResult(shard, 0, "0", "host:1", tally=tally, **more).to_json()
