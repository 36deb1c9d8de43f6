"""The coordinator: send shards to workers as tasks, and read their results and journals."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.budget.budget import RunBudget
from ...backends.budget.leases import LeaseManager
from ...backends.core.aio import wait_first
from ...backends.core.errors import (
    BackendError,
    ConfigurationError,
    FanfoldError,
    JournalError,
    RunStoppedError,
    WorkerLostError,
)
from ...backends.core.messages import DUPLICATE_REASON, WALLTIME_REASON, ShardResult, ShardTask
from ...backends.core.timeline import ClockAlignment, TimelineDelta
from ...backends.core.types import Item, Shard
from ...backends.fleet.fleet import StatsCollector
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import JournalDelta
from ...backends.workers.executor import WorkShard
from ...backends.workers.member import PoolMember
from ...backends.workers.pool import BackendPool
from ...backends.workers.registry import make_backend_pool
from ...configs.models import RunConfig
from ...nodes.context import AnsweredTask
from ...nodes.shard.progress import Progress
from .heartbeat import MISSED_POLLS, ControlFiles, TimelineReport
from .rate_leases import RATE_LIMITS, RateFile, RateLender, make_rate_lender
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

_UNSTARTED_FACTOR: Final = 4
"""A shard may be lost this many times more often if no worker had begun it."""
_BOUNCES: Final = 240
_BOUNCE_S: Final = 5.0
"""A worker whose job is about to end returns shards; meanwhile other workers take them."""
_FORGIVEN: Final = 2
"""How often the endpoints of a node may fail a shard before the run stops."""


class ShardRetries:
    """Decide whether a shard gets a further task.

    Args:
        attempts: Tasks in a row that may be lost after a worker began them.
        has_node_endpoints: Whether each worker uses the endpoints of its own node.

    Attributes:
        lost: Tasks in a row that were lost.
    """

    def __init__(self, attempts: int, has_node_endpoints: bool) -> None:
        self._attempts, self._has_node_endpoints = attempts, has_node_endpoints
        self._begun = self._bounced = self._forgiven = self.lost = 0

    def add_loss(self, error: BackendError) -> None:
        """Count a lost task; one that no worker had begun counts less.

        Raises:
            RunStoppedError: The shard was lost too often.
        """
        logger.warning("shard %s", error.message)
        self.lost += 1
        self._begun += isinstance(error, WorkerLostError)
        if self._begun >= self._attempts or self.lost >= self._attempts * _UNSTARTED_FACTOR:
            msg = f"a shard was lost {self.lost} times, the last time: {error.message}"
            raise RunStoppedError(msg) from error

    def add_result(self, result: ShardResult) -> None:
        """Count a result, and let another node try what the endpoints of one could not finish.

        Raises:
            FanfoldError: The error that the result reports, if no other node can help.
        """
        self._begun = self.lost = 0
        if result.error is None:
            return
        error = _result_error(result)
        hopeless = not (self._has_node_endpoints and isinstance(error, RunStoppedError))
        if hopeless or self._forgiven >= _FORGIVEN:
            raise error
        self._forgiven += 1
        logger.warning("shard %s: %s", result.shard, error)

    def add_idle_result(self, result: ShardResult) -> float:
        """Count a result without a finished item; return how many seconds to pause.

        Raises:
            RunStoppedError: A further task would not do better.
        """
        if result.error is not None or result.short:  # forgiven; the next lease is larger
            return 0.0
        reason = result.stopped or ""
        # the next task omits the items that the first copy of a duplicate recorded
        if (
            reason == DUPLICATE_REASON or reason.startswith(WALLTIME_REASON)
        ) and self._bounced < _BOUNCES:
            self._bounced += 1
            return 0.0 if reason == DUPLICATE_REASON else _BOUNCE_S
        msg = (
            f"worker {result.worker} returned shard {result.shard} without a finished item: "
            f"{result.stopped}"
        )
        raise RunStoppedError(msg)


def _result_error(result: ShardResult) -> FanfoldError:
    error = result.error or {}
    kinds = {"RunStoppedError": RunStoppedError, "JournalError": JournalError}
    kind = kinds.get(error.get("class", ""), ConfigurationError)
    return kind(f"worker {result.worker}: {error.get('text')}")


_TAIL_S: Final = 1.0
_SHARE: Final = 10.0
STOP_GRACE_S: Final = 10.0
"""Seconds that the coordinator waits for workers after they have waited for items in flight."""


class Coordinator:
    """Runs shards on the backends of a run; it alone decides whether a shard is sent again.

    Args:
        pool: The backends.
        template: What all tasks of the session share.
        journal: The run's journal.
        progress: The run's counts.
        lease_manager: Lends each task a part of the budget.
        lender: Divides the rate limits among the workers; None: each keeps the same share.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a session has, handed on once
        self,
        pool: BackendPool,
        template: TaskTemplate,
        journal: Journal,
        progress: Progress,
        lease_manager: LeaseManager,
        lender: RateLender | None = None,
    ) -> None:
        self._pool, self._template, self._lease_manager = pool, template, lease_manager
        self._hosts = set[str]()
        self._journal, self._progress = journal, progress
        self._follower = JournalFollower(journal, progress)
        self._control_files = ControlFiles(template.journal, template.token, pool.policy.silence_s)
        self._rate_file: RateFile | None = None
        if lender is not None and template.journal is not None:
            self._rate_file = RateFile(template.journal, template.token, lender)
        self._attempts = Counter[str]()
        self._overflows = Counter[str]()  # results of a shard that were too large
        self._adopting = dict[str, asyncio.Task[ShardResult | None]]()
        self._stop_requested = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self.stats_collector = StatsCollector()
        self._timeline_reports = list[TimelineReport]()
        self._clocks = defaultdict[str, ClockAlignment](ClockAlignment)
        self._has_orphans = False  # True if workers of earlier sessions may still write

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
    ) -> AsyncGenerator[AnsweredTask, None]:
        """Run the remaining items of a shard on workers; see the protocol in nodes/context.py."""
        name = f"{shard.lo}-{shard.hi}"
        retries = ShardRetries(
            self._pool.policy.attempts, self._template.config.backend.node_endpoints
        )
        for adopting in self._overlapping_orphans(shard):
            if not adopting.done() and (orphan := await asyncio.shield(adopting)) is not None:
                retries.add_result(orphan)
                yield None, orphan
        while not self._stop_requested.is_set():
            member = await self._pool.acquire(at_front=retries.lost > 0)
            if member is None:
                return
            if retries.lost and (late := await self._collect_late(member, name)) is not None:
                retries.add_result(late)
                yield None, late
                continue
            file = self._control_files.task_file(name, self._attempts[name])
            try:
                answered = await self._run_task(member, name, file, remaining)
            except BackendError as error:
                retries.add_loss(error)
                continue
            finally:  # a task that is delivered again must do nothing
                self._lease_manager.mark_lost(name)  # no effect if its result has arrived
                if file is not None:
                    await asyncio.to_thread(self._control_files.revoke, file)
            if answered is None:
                return
            task, result = answered
            retries.add_result(result)
            yield answered
            if not any(self._journal.is_finished(item[0]) for item in task.items):
                pause_s = retries.add_idle_result(result)
                await wait_first(self._stop_requested.wait(), timeout_s=pause_s)

    async def _collect_late(self, member: PoolMember, shard: str) -> ShardResult | None:
        """Record the result of a lost task, if it has arrived since, and release the backend.

        Workers that share the folder were told to stop; what they have done is in their journals.
        """
        if self._template.journal is not None:
            return None
        try:
            result = await self._pool.collect(member, shard)
        except BaseException:
            member.release()
            raise
        if result is None:
            return None
        member.release()
        logger.warning("shard %s: the result of a task that was counted as lost arrived", shard)
        return await self._record_result(result)

    async def _run_task(
        self,
        member: PoolMember,
        shard: str,
        file: Path | None,
        remaining: Callable[[], Awaitable[list[Item]]],
    ) -> tuple[ShardTask, ShardResult] | None:
        """Make a task of the remaining items and run it once; None if no item remains.

        Args:
            member: The backend, acquired for the task.
            shard: The shard's name.
            file: The task's file, which permits a worker to run it; None if none is shared.
            remaining: Returns the items that have not ended yet.
        """
        task, heartbeat = None, None
        # attempts count tasks: a shard may need several tasks that each return a result
        number = self._attempts[shard]
        try:
            if number or self._has_orphans:
                await self.refresh()  # read the last lines of a lost worker
            if items := await remaining():
                task = await asyncio.to_thread(self._template.make_task, shard, number, items)
                task = replace(task, streams=max(1, task.streams >> self._overflows[shard]))
                if file is not None:
                    heartbeat = await asyncio.to_thread(self._control_files.create, file)
                task = replace(task, lease=await self._lease_manager.lend(task))
        except BaseException:
            member.release()
            raise
        if task is None:
            member.release()
            return None
        self._attempts[shard] += 1
        sent_at = time.time()
        result = await self._pool.run(member, task, heartbeat)
        return task, await self._record_result(result, sent_at)

    def _overlapping_orphans(self, shard: Shard) -> list[asyncio.Task[ShardResult | None]]:
        """Return the tasks that adopt results of an earlier session for items of a shard."""
        for name in self._pool.orphaned:
            # shard limits may have changed: several shards can wait for one task
            if _overlaps(name, shard) and name not in self._adopting:
                self._adopting[name] = asyncio.create_task(self._adopt(name))
        return [task for name, task in self._adopting.items() if _overlaps(name, shard)]

    async def _adopt(self, name: str) -> ShardResult | None:
        """Wait for a task of an earlier session, and record its result."""
        result = await self._pool.adopt(name)
        if result is not None:
            result = await self._record_result(result)
            await self.refresh()
        return result

    async def _record_result(
        self, result: ShardResult, sent_at: float | None = None
    ) -> ShardResult:
        """Record the items, host, endpoint statistics and spending of a result.

        Args:
            result: The result.
            sent_at: When its task was sent, in seconds since 1970; None if it was long ago.

        Returns:
            The result, without its part of the aggregate if another copy's record of an item
            counts.
        """
        check_record_indices(result, self._progress.total)
        only_copy = True
        for record in result.records or ():
            if self._journal.is_finished(record["index"]):
                only_copy = False
                continue
            self._journal.put(record)
            self._progress.add_record(record)
        if result.dropped:
            self._overflows[result.shard] += 1
            logger.warning(
                "worker %s: the answers of %d items of shard %s did not fit in its result and are "
                "lost; these items are asked again, half as many at a time. Lower limits.streams, "
                "or set backend.shared_folder: true where the folder is shared",
                result.worker,
                result.dropped,
                result.shard,
            )
        self._hosts.add(result.worker.partition(":")[0])
        self.stats_collector.add(result.endpoints or ())
        self._add_timeline(result, sent_at)
        await self._lease_manager.settle(result)
        return result if only_copy else replace(result, parts=None)

    def _add_timeline(self, result: ShardResult, sent_at: float | None) -> None:
        if result.timeline is None:
            return
        try:
            delta = TimelineDelta.from_json(result.timeline)
        except ValueError as error:
            text = "worker %s: its report for the timeline cannot be read (%s); it is left out"
            logger.warning(text, result.worker, error)
        else:
            report = TimelineReport(delta, result.worker, sent_at, time.time())
            self._timeline_reports.append(report)

    def take_timeline(self) -> list[TimelineDelta]:
        """Return what workers have reported since the last call, by this process' clock."""
        reports, self._timeline_reports = self._timeline_reports, []
        reports += self._control_files.take_reports()
        for one in reports:
            sent_ms = None if one.sent_at is None else 1000 * one.sent_at
            clock = self._clocks[one.worker]
            one.delta.shift(clock.update(one.delta, sent_ms, 1000 * one.arrived_at))
        return [one.delta for one in reports]

    async def refresh(self, worker: str | None = None) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.

        Raises:
            JournalError: A worker's journal file is damaged, or cannot be read.
        """
        await self._follower.refresh(worker, earlier=self._has_orphans)

    def stop(self) -> None:
        """Stop all workers from starting items, by the shared folder or through the backends."""
        if self._stopping is None:  # thousands of shards call it
            self._stop_requested.set()
            self._stopping = asyncio.create_task(self._stop())

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
        """Use the backends and follow the workers' journal files while the block runs."""
        await asyncio.to_thread(self._control_files.open_session)
        try:
            await self._pool.open_run(self._template.folder)
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
            await self._pool.close_run()
            await self.refresh()
        finally:
            await asyncio.to_thread(self._control_files.close_session, still_out > 0)
            if self._rate_file is not None:
                await asyncio.to_thread(self._rate_file.remove)

    async def _follow_journal(self) -> None:
        """Poll the journal files; log a file that cannot be read, and retry it at the next poll."""
        most_s, logged = self._pool.policy.silence_s / MISSED_POLLS, ""
        while True:
            began = time.monotonic()
            await asyncio.to_thread(self._control_files.poll)
            if self._rate_file is not None:
                await asyncio.to_thread(self._rate_file.update, self._control_files.workers)
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


def check_record_indices(result: ShardResult, items: int) -> None:
    """Check that a worker's records are of items of the run.

    Raises:
        RunStoppedError: One is not; no record of the result is kept.
    """
    for record in result.records or ():
        if record["index"] >= items:
            msg = (
                f"worker {result.worker}: a record of shard {result.shard} has index "
                f"{record['index']}, and this run has {items:,} items; is it of another run?"
            )
            raise RunStoppedError(msg)


def _overlaps(name: str, shard: Shard) -> bool:
    """Return True if a shard named ``lo-hi`` in an earlier session overlaps this one."""
    lo, _, hi = name.partition("-")
    return lo.isdigit() and hi.isdigit() and int(lo) < shard.hi and shard.lo < int(hi)


class SharedWorkers:
    """The backends that the runs of a pipeline use one after the other, and their rate limits.

    A run uses the backends of the run before it if their settings are the same, so that worker
    processes, connections and model servers are started once. Otherwise those are closed first: two
    stages never hold nodes at the same time.

    Args:
        folder: The folder of the pipeline, for logs of backends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[bytes, BackendPool] | None = None
        self._lenders = dict[bytes, RateLender | None]()

    async def get_pool(self, template: TaskTemplate, work: WorkShard) -> BackendPool:
        """Return the pool of backends for a run, not opened for it yet.

        Raises:
            ConfigurationError: An object or file that the settings name does not exist.
            MissingExtraError: The package of the backend is not installed.
        """
        key = _identify_backends(template)
        if self._open is not None:
            if self._open[0] == key and not self._open[1].is_closed:
                return self._open[1]
            await self.aclose()
        pool = _make_pool(template, work, self._folder, stays_open=True)
        self._open = key, pool
        return pool

    def get_lender(self, template: TaskTemplate) -> RateLender | None:
        """Return what divides the rate limits: what workers have used counts for the next run."""
        settings = template.settings
        rates = [settings["limits"][name] for name in RATE_LIMITS]
        key = orjson.dumps([rates, settings["backend"], settings["endpoints"]])
        if key not in self._lenders:
            self._lenders[key] = make_rate_lender(template.config)
        return self._lenders[key]

    async def aclose(self) -> None:
        """Close the backends."""
        if self._open is not None:
            (_, pool), self._open = self._open, None
            await pool.close()  # at once if it is closed; else to the end of what was cancelled


def _identify_backends(template: TaskTemplate) -> bytes:
    """Return what two runs must have in common to use the same backends."""
    config, settings = template.config, template.settings
    shared = [settings["backend"], _drain_s(config)]
    if config.backend.node_endpoints:  # the workers start the servers of a model
        shared += [settings.get("node"), settings["endpoints"], template.run["model"]]
    return orjson.dumps(shared)


def _drain_s(config: RunConfig) -> float:
    return config.limits.drain_s + config.limits.request_timeout_s


def _make_pool(
    template: TaskTemplate, work: WorkShard, folder: Path, *, stays_open: bool
) -> BackendPool:
    config = template.config
    return make_backend_pool(config.backend, work, _drain_s(config), folder, stays_open=stays_open)


@asynccontextmanager
async def open_coordinator(  # noqa: PLR0913, PLR0917 - what a session has, handed on once
    work: WorkShard,
    template: TaskTemplate,
    journal: Journal,
    progress: Progress,
    budget: RunBudget | None,
    shared: SharedWorkers | None,
) -> AsyncIterator[Coordinator]:
    """Open a coordinator with its pool of backends.

    Args:
        work: The function that workers run.
        template: What all tasks of the session share.
        journal: The run's journal.
        progress: The run's counts.
        budget: The run's budget, or None.
        shared: The workers of the pipeline that the run is a part of, or None.
    """
    config = template.config
    if shared is None:
        pool = _make_pool(template, work, template.folder, stays_open=False)
        lender = make_rate_lender(config)
    else:
        pool, lender = await shared.get_pool(template, work), shared.get_lender(template)
    leases = LeaseManager(budget, config, template.run["model"], pool.capacity)
    coordinator = Coordinator(pool, template, journal, progress, leases, lender)
    async with coordinator.open_pool():
        yield coordinator
