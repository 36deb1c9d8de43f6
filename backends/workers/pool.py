"""Pool the backends of a run: give each task a free slot of one of them, and run it there."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..core.errors import BackendError, ConfigurationError, FanfoldError, RunStoppedError
from ..core.messages import ShardResult, ShardTask
from ..core.protocols import Backend, ResultKeeper, Stoppable, TaskLogger
from .member import FirstWorkerTimer, Heartbeat, InFlightTask, PoolMember, PoolPolicy

logger = logging.getLogger(__name__)


class BackendPool:
    """Several backends as one.

    It pools backends, each of which has one worker or many. A task goes to the backend with the
    most free slots and runs once: the caller decides whether to send another if it is lost.

    Runs use it one after the other, each between ``open_run`` and ``close_run``.

    Args:
        backends: The backends.
        policy: Timeouts and retry limits.
        stays_open: Whether the backends stay open at the end of a run, for the next one.

    Attributes:
        policy: As given.
        is_closed: Whether it was closed; the next run needs another pool.
    """

    def __init__(
        self, backends: Sequence[Backend], policy: PoolPolicy, *, stays_open: bool = False
    ) -> None:
        self.policy, self.is_closed = policy, False
        self._stays_open, self._is_run_open = stays_open, False
        self._members = [PoolMember(backend, policy, self._assign_slots) for backend in backends]
        self._waiting = deque[asyncio.Future[PoolMember | None]]()
        self._first_worker, self._no_worker = FirstWorkerTimer(policy.queue_s), ""
        self._is_draining = False
        self._ticker: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._orphaned = dict[str, InFlightTask]()

    async def open_run(self, folder: Path | None = None) -> None:
        """Begin to work for a run: start the backends, unless an earlier run has.

        Backends that do not start are retried later if at least one starts.

        Args:
            folder: The run folder, where a backend may keep a log of its tasks.

        Raises:
            ConfigurationError: A backend can never start.
            BackendError: No backend started.
            JournalError: The log of an earlier coordinator's tasks is damaged.
        """
        if self._ticker is None:
            await self._start()
        self._orphaned.clear()  # shards of the run before have the same names, and other items
        for member in self._members:
            if isinstance(member.backend, TaskLogger) and folder is not None:
                await member.backend.open_log(folder)
        for member in self._members:
            for shard, answer in (await member.backend.reattach()).items():
                member.acquire()
                self._orphaned[shard] = member.submit(shard, answer, None)
        self._is_run_open = True

    async def _start(self) -> None:
        outcomes = await asyncio.gather(
            *(member.backend.start() for member in self._members), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, BackendError):
                raise error
        if len(errors) == len(self._members):
            raise errors[0]
        for error in errors:
            logger.warning("%s", error)
        self._ticker = asyncio.create_task(self._poll_members())

    def capacity(self) -> int:
        """Return how many shards can run at a time, now."""
        return sum(member.backend.capacity() for member in self._members)

    @property
    def in_flight(self) -> int:
        """Return how many tasks are in flight."""
        return sum(member.used_slots for member in self._members)

    @property
    def orphaned(self) -> list[str]:
        """Return the shards that an earlier coordinator of the run left on the backends."""
        return list(self._orphaned)

    async def adopt(self, shard: str) -> ShardResult | None:
        """Wait for a shard that an earlier coordinator submitted; None if it is lost."""
        try:
            return await self._orphaned.pop(shard).wait_result()
        except BackendError as error:
            logger.warning("shard %s, submitted in an earlier session: %s", shard, error.message)
            return None

    async def acquire(self, *, at_front: bool = False) -> PoolMember | None:
        """Wait for a backend with a free slot, and take the slot.

        Args:
            at_front: Wait before all others, as a shard whose task was lost does.

        Returns:
            The backend, to run a task on or to release; None if no more tasks are started.

        Raises:
            RunStoppedError: No usable backend is left, or no worker started.
            ConfigurationError: No usable backend is left because of a wrong setting.
        """
        turn: asyncio.Future[PoolMember | None] = asyncio.get_running_loop().create_future()
        if at_front:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self._assign_slots()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                member = turn.result()
                if member is not None:
                    member.release()
            raise

    def _assign_slots(self) -> None:
        """Assign free slots to the tasks that have waited longest."""
        while self._waiting:
            turn = self._waiting[0]
            if not turn.done():
                member = max(self._members, key=PoolMember.free_slots)
                if self._is_draining:
                    turn.set_result(None)
                elif self._no_worker:
                    turn.set_exception(RunStoppedError(self._no_worker))
                elif all(m.failure for m in self._members):
                    turn.set_exception(self._no_backend_error())
                elif member.capacity_left() > 0:
                    member.acquire()
                    turn.set_result(member)
                else:
                    return
            self._waiting.popleft()

    def _no_backend_error(self) -> FanfoldError:
        error = next(m.failure for m in self._members if m.failure)
        if isinstance(error, ConfigurationError):
            return ConfigurationError(error.message)
        return RunStoppedError(f"no backend is left that can run shards: {error}")

    async def run(
        self, member: PoolMember, task: ShardTask, heartbeat: Heartbeat | None
    ) -> ShardResult:
        """Run a task once, on a backend that was acquired for it.

        Args:
            member: The backend; its slot stays in use until it answers, however late.
            task: The task.
            heartbeat: Returns how long the worker has been silent; None if it has no heartbeat.

        Raises:
            WorkerLostError: The worker that had begun it is lost.
            BackendError: The task is lost and no worker had begun it, or the backend failed.
            ConfigurationError: The backend or its worker can never do its work.
        """
        self._first_worker.start()
        name = f"{task.shard}, attempt {task.attempt}"
        answer = member.backend.submit(task.to_json())
        return await member.submit(name, answer, heartbeat).wait_result()

    async def collect(self, member: PoolMember, shard: str) -> ShardResult | None:
        """Return the result of a shard's task that was counted as lost, if it has arrived since.

        Args:
            member: A backend that was acquired.
            shard: The shard's name.
        """
        if not isinstance(member.backend, ResultKeeper):
            return None
        try:
            data = await member.backend.collect(shard)
            return None if data is None else ShardResult.from_json(data)
        except BackendError as error:
            logger.warning("shard %s: a result may be lost: %s", shard, error.message)
            return None

    async def stop(self) -> None:
        """Start no more tasks, and ask the backends that can to begin no further item."""
        self._is_draining = True
        self._assign_slots()
        backends = (member.backend for member in self._members)
        _log_errors(
            await asyncio.gather(
                *(backend.stop() for backend in backends if isinstance(backend, Stoppable)),
                return_exceptions=True,
            )
        )

    async def close_run(self) -> None:
        """End the work for a run; close the backends unless they stay open for the next one.

        They are closed in any case if they were stopped, if one has failed (the next run tries it
        again), or if a task is still in flight: its worker must not write to the journal of a run
        that has ended.
        """
        failed = any(member.failure for member in self._members)
        must_close = self._is_draining or bool(self.in_flight) or failed
        if self._stays_open and self._is_run_open and not must_close:
            self._is_run_open = False
            loggers = (m.backend for m in self._members if isinstance(m.backend, TaskLogger))
            _log_errors(
                await asyncio.gather(*(one.close_log() for one in loggers), return_exceptions=True)
            )
        else:
            await self.close()

    async def close(self, grace_s: float = 10.0) -> None:
        """Close all backends within ``grace_s`` and a little more.

        Closing goes on if the caller is cancelled; a further call waits for its end.
        """
        self.is_closed = True
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(grace_s))
        await asyncio.shield(self._closing)

    async def _close(self, grace_s: float) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        closing = (member.close(grace_s) for member in self._members)
        _log_errors(await asyncio.gather(*closing, return_exceptions=True))

    async def _poll_members(self) -> None:
        """Poll all tasks in one loop: a loop for each of hundreds of shards costs more."""
        while True:
            await asyncio.sleep(self.policy.poll_s)
            has_responded = any(member.has_responded for member in self._members)
            if reason := self._first_worker.poll(self.in_flight, has_responded=has_responded):
                self._no_worker = reason
                for member in self._members:
                    member.mark_lost(reason)
            for member in self._members:
                member.poll()
            self._assign_slots()


def _log_errors(outcomes: Iterable[object]) -> None:
    for error in outcomes:
        if isinstance(error, Exception):
            logger.warning("%s", error)
