"""Track one backend of the pool: tasks in flight, timeouts and rebuilds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tenacity import wait_exponential

from ..core.aio import wait_first
from ..core.errors import BackendError, FanfoldError, WorkerLostError
from ..core.messages import ShardResult
from ..core.protocols import Backend
from ..core.types import Json
from ..core.waits import pause_after

logger = logging.getLogger(__name__)

_MOST_PAUSES: Final = 64
"""The longest pause before a backend is rebuilt, as a multiple of the first."""
_FIRST_WARN_S: Final = 60.0
_MAX_WARN_INTERVAL_S: Final = 3600.0


class FirstWorkerTimer:
    """Limit the wait for the first worker, and log warnings while none responds.

    Args:
        queue_s: Most seconds to wait.
        clock: Returns a monotonic time in seconds.
    """

    def __init__(self, queue_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_s, self._clock = queue_s, clock
        self._since: float | None = None
        self._next_warn_s = _FIRST_WARN_S
        self._over = False

    def start(self) -> None:
        """Start the timer at the first task."""
        if self._since is None:
            self._since = self._clock()

    def poll(self, tasks: int, *, has_responded: bool) -> str | None:
        """Return, once, why the wait is over; else None.

        Args:
            tasks: Number of tasks in flight.
            has_responded: Whether a worker has begun a task or answered.
        """
        if self._over or self._since is None:
            return None
        if tasks == 0:
            self._since = None
            return None
        if has_responded:
            self._over = True
            return None
        return self._check_wait(self._clock() - self._since, tasks)

    def _check_wait(self, seconds: float, tasks: int) -> str | None:
        message = (
            f"no worker has responded in the {seconds:.0f} s since the first task was submitted"
        )
        if seconds > self._queue_s:
            self._over = True
            return (
                f"{message} (backend.queue_s); check that workers were started, and read "
                "the log of the engine that starts them"
            )
        if seconds >= self._next_warn_s:
            self._next_warn_s += min(self._next_warn_s, _MAX_WARN_INTERVAL_S)
            logger.warning(
                "%s (%d in flight): workers may still start or wait in a batch system's queue; the "
                "run waits for %.0f s in all (backend.queue_s)",
                message,
                tasks,
                self._queue_s,
            )
        return None


Heartbeat = Callable[[], float | None]
"""Returns for how many seconds a worker has been silent, or None before its first heartbeat."""


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """Timeouts and retry limits of a pool.

    Attributes:
        attempts: Most attempts of one shard that a worker began.
        deadline_s: Seconds from a task's first heartbeat until it counts as lost.
        silence_s: Seconds without a heartbeat until a task that sent one counts as lost.
        queue_s: Seconds that a task may wait before it begins, without the time that the tasks
            ahead of it take.
        tasks_per_worker: Tasks that a worker holds: the running one and those that wait for it.
        rebuild_pause_s: Pause before a broken backend is rebuilt, doubled each further time.
        poll_s: Seconds between two polls of the tasks in flight.
    """

    attempts: int = 3
    deadline_s: float = 7200.0
    silence_s: float = 120.0
    queue_s: float = 86400.0
    tasks_per_worker: int = 2
    rebuild_pause_s: float = 1.0
    poll_s: float = 0.5

    @property
    def rebuild_wait(self) -> wait_exponential:
        """Return the pauses before a broken backend is rebuilt."""
        return wait_exponential(self.rebuild_pause_s, _MOST_PAUSES * self.rebuild_pause_s)


_CLOSE_S: Final = 10.0
"""Seconds that a backend may take to close beyond its grace time."""


class PoolMember:
    """A backend with its tasks in flight.

    Args:
        backend: The backend.
        policy: Timeouts and retry limits.
        changed: Called when a slot may be free.

    Attributes:
        used_slots: Slots in use, including those of lost tasks that still occupy their worker.
        answered_at: When it last answered (monotonic seconds), or None.
        failure: Why it is no longer usable, or None.
    """

    def __init__(self, backend: Backend, policy: PoolPolicy, changed: Callable[[], None]) -> None:
        self.backend, self.used_slots = backend, 0
        self.answered_at: float | None = None
        self.failure: FanfoldError | None = None
        self._policy, self._changed = policy, changed
        self._tasks = set[InFlightTask]()
        self._rebuild_task: asyncio.Task[None] | None = None
        self._failures = 0

    def free_slots(self) -> int:
        """Return how many workers are idle; negative if tasks wait for them."""
        return self.backend.capacity() - self.used_slots if self.capacity_left() > 0 else -(10**9)

    def capacity_left(self) -> int:
        """Return how many more tasks it can take."""
        if self._rebuild_task is not None:
            return 0
        return self.backend.capacity() * self._policy.tasks_per_worker - self.used_slots

    @property
    def has_responded(self) -> bool:
        """Return True if a worker has begun a task or answered."""
        return self.answered_at is not None or any(task.has_heartbeat for task in self._tasks)

    def acquire(self) -> None:
        """Acquire a slot for one task."""
        self.used_slots += 1

    def release(self) -> None:
        """Release a slot."""
        self.used_slots -= 1
        self._changed()

    def submit(
        self, name: str, answer: Awaitable[dict[str, Json]], heartbeat: Heartbeat | None
    ) -> InFlightTask:
        """Submit a task in an acquired slot, or track one that was submitted before.

        Args:
            name: Name in messages.
            answer: The backend's answer.
            heartbeat: Returns how long the worker has been silent; None if it has no heartbeat.
        """
        task = InFlightTask(name, answer, self._policy, heartbeat, self._complete)
        self._tasks.add(task)
        return task

    def _complete(self, task: InFlightTask) -> None:
        if task not in self._tasks:
            return  # the backend was rebuilt meanwhile
        self._tasks.discard(task)
        if task.has_succeeded:
            self.answered_at, self._failures = time.monotonic(), 0
        self.release()  # a broken backend is rebuilt by poll, not once per answer

    def poll(self) -> None:
        """Poll all tasks in flight, and begin to rebuild a broken backend."""
        for task in self._tasks:
            if not task.is_lost and (reason := task.lost_reason(self.answered_at)):
                task.mark_lost(f"{self.backend.name}: {reason}")
        lost = sum(task.is_lost for task in self._tasks)
        capacity = self.backend.capacity()
        if capacity <= lost and self._rebuild_task is None and self.failure is None:
            self._rebuild_task = asyncio.create_task(self._rebuild())

    def mark_lost(self, reason: str) -> None:
        """Mark all tasks in flight as lost."""
        for task in self._tasks:
            task.mark_lost(reason)

    async def _rebuild(self) -> None:
        """Rebuild the backend; its tasks in flight are lost. It may end up no longer usable."""
        try:
            for attempt in range(1, self._policy.attempts + 1):
                await asyncio.sleep(pause_after(self._policy.rebuild_wait, self._failures + 1))
                self._failures += 1
                self._cancel_tasks()
                try:
                    await self.backend.rebuild()
                except BackendError as error:
                    if attempt == self._policy.attempts:
                        raise
                    logger.warning("%s", error.message)
                else:
                    return
        except FanfoldError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 - a backend of a third party raises anything
            text = f"{self.backend.name}: cannot be rebuilt: {type(error).__name__}: {error}"
            self.failure = BackendError(text)
        finally:
            self._rebuild_task = None
            self._changed()
        logger.warning("%s", self.failure)

    def _cancel_tasks(self) -> None:
        left, self._tasks = self._tasks, set()
        self.used_slots -= len(left)
        for task in left:
            task.mark_lost(f"{self.backend.name}: failed with all its tasks", BackendError)
            task.cancel()

    async def close(self, grace_s: float) -> None:
        """Close the backend within ``grace_s`` and a little more."""
        if self._rebuild_task is not None:
            self._rebuild_task.cancel()
            await asyncio.gather(self._rebuild_task, return_exceptions=True)
        self._cancel_tasks()
        try:
            await asyncio.wait_for(self.backend.close(grace_s), grace_s + _CLOSE_S)
        except TimeoutError:
            msg = f"{self.backend.name}: could not be closed in {grace_s + _CLOSE_S:.0f} s"
            raise BackendError(msg) from None


class InFlightTask:
    """A submitted task, and the rules by which it counts as lost.

    The slot stays in use until the backend answers, even if the caller stops waiting. Without
    heartbeats the clock starts when the backend answers another task: before that, this one may
    wait in a batch system's queue.

    Args:
        name: Name in messages.
        answer: The backend's answer.
        policy: The timeouts.
        heartbeat: Returns how long the worker has been silent; None if it has no heartbeat.
        on_complete: Called when the backend has answered, however late.
    """

    def __init__(
        self,
        name: str,
        answer: Awaitable[dict[str, Json]],
        policy: PoolPolicy,
        heartbeat: Heartbeat | None,
        on_complete: Callable[[InFlightTask], None],
    ) -> None:
        self.name = name
        self._policy, self._heartbeat, self._on_complete = policy, heartbeat, on_complete
        self._submitted_at = time.monotonic()
        self._begun_at: float | None = None
        self._lost: asyncio.Future[BackendError] = asyncio.get_running_loop().create_future()
        self._answer = asyncio.ensure_future(answer)
        self._answer.add_done_callback(self._on_answer)

    def _on_answer(self, answer: asyncio.Future[dict[str, Json]]) -> None:
        if not answer.cancelled():
            answer.exception()  # retrieved, because the caller may have stopped waiting
        self._on_complete(self)

    @property
    def has_succeeded(self) -> bool:
        """Return True if the backend answered without an error."""
        answer = self._answer
        return answer.done() and not answer.cancelled() and answer.exception() is None

    @property
    def is_lost(self) -> bool:
        """Return True if it was marked as lost."""
        return self._lost.done()

    @property
    def has_heartbeat(self) -> bool:
        """Return True if its worker has sent a heartbeat."""
        return self._heartbeat is not None and self._heartbeat() is not None

    def lost_reason(self, answered_at: float | None) -> str | None:
        """Return why the task counts as lost by now, or None.

        Args:
            answered_at: When its backend last answered (monotonic seconds), or None.
        """
        now, policy = time.monotonic(), self._policy
        silent = self._heartbeat() if self._heartbeat is not None else None
        if silent is not None:
            self._begun_at = self._begun_at or now
            if silent > policy.silence_s:
                return f"no heartbeat for {silent:.0f} s"
        elif self._heartbeat is None and self._begun_at is None:
            self._begun_at = (
                answered_at if answered_at and answered_at > self._submitted_at else None
            )
        if self._begun_at is not None and now - self._begun_at > policy.deadline_s:
            return f"not finished {policy.deadline_s:.0f} s after it began"
        waited = now - max(self._submitted_at, answered_at or 0.0)
        if (
            self._begun_at is None
            and waited > policy.queue_s + (policy.tasks_per_worker - 1) * policy.deadline_s
        ):
            return (
                f"not started {waited:.0f} s after it was submitted, or its backend last answered"
            )
        return None

    def mark_lost(self, reason: str, kind: type[BackendError] = WorkerLostError) -> None:
        """Mark the task as lost, because of its worker or (``kind``) its backend."""
        if not self._lost.done():
            self._lost.set_result(kind(reason))

    def cancel(self) -> None:
        """Stop waiting for the backend."""
        self._answer.cancel()

    async def wait_result(self) -> ShardResult:
        """Wait for the worker's result.

        Raises:
            WorkerLostError: The worker that had begun it is lost.
            BackendError: No worker had begun it, or the backend failed.
            ConfigurationError: The worker or the backend can never do its work.
        """
        await wait_first(self._answer, self._lost)
        try:
            if self._lost.done():
                raise self._lost.result()
            return ShardResult.from_json(self._answer.result())
        except asyncio.CancelledError:
            error: BackendError = WorkerLostError("the backend cancelled it")
        except BackendError as raised:
            error = raised
        has_begun = self._heartbeat is None or self.has_heartbeat
        is_worker_lost = isinstance(error, WorkerLostError) and has_begun
        kind = WorkerLostError if is_worker_lost else BackendError
        raise kind(f"{self.name}: {error.message}") from error
