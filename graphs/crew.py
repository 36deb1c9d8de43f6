"""The coordinator's side of work elsewhere: orders out, summaries and journal lines home."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final

import orjson

from ..backends.accounts.ledger import Ledger
from ..backends.contract.errors import ConfigurationError
from ..backends.contract.types import Item, Shard
from ..backends.contract.wire import Order, Summary, own_version
from ..backends.fleet.news import Gathered
from ..backends.places import is_elsewhere, shard_pool
from ..backends.sites.executor import WorkShard
from ..backends.sites.pool import ShardPool
from ..backends.sites.watch import Beat
from ..configs.models import RunConfig
from ..nodes.context import Answered
from ..nodes.progress import Progress
from .lending import Lender
from .signs import Signs, beat_file, stop_file
from .spending import Spending
from .terms import Terms
from .walltime import Walltime, walltime

logger = logging.getLogger(__name__)

_TAIL_S: Final = 1.0
_SHARE: Final = 10.0
STOP_S: Final = 10.0
"""So much longer than workers wait for items in flight does the coordinator wait for workers."""


class WorkCrew:
    """Has shards worked on by a pool of places.

    Args:
        pool: The places.
        terms: What all orders have in common.
        ledger: The run's journal.
        progress: The run's counts.
        lender: Lends orders what they may spend.
    """

    def __init__(
        self, pool: ShardPool, terms: Terms, ledger: Ledger, progress: Progress, lender: Lender
    ) -> None:
        self._pool, self._terms, self._lender = pool, terms, lender
        self._hosts = set[str]()
        self._ledger, self._progress = ledger, progress
        self._signs = Signs(terms.journal, str(terms.run["token"]))
        self._orders = Counter[str]()
        self._reading, self._rounds = asyncio.Lock(), 0
        self._resting = False
        self.gathered = Gathered()
        self._inherits = False  # whether workers of earlier lives may still write

    @property
    def nodewise(self) -> bool:
        """Say whether each worker has endpoints of its own."""
        return self._terms.nodewise

    @property
    def out(self) -> int:
        """Return how many shards are out."""
        return self._pool.out

    @property
    def nodes(self) -> tuple[int, int]:
        """Return how many hosts have worked so far, and how many of them work at most."""
        held = max(1, len(self._hosts))
        return held, min(held, self._pool.out)

    async def work(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> Answered | None:
        """Have the remaining items of a shard worked on; see the nodes' protocol."""
        name = f"{shard.lo}-{shard.hi}"
        try:
            answered = await self._answered(shard, remaining)
        finally:
            self._lender.lost(name)  # nothing, once it was answered
        return answered

    async def _answered(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> Answered | None:
        for name in self._pool.left:
            if _overlap(name, shard) and (summary := await self._pool.take_over(name)):
                await self._heard(summary)
                await self.refresh()
                return None, summary
        name = f"{shard.lo}-{shard.hi}"

        async def make(_: int) -> Order | None:
            if self._orders[name] or self._inherits:
                await self.refresh()  # a lost worker's last lines
            items = await remaining()
            if not items:
                return None
            number = self._orders[name]
            order = await asyncio.to_thread(_trimmed, self._order(name, number, items))
            lease = await self._lender.lend(order)
            self._orders[name] += 1
            return replace(order, lease=lease)

        # an attempt's number is that of its order: a shard may need several that are answered
        first = self._orders[name]
        beat = lambda attempt: self._beat(name, first + attempt)  # noqa: E731
        try:
            answered = await self._pool.run(make, beat)
        finally:
            self._forget(name, first)
        if answered is not None:
            await self._heard(answered[1])
        return answered

    def _forget(self, shard: str, first: int) -> None:
        """Look no more for signs of life of a shard's orders."""
        if (journal := self._terms.journal) is not None:
            for attempt in range(first, self._orders[shard] + 1):
                self._signs.forget(beat_file(journal, self._terms.run["token"], shard, attempt))

    async def _heard(self, summary: Summary) -> None:
        """Take note of who has answered, and of what it has spent."""
        self._hosts.add(summary.worker.partition(":")[0])
        self.gathered.add(summary.endpoints or ())
        await self._lender.answered(summary)

    def _order(self, shard: str, attempt: int, items: list[Item]) -> Order:
        terms = self._terms
        stop = stop_file(terms.journal, terms.run["token"]) if terms.journal else None
        return Order(
            shard=shard,
            attempt=attempt,
            fanfold=own_version(),
            run=terms.run,
            settings=terms.settings,
            items=[(i.index, i.id, i.row, i.problem) for i in items],
            urls=terms.urls,
            journal=str(terms.journal) if terms.journal else None,
            streams=terms.streams,
            deadline_s=terms.deadline_s,
            ends_at=terms.ends_at,
            stop_file=str(stop) if stop else None,
            carry=terms.carry,
            tariff=terms.tariff,
        )

    def _beat(self, shard: str, attempt: int) -> Beat | None:
        """Return what tells a worker's last sign of life: the file that it touches, if shared."""
        journal = self._terms.journal
        if journal is None:
            return None
        return self._signs.of(beat_file(journal, self._terms.run["token"], shard, attempt))

    async def refresh(self, worker: str | None = None) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.

        Raises:
            LedgerError: A worker's journal file is damaged.
        """
        wanted = self._rounds + 1
        async with self._reading:
            if self._resting or (worker is None and self._rounds >= wanted):
                return  # somebody began to read all after we asked
            self._rounds += worker is None
            fresh = await asyncio.to_thread(self._ledger.refresh, self._inherits, worker)
            self._progress.count_all(fresh.done, fresh.failed, fresh.spent.counts())

    async def stop(self) -> None:
        """Let no worker begin a further item, as far as they share a folder or can be told."""
        await asyncio.to_thread(self._signs.stop)
        await self._pool.stop()

    async def rest(self) -> None:
        """Read the journal a last time: what workers record from now on counts for nothing."""
        await self.refresh()
        self._resting = True

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the places and follow the workers' journal files while the block runs."""
        await asyncio.to_thread(self._signs.begin)
        tail: asyncio.Task[None] | None = None
        try:
            await self._pool.start()
            self._inherits = bool(self._pool.left)
            tail = asyncio.create_task(self._tail())
            yield
        finally:
            if tail is not None:
                tail.cancel()
                with suppress(asyncio.CancelledError):
                    await tail
            still_out = self._pool.out
            await self._pool.close()
            await self.refresh()
            await asyncio.to_thread(self._signs.end, still_out > 0)

    async def _tail(self) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(_TAIL_S, _SHARE * took))  # thousands of files take a while
            began = time.monotonic()
            await asyncio.to_thread(self._signs.look)
            await self.refresh()
            took = time.monotonic() - began


def _overlap(name: str, shard: Shard) -> bool:
    """Say whether a shard that an earlier life named ``lo-hi`` has items of this one."""
    lo, _, hi = name.partition("-")
    return lo.isdigit() and hi.isdigit() and int(lo) < shard.hi and shard.lo < int(hi)


def _trimmed(order: Order) -> Order:
    """Leave out the last items of an order that is too large; they come with the next one.

    Raises:
        ConfigurationError: The first item alone is too large.
    """
    left = order.carry
    if len(orjson.dumps(order.items)) <= left:  # as nearly always
        return order
    for count, item in enumerate(order.items):
        left -= len(orjson.dumps(item))
        if left < 0:
            if count == 0:
                msg = (
                    f"item {item[1]!r} takes more than the {order.carry:,} bytes that are sent to "
                    "a worker at a time; cut it, or run it with backend.kind: local"
                )
                raise ConfigurationError(msg)
            order.items[count:] = []
            break
    return order


def life_end(config: RunConfig, began: float) -> Walltime | None:
    """Return when a life of a run must end, or None when nothing bounds it.

    Args:
        config: The settings.
        began: When the life began, in seconds since 1970.

    Raises:
        ConfigurationError: What the environment says of the end is no time.
    """
    extra_s = STOP_S if is_elsewhere(config.backend) else 0.0
    return walltime(config.limits, os.environ, began, extra_s)


@asynccontextmanager
async def open_crew(
    work: WorkShard, terms: Terms, ledger: Ledger, progress: Progress, spends: Spending | None
) -> AsyncIterator[WorkCrew]:
    """Open the places and follow what their workers record."""
    limits = terms.config.limits
    drain_s = limits.drain_s + limits.request_timeout_s
    pool = shard_pool(terms.config.backend, work, drain_s, terms.folder)
    crew = WorkCrew(pool, terms, ledger, progress, Lender(spends, terms, pool.capacity))
    async with crew.opened():
        yield crew
