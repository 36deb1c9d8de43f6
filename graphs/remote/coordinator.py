"""The coordinator: send shards to workers as tasks, and read their results and journals."""

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

from ...backends.budget.budget import RunBudget
from ...backends.budget.leases import LeaseManager
from ...backends.core.errors import JournalError
from ...backends.core.messages import ShardResult, ShardTask
from ...backends.core.types import Item, Shard
from ...backends.fleet.fleet import StatsCollector
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import JournalDelta
from ...backends.workers.executor import WorkShard
from ...backends.workers.member import Heartbeat
from ...backends.workers.pool import BackendPool
from ...backends.workers.registry import make_backend_pool
from ...nodes.context import AnsweredTask
from ...nodes.shard.progress import Progress
from ...nodes.shard.remote import check_record_indices
from .heartbeat import MISSED_POLLS, ControlFiles, heartbeat_file
from .task_template import TaskTemplate


class JournalFollower:
    """Follows the workers' journal files.

    Args:
        journal: The run's journal.
        progress: The run's counts.
    """

    def __init__(self, journal: Journal, progress: Progress) -> None:
        self._journal, self._progress = journal, progress
        self._lock, self._rounds = asyncio.Lock(), 0
        self._finished = False
        self._reading = set[asyncio.Task[None]]()

    async def refresh(self, worker: str | None = None, *, earlier: bool = False) -> None:
        """Read and count what workers have recorded since the last call.

        Args:
            worker: Read only this worker's file (``host:process``).
            earlier: Workers of earlier sessions may still write.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        reading = asyncio.create_task(self._read(worker, earlier, self._rounds + 1))
        self._reading.add(reading)
        reading.add_done_callback(self._on_read)
        # the caller may be cancelled; the reading thread cannot be, and only one may read
        await asyncio.shield(reading)

    def _on_read(self, reading: asyncio.Task[None]) -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            reading.exception()  # the caller may be gone; the next read raises the same error

    async def _read(self, worker: str | None, earlier: bool, wanted: int) -> None:
        async with self._lock:
            if self._finished or (worker is None and self._rounds >= wanted):
                return  # another call has started a full read since
            self._rounds += worker is None
            delta = JournalDelta()
            try:
                await asyncio.to_thread(self._journal.refresh, delta, earlier, worker)
            finally:
                self._progress.add_counts(delta.done, delta.failed, delta.usage.to_dict())

    async def finish_reading(self, *, earlier: bool = False) -> None:
        """Read a last time; what workers record later is not counted.

        Args:
            earlier: Workers of earlier sessions may still write.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        await self.refresh(earlier=earlier)
        self._finished = True


logger = logging.getLogger(__name__)

_TAIL_S: Final = 1.0
_SHARE: Final = 10.0
STOP_GRACE_S: Final = 10.0
"""Seconds that the coordinator waits for workers after they have waited for items in flight."""


class Coordinator:
    """Runs shards on the backends of a run.

    Args:
        pool: The backends.
        template: What all tasks of the session share.
        journal: The run's journal.
        progress: The run's counts.
        lease_manager: Lends each task a part of the budget.
    """

    def __init__(
        self,
        pool: BackendPool,
        template: TaskTemplate,
        journal: Journal,
        progress: Progress,
        lease_manager: LeaseManager,
    ) -> None:
        self._pool, self._template, self._lease_manager = pool, template, lease_manager
        self._hosts = set[str]()
        self._journal, self._progress = journal, progress
        self._follower = JournalFollower(journal, progress)
        self._control_files = ControlFiles(template.journal, template.token, pool.silence_s)
        self._attempts = Counter[str]()
        self._adopting = dict[str, asyncio.Task[ShardResult | None]]()
        self._stopping: asyncio.Task[None] | None = None
        self.stats_collector = StatsCollector()
        self._has_orphans = False  # True if workers of earlier sessions may still write

    @property
    def has_node_endpoints(self) -> bool:
        """Return True if each worker uses the endpoints of its own node."""
        return self._template.config.backend.node_endpoints

    @property
    def in_flight(self) -> int:
        """Return the number of shards that workers process."""
        return self._pool.in_flight

    @property
    def nodes(self) -> tuple[int, int]:
        """Return how many hosts have worked so far, and at most how many work now."""
        held = max(1, len(self._hosts))
        return held, min(held, self._pool.in_flight)

    async def run_shard(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        """Run the remaining items of a shard on workers; see the protocol in nodes/context.py."""
        name = f"{shard.lo}-{shard.hi}"
        try:
            answered = await self._run_attempts(shard, remaining)
        finally:
            self._lease_manager.mark_lost(name)  # no effect once a result has arrived
        return answered

    async def _run_attempts(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        if (adopted := await self._wait_for_orphan(shard)) is not None:
            return None, adopted
        name = f"{shard.lo}-{shard.hi}"

        async def make(_: int) -> ShardTask | None:
            if self._attempts[name] or self._has_orphans:
                await self.refresh()  # read the last lines of a lost worker
            items = await remaining()
            if not items:
                return None
            number = self._attempts[name]
            task = await asyncio.to_thread(self._template.make_task, name, number, items)
            await self._create(name, number)
            lease = await self._lease_manager.lend(task)
            self._attempts[name] += 1
            return replace(task, lease=lease)

        # attempts count tasks: a shard may need several tasks that each return a result
        first = self._attempts[name]
        try:
            answered = await self._pool.run(
                make,
                lambda attempt: self._heartbeat(name, first + attempt),
                lambda attempt: self._revoke(name, first + attempt),
            )
        finally:  # a task that is delivered again must do nothing
            for attempt in range(first, self._attempts[name] + 1):
                await self._revoke(name, attempt)
        if answered is not None:
            await self._record_result(answered[1])
        return answered

    async def _wait_for_orphan(self, shard: Shard) -> ShardResult | None:
        """Wait for tasks of an earlier session that overlap a shard; return the first result."""
        for name in dict.fromkeys((*self._adopting, *self._pool.orphaned)):
            if not _overlaps(name, shard):
                continue
            # shard limits may have changed: several shards can wait for one task
            if name not in self._adopting:
                self._adopting[name] = asyncio.create_task(self._adopt(name))
            adopting = self._adopting[name]
            if not adopting.done() and (result := await asyncio.shield(adopting)) is not None:
                return result
        return None

    async def _adopt(self, name: str) -> ShardResult | None:
        """Wait for a task of an earlier session, and record its result."""
        result = await self._pool.adopt(name)
        if result is not None:
            await self._record_result(result)
            check_record_indices(result, self._progress.total)
            for record in result.records or ():
                if not self._journal.is_finished(record["index"]):
                    self._journal.put(record)
                    self._progress.add_record(record)
            await self.refresh()
        return result

    async def _record_result(self, result: ShardResult) -> None:
        """Record the host, endpoint statistics and spending of a result."""
        self._hosts.add(result.worker.partition(":")[0])
        self.stats_collector.add(result.endpoints or ())
        await self._lease_manager.settle(result)

    def _heartbeat(self, shard: str, attempt: int) -> Heartbeat | None:
        """Return the heartbeat of a task, if workers share the folder."""
        file = self._heartbeat_file(shard, attempt)
        return None if file is None else self._control_files.watch(file)

    async def _create(self, shard: str, attempt: int) -> None:
        """Create a task's heartbeat file, which lets a worker start, if the folder is shared."""
        if (file := self._heartbeat_file(shard, attempt)) is not None:
            await asyncio.to_thread(self._control_files.create, file)

    async def _revoke(self, shard: str, attempt: int) -> None:
        """Revoke a task by deleting its heartbeat file, if workers share the folder."""
        if (file := self._heartbeat_file(shard, attempt)) is not None:
            await asyncio.to_thread(self._control_files.revoke, file)

    def _heartbeat_file(self, shard: str, attempt: int) -> Path | None:
        if (journal := self._template.journal) is None:
            return None
        return heartbeat_file(journal, self._template.token, shard, attempt)

    async def refresh(self, worker: str | None = None) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        await self._follower.refresh(worker, earlier=self._has_orphans)

    async def stop(self) -> None:
        """Stop all workers from starting items, by the shared folder or through the pool."""
        if self._stopping is None:  # thousands of shards call it
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        try:
            await asyncio.to_thread(self._control_files.stop_workers)
        except OSError as error:
            logger.warning("cannot write the stop file for workers: %s", error)
        await self._pool.stop()

    async def finish_reading(self) -> None:
        """Read the journal a last time; what workers record later is not counted."""
        await self._follower.finish_reading(earlier=self._has_orphans)

    @asynccontextmanager
    async def open_pool(self) -> AsyncIterator[None]:
        """Open the backends and follow the workers' journal files while the block runs."""
        await asyncio.to_thread(self._control_files.open_session)
        try:
            await self._pool.start()
            self._has_orphans = bool(self._pool.orphaned)
            await self._follower.refresh(earlier=True)  # items in flight when a session was killed
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
        """Poll the journal files; log a file that cannot be read, and retry it at the next poll."""
        most_s, logged = self._pool.silence_s / MISSED_POLLS, ""
        while True:
            began = time.monotonic()
            await asyncio.to_thread(self._control_files.poll)
            try:
                await self.refresh()
            except JournalError as error:
                if logged != error.message:
                    logger.warning("%s", error.message)
                logged = error.message
            # reading thousands of files takes time
            took = time.monotonic() - began
            await asyncio.sleep(min(max(_TAIL_S, _SHARE * took), most_s))


async def _cancel_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and log the errors of those that failed."""
    begun = [task for task in tasks if task is not None]
    for task in begun:
        task.cancel()
    for error in await asyncio.gather(*begun, return_exceptions=True):
        if isinstance(error, Exception):
            logger.warning("%s", error)


def _overlaps(name: str, shard: Shard) -> bool:
    """Return True if a shard named ``lo-hi`` in an earlier session overlaps this one."""
    lo, _, hi = name.partition("-")
    return lo.isdigit() and hi.isdigit() and int(lo) < shard.hi and shard.lo < int(hi)


@asynccontextmanager
async def open_coordinator(
    work: WorkShard,
    template: TaskTemplate,
    journal: Journal,
    progress: Progress,
    budget: RunBudget | None,
) -> AsyncIterator[Coordinator]:
    """Open a coordinator with its pool of backends."""
    config = template.config
    drain_s = config.limits.drain_s + config.limits.request_timeout_s
    pool = make_backend_pool(config.backend, work, drain_s, template.folder)
    leases = LeaseManager(budget, config, template.run["model"], pool.capacity)
    coordinator = Coordinator(pool, template, journal, progress, leases)
    async with coordinator.open_pool():
        yield coordinator
