"""Pool the backends of a run: distribute shards over them, and requeue lost ones."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from ..core.errors import (
    BackendError,
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
    WorkerLostError,
)
from ..core.messages import ShardResult, ShardTask
from ..core.protocols import Backend, Stoppable
from .member import FirstWorkerTimer, Heartbeat, InFlightTask, PoolMember, PoolPolicy, TaskTimeout


class PoolDrainedError(FanfoldError):
    """The pool starts no more tasks."""


class SlotQueue:
    """Assign the free slots of several pool members, in order of arrival.

    Args:
        members: The pool members.
    """

    def __init__(self, members: Sequence[PoolMember]) -> None:
        self._members = members
        self._waiting = deque[asyncio.Future[PoolMember]]()
        self._closed: FanfoldError | None = None

    async def acquire(self, *, at_front: bool = False) -> PoolMember:
        """Wait for a member with a free slot, and acquire it.

        Args:
            at_front: Wait at the front of the queue, as a lost shard does.

        Raises:
            PoolDrainedError: The pool starts no more tasks.
            RunStoppedError: No usable member is left, or no worker started.
            ConfigurationError: No usable member is left because of a wrong setting.
        """
        turn: asyncio.Future[PoolMember] = asyncio.get_running_loop().create_future()
        if at_front:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self.assign()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                turn.result().release()
            raise

    def assign(self) -> None:
        """Assign free slots to the tasks that have waited longest."""
        while self._waiting:
            turn = self._waiting[0]
            if not turn.done():
                member = max(self._members, key=PoolMember.free_slots)
                if self._closed is not None:
                    turn.set_exception(type(self._closed)(self._closed.message))
                elif all(m.failure for m in self._members):
                    turn.set_exception(self._no_member_error())
                elif member.capacity_left() > 0:
                    member.acquire()
                    turn.set_result(member)
                else:
                    return
            self._waiting.popleft()

    def drain(self) -> None:
        """Assign no more slots, and dismiss the waiting tasks."""
        self.close(PoolDrainedError("the run is being stopped"))

    def close(self, reason: FanfoldError) -> None:
        """Assign no more slots, and raise the reason in waiting and later calls.

        If called several times, the first reason counts.
        """
        self._closed = self._closed or reason
        self.assign()

    def _no_member_error(self) -> FanfoldError:
        error = next(m.failure for m in self._members if m.failure)
        if isinstance(error, ConfigurationError):
            return ConfigurationError(error.message)
        return RunStoppedError(f"no backend is left that can run shards: {error}")


logger = logging.getLogger(__name__)

MakeTask = Callable[[int], Awaitable[ShardTask | None]]
"""Makes the task of an attempt without items finished meanwhile; None if no item is left."""
RevokeTask = Callable[[int], Awaitable[None]]
"""Revokes the task of a lost attempt, in case a worker still runs it."""

_UNSTARTED_FACTOR: Final = 4
"""A shard may be lost this many times more often if no worker had started it."""


class BackendPool:
    """Several backends as one.

    It pools backends, each of which has one worker or many. A shard goes to the backend with the
    most free slots. A lost shard is submitted again; a late
    answer to the lost attempt is not used.

    Args:
        backends: The backends.
        policy: Timeouts and retry limits.
    """

    def __init__(self, backends: Sequence[Backend], policy: PoolPolicy) -> None:
        self._policy = policy
        self._members = [PoolMember(backend, policy, self._assign_slots) for backend in backends]
        self._slots, self._first_worker = SlotQueue(self._members), FirstWorkerTimer(policy.queue_s)
        self._ticker: asyncio.Task[None] | None = None
        self._orphaned = dict[str, InFlightTask]()

    async def start(self) -> None:
        """Start all backends; those that fail are retried later if at least one starts.

        Raises:
            ConfigurationError: A backend can never start.
            BackendError: No backend started.
        """
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
        for member in self._members:
            for shard, answer in (await member.backend.reattach()).items():
                timeout = TaskTimeout(self._policy, None, member)
                self._orphaned[shard] = member.submit(shard, answer, timeout)
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

    @property
    def silence_s(self) -> float:
        """Return after how many seconds without a heartbeat a worker counts as lost."""
        return self._policy.silence_s

    async def run(
        self,
        make_task: MakeTask,
        heartbeat: Callable[[int], Heartbeat | None],
        revoke: RevokeTask | None = None,
    ) -> tuple[ShardTask, ShardResult] | None:
        """Run a shard, with as many attempts as it needs and the policy allows.

        Args:
            make_task: Makes a task; called when a slot is free.
            heartbeat: Returns, for an attempt, the function that measures its worker's silence, or
                None where there is none.
            revoke: Revokes the task of an attempt, where that is possible.

        Raises:
            RunStoppedError: The shard was lost as often as the policy allows, no usable member is
                left, or no worker started.
            ConfigurationError: A backend or a worker can never do its work.

        Returns:
            The task that was answered and its result; None if no item was left, or the pool was
                stopped before the shard was submitted.
        """
        started = attempt = 0
        while True:
            try:
                member = await self._slots.acquire(at_front=attempt > 0)
            except PoolDrainedError:
                return None
            task_timeout = TaskTimeout(self._policy, heartbeat(attempt), member)
            try:
                return await self._run_once(member, task_timeout, make_task, attempt)
            except BackendError as error:
                if revoke is not None:
                    await revoke(attempt)
                # a task that no backend accepted does not count against its shard
                attempt += 1
                started += task_timeout.has_begun and isinstance(error, WorkerLostError)
                logger.warning("shard %s", error.message)
                if (
                    started >= self._policy.attempts
                    or attempt >= self._policy.attempts * _UNSTARTED_FACTOR
                ):
                    msg = f"a shard was lost {attempt} times, the last time: {error.message}"
                    raise RunStoppedError(msg) from error

    async def _run_once(
        self, member: PoolMember, task_timeout: TaskTimeout, make_task: MakeTask, attempt: int
    ) -> tuple[ShardTask, ShardResult] | None:
        try:
            task = await make_task(attempt)
        except BaseException:
            member.release()
            raise
        if task is None:
            member.release()
            return None
        self._first_worker.start()
        name = f"{task.shard}, attempt {attempt}"
        in_flight = member.submit(
            name, member.backend.submit(task.to_json()), task_timeout, acquired=True
        )
        return task, await in_flight.wait_result()

    async def stop(self) -> None:
        """Start no more tasks, and ask the backends that can to begin no further item."""
        self._slots.drain()
        backends = (member.backend for member in self._members)
        _log_errors(
            await asyncio.gather(
                *(backend.stop() for backend in backends if isinstance(backend, Stoppable)),
                return_exceptions=True,
            )
        )

    async def close(self, grace_s: float = 10.0) -> None:
        """Close all backends within ``grace_s`` and a little more."""
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        closing = (member.close(grace_s) for member in self._members)
        _log_errors(await asyncio.gather(*closing, return_exceptions=True))

    def _assign_slots(self) -> None:
        self._slots.assign()

    async def _poll_members(self) -> None:
        """Poll all tasks in one loop: a loop for each of hundreds of shards costs more."""
        while True:
            await asyncio.sleep(self._policy.poll_s)
            if reason := self._first_worker.poll(self._members):
                self._slots.close(RunStoppedError(reason))
                for member in self._members:
                    member.mark_lost(reason)
            for member in self._members:
                member.poll()
            self._slots.assign()


def _log_errors(outcomes: Iterable[object]) -> None:
    for error in outcomes:
        if isinstance(error, Exception):
            logger.warning("%s", error)
