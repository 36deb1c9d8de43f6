"""Connect to the service within its rate limit, and poll tasks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from tenacity import wait_exponential

from ...core.errors import BackendError, FanfoldError
from ...core.token_bucket import TokenBucket
from ...core.types import Json
from ...core.waits import pause_after
from .errors import offline_error, unknown_task_error
from .service import TaskOutcome, TaskService


@dataclass(frozen=True, slots=True)
class PollPolicy:
    """Intervals of requests to the service.

    The service allows 20 requests in 10 s; with these numbers a run makes 17 at most, and two more
    while requests fail and are retried.

    Attributes:
        burst: Requests that may be made at once.
        rate_per_s: Requests per second after that.
        min_pause_s: Pause between polls while tasks end.
        max_pause_s: Longest pause between polls while none ends.
        health_check_s: Seconds between two checks of an endpoint's health.
        missing_timeout_s: Seconds for which the service may omit a submitted task.
    """

    burst: int = 5
    rate_per_s: float = 1.2
    min_pause_s: float = 1.0
    max_pause_s: float = 5.0
    health_check_s: float = 10.0
    missing_timeout_s: float = 20.0


T = TypeVar("T")
_CLOSE_S = 1.0


class SerialCaller:
    """Run blocking calls in one thread, one at a time, in order of arrival."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function and return its value; needs a running loop.

        If the caller is cancelled, the call itself goes on.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised in the caller
                _call_in_loop(loop, _set_error, answer, error)
            else:
                _call_in_loop(loop, _set_result, answer, value)

        if self._thread is None:
            self._thread = threading.Thread(target=self._run_calls, name="globus", daemon=True)
            self._thread.start()
        self._calls.put(run)
        return await answer

    def close(self) -> None:
        """End the thread after the pending calls; does not wait for it."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _run_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class ServiceConnection:
    """A run's connection to the service.

    Args:
        connect: Makes the service; blocks.
        policy: The request rate.
    """

    def __init__(self, connect: Callable[[], TaskService], policy: PollPolicy) -> None:
        self._connect, self._caller = connect, SerialCaller()
        self._bucket = TokenBucket(policy.rate_per_s, policy.burst)
        self._request_lock = asyncio.Lock()
        self._service: TaskService | None = None

    async def open(self) -> None:
        """Connect.

        Raises:
            FanfoldError: There is no login, or the service refused or did not answer.
        """
        self._service = await self._caller.call(self._connect)

    async def request(self, call: Callable[[TaskService], T]) -> T:
        """Call the service within the rate limit.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        # without the lock tokens would gather behind a slow answer, and be spent at once
        async with self._request_lock:
            await asyncio.sleep(self._bucket.take(1.0, time.monotonic()))
            if self._service is None:
                raise BackendError("globus_compute: not connected")
            return await self._caller.call(call, self._service)

    async def close(self) -> None:
        """Close the connection; a request that hangs is abandoned."""
        service, self._service = self._service, None
        if service is not None:
            closed = asyncio.ensure_future(self._caller.call(service.close))
            await asyncio.wait({closed}, timeout=_CLOSE_S)
            closed.cancel()
        self._caller.close()


def _call_in_loop(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any
) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(callback, *arguments)


def _set_result(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _set_error(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


logger = logging.getLogger(__name__)

_PAUSE_GROWTH: Final = 1.5
MAX_TASKS_PER_REQUEST: Final = 64
"""Tasks polled in one request; each answer may contain a result."""

ResultFuture = asyncio.Future[dict[str, Json]]


@dataclass(frozen=True, slots=True)
class _Task:
    """A submitted task: its endpoint, future, deadline and time of submission."""

    endpoint: str
    answer: ResultFuture
    deadline_s: float
    since: float


class TaskPoller:
    """Poll tasks while some are open, and check the endpoints that have them.

    Args:
        connection: The connection to the service.
        policy: The poll intervals.
    """

    def __init__(self, connection: ServiceConnection, policy: PollPolicy) -> None:
        self._connection, self._policy = connection, policy
        self._tasks: dict[str, _Task] = {}
        self._down: dict[str, int] = {}
        self._suspicions = itertools.count()
        self._idle: set[str] = set()
        self._missing: dict[str, float] = {}
        self._loop: asyncio.Task[None] | None = None

    def add_task(self, task: str, endpoint: str, answer: ResultFuture, deadline_s: float) -> None:
        """Poll a task until its outcome is set on ``answer``, or ``answer`` is done.

        Args:
            task: The task's id.
            endpoint: The endpoint that has it.
            answer: Receives the outcome.
            deadline_s: Seconds that a worker may take for it.
        """
        self._tasks[task] = _Task(endpoint, answer, deadline_s, time.monotonic())
        answer.add_done_callback(lambda _: self._tasks.pop(task, None))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._poll_until_done())

    def is_polled(self, task: str) -> bool:
        """Return True if a task is polled and has no outcome yet."""
        return task in self._tasks

    def is_online(self, endpoint: str) -> bool:
        """Return True if the endpoint was online when last checked."""
        return endpoint not in self._down

    def mark_suspect(self, endpoint: str) -> None:
        """Mark an endpoint as offline until a later check finds it online."""
        self._down[endpoint] = next(self._suspicions)

    async def check_endpoint(self, endpoint: str) -> None:
        """Check an endpoint; tasks that are lost because of its state are failed.

        Raises:
            WorkerLostError: It is offline.
            FanfoldError: The service refused, or did not answer.
        """
        suspicion = self._down.get(endpoint)
        health = await self._connection.request(lambda service: service.fetch_health(endpoint))
        was_idle, now = endpoint in self._idle, time.monotonic()
        for name, task in list(self._tasks.items()):
            if task.endpoint == endpoint and (
                error := health.task_error(endpoint, now - task.since, task.deadline_s, was_idle)
            ):
                self._resolve(name, error)
        self._idle = self._idle - {endpoint} | ({endpoint} if health.is_idle else set())
        if not health.online:
            self.mark_suspect(endpoint)
            raise offline_error(endpoint)
        if self._down.get(endpoint) == suspicion:  # this check does not clear a later suspicion
            self._down.pop(endpoint, None)

    async def close(self) -> None:
        """Stop polling, and fail open tasks here; they go on at their endpoints."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.wait({loop})
        for name in list(self._tasks):
            self._resolve(name, BackendError("globus_compute: closed"))

    async def _poll_until_done(self) -> None:
        policy, quiet, checked_at = self._policy, 1, time.monotonic()
        wait = wait_exponential(policy.min_pause_s, policy.max_pause_s, _PAUSE_GROWTH)
        while self._tasks:
            await asyncio.sleep(pause_after(wait, quiet))
            quiet = 1 if await self._poll_all() else quiet + 1
            if time.monotonic() - checked_at >= self._policy.health_check_s:
                await self._check_endpoints()
                checked_at = time.monotonic()

    async def _poll_all(self) -> bool:
        """Poll all open tasks; return True if some have ended."""
        tasks, ended = list(self._tasks), False
        for lo in range(0, len(tasks), MAX_TASKS_PER_REQUEST):
            some = tasks[lo : lo + MAX_TASKS_PER_REQUEST]
            try:
                ended |= await self._poll_batch(some)
            except BackendError as error:  # the tasks may be done: polled again
                logger.warning("%s; polling again", error.message)
            except FanfoldError as error:
                for task in some:
                    self._resolve(task, error)
        return ended

    async def _poll_batch(self, tasks: list[str]) -> bool:
        before = len(self._tasks)
        outcomes = await self.fetch_outcomes(tasks)
        for name in tasks:
            if name not in outcomes:
                self._handle_missing(name)
                continue
            self._missing.pop(name, None)
            if (outcome := outcomes[name]) is not None:
                self._resolve(name, outcome)
        return len(self._tasks) < before

    async def fetch_outcomes(self, tasks: list[str]) -> dict[str, TaskOutcome | None]:
        """Return how tasks ended, None for open ones; unknown tasks are omitted.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        found = await self._connection.request(lambda service: service.fetch_outcomes(tasks))
        if found is not None:
            return found
        if len(tasks) == 1:
            return {}
        half = len(tasks) // 2
        return await self.fetch_outcomes(tasks[:half]) | await self.fetch_outcomes(tasks[half:])

    def _handle_missing(self, name: str) -> None:
        """Fail a task that the service omits, unless it may only be new to the service."""
        task, now = self._tasks.get(name), time.monotonic()
        since = self._missing.setdefault(name, now)
        if task is not None and now - since >= self._policy.missing_timeout_s:
            self._resolve(name, unknown_task_error(task.endpoint))

    def _resolve(self, name: str, outcome: dict[str, Json] | FanfoldError) -> None:
        self._missing.pop(name, None)
        if task := self._tasks.pop(name, None):
            resolve_future(task.answer, outcome)

    async def _check_endpoints(self) -> None:
        """Check the endpoints with open tasks, and log errors."""
        for endpoint in {task.endpoint for task in self._tasks.values()}:
            try:
                await self.check_endpoint(endpoint)
            except FanfoldError as error:
                logger.warning("%s", error.message)


def resolve_future(answer: ResultFuture, outcome: dict[str, Json] | FanfoldError) -> None:
    """Set the outcome, unless one is set."""
    if answer.done():
        return
    if isinstance(outcome, FanfoldError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
