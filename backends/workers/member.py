"""One backend of the pool: tasks in flight, timeouts, first-worker watch, rebuild."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..core.errors import BackendError, ConfigurationError, FanfoldError, WorkerLostError
from ..core.messages import ShardResult
from ..core.protocols import Backend
from ..core.types import Json

logger = logging.getLogger(__name__)

_TELL_S: Final = 60.0
_TELL_MOST_S: Final = 3600.0


class WorkerActivity(Protocol):
    """A place that may have been heard of."""

    @property
    def used_slots(self) -> int:
        """Return how many orders it has."""
        ...

    @property
    def has_responded(self) -> bool:
        """Say whether a worker there has begun or answered."""
        ...


class FirstWorkerTimer:
    """Looks out for the first worker of all, and tells what is waited for until it comes.

    Args:
        queue_s: Seconds to wait for it.
        clock: Returns the time in seconds, of a clock that never goes back.
    """

    def __init__(self, queue_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_s, self._clock = queue_s, clock
        self._since: float | None = None
        self._tell_s = _TELL_S
        self._over = False

    def start(self) -> None:
        """Note that an order goes out: from the first one on somebody is waited for."""
        if self._since is None:
            self._since = self._clock()

    def poll(self, places: Sequence[WorkerActivity]) -> str | None:
        """Return, once, why nobody is waited for any longer; else None."""
        if self._over or self._since is None:
            return None
        orders = sum(place.used_slots for place in places)
        if orders == 0:
            self._since = None
            return None
        if any(place.has_responded for place in places):
            self._over = True
            return None
        return self._check_wait(self._clock() - self._since, orders)

    def _check_wait(self, seconds: float, orders: int) -> str | None:
        said = f"no worker has been heard of in the {seconds:.0f} s since the first order"
        if seconds > self._queue_s:
            self._over = True
            return (
                f"{said} (backend.queue_s); see whether workers were started, and what the engine "
                "says of them"
            )
        if seconds >= self._tell_s:
            self._tell_s += min(self._tell_s, _TELL_MOST_S)
            logger.warning(
                "%s (%d are out): workers may still start or wait in a batch system's queue; the "
                "run waits for %.0f s in all (backend.queue_s)",
                said,
                orders,
                self._queue_s,
            )
        return None


Heartbeat = Callable[[], float | None]
"""Returns for how many seconds a worker has been silent, or None before its first sign of life."""


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How patient a pool is.

    Attributes:
        attempts: Most orders for one shard that were begun.
        deadline_s: Seconds after its first sign of life until an order counts as lost.
        silence_s: Seconds without a sign of life until an order that gave one counts as lost.
        queue_s: Seconds that an order may wait before it begins, besides those in which the ones
            before it are worked on.
        tasks_per_worker: Orders that a worker holds: the one in work and those that wait for it.
        rebuild_pause_s: Pause before a broken place is rebuilt, doubled at each further time.
        poll_s: Seconds between two looks at what is out.
    """

    attempts: int = 3
    deadline_s: float = 7200.0
    silence_s: float = 120.0
    queue_s: float = 86400.0
    tasks_per_worker: int = 2
    rebuild_pause_s: float = 1.0
    poll_s: float = 0.5


class AnswerTime(Protocol):
    """A place that has answered before, or not yet."""

    @property
    def answered_at(self) -> float | None:
        """Return when it last answered (monotonic seconds)."""
        ...


class TaskTimeout:
    """Tells whether an order is lost.

    Without signs of life the clock starts when the place answers something else: before that the
    order may wait in a batch system's queue.

    Args:
        policy: How patient to be.
        beat: Tells how long the worker has been silent; None where nothing can tell.
        place: Where the order went.
    """

    def __init__(self, policy: PoolPolicy, beat: Heartbeat | None, place: AnswerTime) -> None:
        self._policy, self._heartbeat, self._member = policy, beat, place
        self._submitted_at = time.monotonic()
        self._first: float | None = None

    @property
    def has_begun(self) -> bool:
        """Say whether a worker had begun, as far as anybody can tell."""
        return self._heartbeat is None or self.has_heartbeat

    @property
    def has_heartbeat(self) -> bool:
        """Say whether its worker has given a sign of life."""
        return self._heartbeat is not None and self._heartbeat() is not None

    def lost_reason(self) -> str | None:
        """Return why the order counts as lost, or None."""
        now, policy = time.monotonic(), self._policy
        silent = self._heartbeat() if self._heartbeat is not None else None
        if silent is not None:
            self._first = self._first or now
            if silent > policy.silence_s:
                return f"no sign of life for {silent:.0f} s"
        elif self._heartbeat is None and self._first is None:
            answered = self._member.answered_at
            self._first = answered if answered and answered > self._submitted_at else None
        if self._first is not None and now - self._first > policy.deadline_s:
            return f"not finished {policy.deadline_s:.0f} s after it began"
        waited = now - max(self._submitted_at, self._member.answered_at or 0.0)
        if (
            self._first is None
            and waited > policy.queue_s + (policy.tasks_per_worker - 1) * policy.deadline_s
        ):
            return f"not begun {waited:.0f} s after it was sent, or its place last answered"
        return None


_CLOSE_S: Final = 10.0
"""Seconds that a backend may take to close beyond what it was given."""


class PoolMember:
    """A backend as the pool sees it.

    Args:
        backend: The backend.
        policy: How patient to be.
        changed: Called when there may be room.

    Attributes:
        used_slots: Room taken: orders that are out, those that count as lost but still occupy their
            worker included.
        answered_at: When it last answered (monotonic seconds), or None.
        failure: Why nothing is expected of it any more, or None.
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
        """Return how many workers have nothing to do; negative where orders wait for them."""
        return self.backend.capacity() - self.used_slots if self.capacity_left() > 0 else -(10**9)

    def capacity_left(self) -> int:
        """Return how many more orders it can take."""
        if self._rebuild_task is not None:
            return 0
        return self.backend.capacity() * self._policy.tasks_per_worker - self.used_slots

    @property
    def has_responded(self) -> bool:
        """Say whether a worker here has begun or answered."""
        return self.answered_at is not None or any(flight.has_heartbeat for flight in self._tasks)

    def acquire(self) -> None:
        """Take room for one order."""
        self.used_slots += 1

    def release(self) -> None:
        """Give room back that no order went to."""
        self.used_slots -= 1
        self._changed()

    def submit(
        self,
        name: str,
        answer: Awaitable[dict[str, Json]],
        watch: TaskTimeout,
        *,
        acquired: bool = False,
    ) -> InFlightTask:
        """Send an order, or watch one that was sent before.

        Args:
            name: What messages call it.
            answer: The backend's answer.
            watch: Tells whether it is lost.
            acquired: Whether room was taken for it.
        """
        if not acquired:
            self.acquire()
        flight = InFlightTask(name, answer, watch, self._complete)
        self._tasks.add(flight)
        return flight

    def _complete(self, flight: InFlightTask) -> None:
        if flight not in self._tasks:
            return  # it was left behind when the place was rebuilt
        self._tasks.discard(flight)
        if flight.has_succeeded:
            self.answered_at, self._failures = time.monotonic(), 0
        self.release()  # the pool looks after a place that is broken: not once per answer

    def poll(self) -> None:
        """Look after what is out, and begin to mend what is broken."""
        for flight in self._tasks:
            flight.poll()
        lost = sum(flight.is_lost for flight in self._tasks)
        capacity = self.backend.capacity()
        if capacity <= lost and self._rebuild_task is None and self.failure is None:
            self._rebuild_task = asyncio.create_task(self._rebuild())
            self._rebuild_task.add_done_callback(self._finish_rebuild)

    def mark_lost(self, reason: str) -> None:
        """Declare all that is out lost."""
        for flight in self._tasks:
            flight.mark_lost(reason)

    async def _rebuild(self) -> None:
        """Rebuild the place; what it still holds is lost."""
        for _ in range(self._policy.attempts):
            await asyncio.sleep(self._policy.rebuild_pause_s * 2.0 ** min(self._failures, 6))
            self._failures += 1
            self._cancel_tasks()
            try:
                return await self.backend.rebuild()
            except ConfigurationError:
                raise
            except BackendError as error:
                logger.warning("%s", error.message)
                last = error
        raise last

    def _finish_rebuild(self, task: asyncio.Task[None]) -> None:
        self._rebuild_task = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            known = isinstance(error, FanfoldError)
            text = f"{self.backend.name}: cannot be rebuilt: {type(error).__name__}: {error}"
            self.failure = error if known else BackendError(text)  # type: ignore[assignment]
            logger.warning("%s", self.failure)
        self._changed()

    def _cancel_tasks(self) -> None:
        left, self._tasks = self._tasks, set()
        self.used_slots -= len(left)
        for flight in left:
            flight.mark_lost("its place broke down", BackendError)
            flight.cancel()

    async def close(self, grace_s: float) -> None:
        """Close the backend within ``grace_s`` and a little more."""
        if self._rebuild_task is not None:
            self._rebuild_task.cancel()
            with suppress(asyncio.CancelledError, BackendError, ConfigurationError):
                await self._rebuild_task
        self._cancel_tasks()
        try:
            await asyncio.wait_for(self.backend.close(grace_s), grace_s + _CLOSE_S)
        except TimeoutError:
            msg = f"{self.backend.name}: could not be closed in {grace_s + _CLOSE_S:.0f} s"
            raise BackendError(msg) from None


class InFlightTask:
    """An order that is out.

    Whoever waits for it may go: the room stays taken until the backend answers.

    Args:
        name: What messages call it.
        answer: The backend's answer.
        watch: Tells whether it is lost.
        landed: Called when the backend has answered, however late.
    """

    def __init__(
        self,
        name: str,
        answer: Awaitable[dict[str, Json]],
        watch: TaskTimeout,
        landed: Callable[[InFlightTask], None],
    ) -> None:
        self.name = name
        self._timeout, self._on_complete = watch, landed
        self._lost: asyncio.Future[BackendError] = asyncio.get_running_loop().create_future()
        self._answer = asyncio.ensure_future(answer)
        self._answer.add_done_callback(self._on_answer)

    def _on_answer(self, answer: asyncio.Future[dict[str, Json]]) -> None:
        if not answer.cancelled():
            answer.exception()  # nobody may be waiting for it any more
        self._on_complete(self)

    @property
    def has_succeeded(self) -> bool:
        """Say whether the backend gave an answer."""
        answer = self._answer
        return answer.done() and not answer.cancelled() and answer.exception() is None

    @property
    def is_lost(self) -> bool:
        """Say whether nobody waits for it any more, though it was not answered."""
        return self._lost.done()

    @property
    def has_heartbeat(self) -> bool:
        """Say whether its worker has given a sign of life."""
        return self._timeout.has_heartbeat

    def poll(self) -> None:
        """Declare it lost if it is."""
        if not self._lost.done() and (reason := self._timeout.lost_reason()):
            self.mark_lost(reason)

    def mark_lost(self, reason: str, kind: type[BackendError] = WorkerLostError) -> None:
        """Declare it lost, with its worker or else with its place."""
        if not self._lost.done():
            self._lost.set_result(kind(f"{self.name}: {reason}"))

    def cancel(self) -> None:
        """Break off waiting for the backend."""
        self._answer.cancel()

    async def wait_result(self) -> ShardResult:
        """Wait for the worker's summary.

        Raises:
            WorkerLostError: Its worker is lost.
            BackendError: The place failed.
            ConfigurationError: The worker or the place cannot do its work.
        """
        either: set[asyncio.Future[Any]] = {self._answer, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            raise self._lost.result()
        try:
            return ShardResult.from_json(self._answer.result())
        except BackendError as error:
            raise type(error)(f"{self.name}: {error.message}") from error
        except asyncio.CancelledError:
            raise WorkerLostError(f"{self.name}: the backend broke it off") from None
