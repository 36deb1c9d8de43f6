"""WorkCrew -> Coordinator."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.budget.budget import RunBudget
from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.messages import ShardResult, ShardTask, own_version
from ...backends.core.types import Item, Shard
from ...backends.fleet.fleet import StatsCollector
from ...backends.storage.journal import JournalDelta
from ...backends.storage.journal_index import Journal
from ...backends.workers.executor import WorkShard
from ...backends.workers.factory import make_worker_pool
from ...backends.workers.member import Heartbeat
from ...backends.workers.pool import WorkerPool
from ...nodes.context import AnsweredTask
from ...nodes.shard.progress import Progress
from ...nodes.shard.remote import check_record_indices
from .heartbeat import MISSED_POLLS, ControlFiles, heartbeat_file, stop_file
from .tasks import LeaseManager, TaskTemplate


class JournalFollower:
    """Reads on in the workers' journal files.

    Args:
        ledger: The run's journal.
        progress: The run's counts.
    """

    def __init__(self, ledger: Journal, progress: Progress) -> None:
        self._ledger, self._progress = ledger, progress
        self._turn, self._rounds = asyncio.Lock(), 0
        self._resting = False
        self._reading = set[asyncio.Task[None]]()

    async def refresh(self, worker: str | None = None, *, earlier: bool = False) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.
            earlier: Whether those of earlier lives may still write.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        reading = asyncio.create_task(self._read(worker, earlier, self._rounds + 1))
        self._reading.add(reading)
        reading.add_done_callback(self._on_read)
        # whoever waits may be cancelled; the thread that reads cannot be, and reads alone
        await asyncio.shield(reading)

    def _on_read(self, reading: asyncio.Task[None]) -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            reading.exception()  # nobody may wait any more; the next one meets the same

    async def _read(self, worker: str | None, earlier: bool, wanted: int) -> None:
        async with self._turn:
            if self._resting or (worker is None and self._rounds >= wanted):
                return  # somebody began to read all after we asked
            self._rounds += worker is None
            fresh = JournalDelta()
            try:
                await asyncio.to_thread(self._ledger.refresh, fresh, earlier, worker)
            finally:
                self._progress.add_counts(fresh.done, fresh.failed, fresh.usage.to_dict())

    async def finish_reading(self, *, earlier: bool = False) -> None:
        """Read a last time: what workers record from now on counts for nothing.

        Args:
            earlier: Whether those of earlier lives may still write.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        await self.refresh(earlier=earlier)
        self._resting = True


logger = logging.getLogger(__name__)

_TAIL_S: Final = 1.0
_SHARE: Final = 10.0
STOP_GRACE_S: Final = 10.0
"""So much longer than workers wait for items in flight does the coordinator wait for workers."""


class Coordinator:
    """Has shards worked on by a pool of places.

    Args:
        pool: The places.
        terms: What all orders have in common.
        ledger: The run's journal.
        progress: The run's counts.
        lender: Lends orders what they may spend.
    """

    def __init__(
        self,
        pool: WorkerPool,
        terms: TaskTemplate,
        ledger: Journal,
        progress: Progress,
        lender: LeaseManager,
    ) -> None:
        self._pool, self._template, self._lease_manager = pool, terms, lender
        self._hosts = set[str]()
        self._ledger, self._progress = ledger, progress
        self._follower = JournalFollower(ledger, progress)
        self._control_files = ControlFiles(terms.journal, str(terms.run["token"]), pool.silence_s)
        self._orders = Counter[str]()
        self._adopting = dict[str, asyncio.Task[ShardResult | None]]()
        self._stopping: asyncio.Task[None] | None = None
        self.stats_collector = StatsCollector()
        self._has_orphans = False  # whether workers of earlier lives may still write

    @property
    def has_node_endpoints(self) -> bool:
        """Say whether each worker has endpoints of its own."""
        return self._template.has_node_endpoints

    @property
    def in_flight(self) -> int:
        """Return how many shards are out."""
        return self._pool.in_flight

    @property
    def nodes(self) -> tuple[int, int]:
        """Return how many hosts have worked so far, and how many of them work at most."""
        held = max(1, len(self._hosts))
        return held, min(held, self._pool.in_flight)

    async def run_shard(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        """Have the remaining items of a shard worked on; see the nodes' protocol."""
        name = f"{shard.lo}-{shard.hi}"
        try:
            answered = await self._run_attempts(shard, remaining)
        finally:
            self._lease_manager.mark_lost(name)  # nothing, once it was answered
        return answered

    async def _run_attempts(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        if (inherited := await self._wait_for_orphan(shard)) is not None:
            return None, inherited
        name = f"{shard.lo}-{shard.hi}"

        async def make(_: int) -> ShardTask | None:
            if self._orders[name] or self._has_orphans:
                await self.refresh()  # a lost worker's last lines
            items = await remaining()
            if not items:
                return None
            number = self._orders[name]
            order = await asyncio.to_thread(_trim_items, self._make_task(name, number, items))
            await self._create(name, number)
            lease = await self._lease_manager.lend(order)
            self._orders[name] += 1
            return replace(order, lease=lease)

        # an attempt's number is that of its order: a shard may need several that are answered
        first = self._orders[name]
        try:
            answered = await self._pool.run(
                make,
                lambda attempt: self._heartbeat(name, first + attempt),
                lambda attempt: self._revoke(name, first + attempt),
            )
        finally:  # a copy that is delivered once more has nothing to do
            for attempt in range(first, self._orders[name] + 1):
                await self._revoke(name, attempt)
        if answered is not None:
            await self._record_result(answered[1])
        return answered

    async def _wait_for_orphan(self, shard: Shard) -> ShardResult | None:
        """Wait for what an earlier life has ordered of a shard; return what came, once."""
        for name in dict.fromkeys((*self._adopting, *self._pool.orphaned)):
            if not _overlaps(name, shard):
                continue
            if name not in self._adopting:  # shards may be cut otherwise now: several wait for it
                self._adopting[name] = asyncio.create_task(self._adopt(name))
            taking = self._adopting[name]
            if not taking.done() and (summary := await asyncio.shield(taking)) is not None:
                return summary
        return None

    async def _adopt(self, name: str) -> ShardResult | None:
        """Wait for an order of an earlier life, and record what it brings."""
        summary = await self._pool.adopt(name)
        if summary is not None:
            await self._record_result(summary)
            check_record_indices(summary, self._progress.total)
            for record in summary.records or ():
                if not self._ledger.is_finished(record["index"]):
                    self._ledger.put(record)
                    self._progress.add_record(record)
            await self.refresh()
        return summary

    async def _record_result(self, summary: ShardResult) -> None:
        """Take note of who has answered, and of what it has spent."""
        self._hosts.add(summary.worker.partition(":")[0])
        self.stats_collector.add(summary.endpoints or ())
        await self._lease_manager.settle(summary)

    def _make_task(self, shard: str, attempt: int, items: list[Item]) -> ShardTask:
        terms = self._template
        stop = stop_file(terms.journal, terms.run["token"]) if terms.journal else None
        return ShardTask(
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
            carry=terms.message_bytes,
            tariff=terms.token_prices,
        )

    def _heartbeat(self, shard: str, attempt: int) -> Heartbeat | None:
        """Return what tells a worker's silence: the file that it touches, if shared."""
        file = self._heartbeat_file(shard, attempt)
        return None if file is None else self._control_files.watch(file)

    async def _create(self, shard: str, attempt: int) -> None:
        """Let an order's worker begin, if it shares the folder."""
        if (file := self._heartbeat_file(shard, attempt)) is not None:
            await asyncio.to_thread(self._control_files.create, file)

    async def _revoke(self, shard: str, attempt: int) -> None:
        """Let nobody work on an order any more, if its worker shares the folder."""
        if (file := self._heartbeat_file(shard, attempt)) is not None:
            await asyncio.to_thread(self._control_files.revoke, file)

    def _heartbeat_file(self, shard: str, attempt: int) -> Path | None:
        if (journal := self._template.journal) is None:
            return None
        return heartbeat_file(journal, self._template.run["token"], shard, attempt)

    async def refresh(self, worker: str | None = None) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        await self._follower.refresh(worker, earlier=self._has_orphans)

    async def stop(self) -> None:
        """Let no worker begin a further item, as far as they share a folder or can be told."""
        if self._stopping is None:  # thousands of shards ask for it
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        try:
            await asyncio.to_thread(self._control_files.stop_workers)
        except OSError as error:
            logger.warning("workers cannot be told by a file to stop: %s", error)
        await self._pool.stop()

    async def finish_reading(self) -> None:
        """Read the journal a last time: what workers record from now on counts for nothing."""
        await self._follower.finish_reading(earlier=self._has_orphans)

    @asynccontextmanager
    async def open_pool(self) -> AsyncIterator[None]:
        """Open the places and follow the workers' journal files while the block runs."""
        await asyncio.to_thread(self._control_files.open_session)
        try:
            await self._pool.start()
            self._has_orphans = bool(self._pool.orphaned)
            await self._follower.refresh(earlier=True)  # what was in flight as a life was killed
            tail = asyncio.create_task(self._follow_journal())
            try:
                yield
            finally:
                await _cancel_tasks(tail, *self._adopting.values(), self._stopping)
        finally:
            await self._close()

    async def _close(self) -> None:
        still_out = self._pool.in_flight
        try:
            await self._pool.close()
            await self.refresh()
        finally:
            await asyncio.to_thread(self._control_files.close_session, still_out > 0)

    async def _follow_journal(self) -> None:
        """Look every now and then; what cannot be read is told, and read the next time."""
        most_s, told = self._pool.silence_s / MISSED_POLLS, ""
        while True:
            began = time.monotonic()
            await asyncio.to_thread(self._control_files.poll)
            try:
                await self.refresh()
            except JournalError as error:
                if told != error.message:
                    logger.warning("%s", error.message)
                told = error.message
            # thousands of files take a while
            took = time.monotonic() - began
            await asyncio.sleep(min(max(_TAIL_S, _SHARE * took), most_s))


async def _cancel_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and tell of those that have failed."""
    begun = [task for task in tasks if task is not None]
    for task in begun:
        task.cancel()
    for error in await asyncio.gather(*begun, return_exceptions=True):
        if isinstance(error, Exception):
            logger.warning("%s", error)


def _overlaps(name: str, shard: Shard) -> bool:
    """Say whether a shard that an earlier life named ``lo-hi`` has items of this one."""
    lo, _, hi = name.partition("-")
    return lo.isdigit() and hi.isdigit() and int(lo) < shard.hi and shard.lo < int(hi)


def _trim_items(order: ShardTask) -> ShardTask:
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


@asynccontextmanager
async def open_coordinator(
    work: WorkShard,
    terms: TaskTemplate,
    ledger: Journal,
    progress: Progress,
    spends: RunBudget | None,
) -> AsyncIterator[Coordinator]:
    """Open the places and follow what their workers record."""
    limits = terms.config.limits
    drain_s = limits.drain_s + limits.request_timeout_s
    pool = make_worker_pool(terms.config.backend, work, drain_s, terms.folder)
    crew = Coordinator(pool, terms, ledger, progress, LeaseManager(spends, terms, pool.capacity))
    async with crew.open_pool():
        yield crew
