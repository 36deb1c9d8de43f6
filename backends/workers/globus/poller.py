"""Rate-limited connection and task polling."""

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

from ...core.errors import FanfoldError, SiteError
from ...core.types import Json
from .errors import forgotten, offline
from .service import Service


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the talk with the service.

    The service allows 20 requests in 10 s; with these numbers a run makes 17 at most, and two more
    while requests fail and are repeated.

    Attributes:
        burst: Requests that may be made at once.
        per_s: Requests per second after that.
        first_s: Pause before tasks are asked after, while some end.
        last_s: The longest such pause, while none ends.
        look_s: Seconds between looks at an endpoint's health.
        missing_s: Seconds for which the service may say nothing of a task that it took.
    """

    burst: int = 5
    per_s: float = 1.2
    first_s: float = 1.0
    last_s: float = 5.0
    look_s: float = 10.0
    missing_s: float = 20.0


class Bucket:
    """Spends turns: as many at once as the burst, then so many per second.

    Args:
        pace: The numbers.
        clock: Returns the time in seconds, of a clock that never goes back.
    """

    def __init__(self, pace: Pace, clock: Callable[[], float]) -> None:
        self._pace, self._clock = pace, clock
        self._full_at = clock()  # when all turns of the burst will be there again

    async def turn(self) -> None:
        """Wait for a turn; those who wait go in the order in which they came."""
        now, gap = self._clock(), 1.0 / self._pace.per_s
        self._full_at = max(self._full_at, now) + gap
        await asyncio.sleep(max(0.0, self._full_at - now - self._pace.burst * gap))


T = TypeVar("T")
_CLOSE_S = 1.0


class Line:
    """Runs one call at a time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function and return its value; needs a running loop.

        A caller that is cancelled leaves; the call itself goes on.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
                _tell(loop, _fail, answer, error)
            else:
                _tell(loop, _end, answer, value)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="globus", daemon=True)
            self._thread.start()
        self._calls.put(run)
        return await answer

    def hang_up(self) -> None:
        """End the thread after the calls that wait; does not wait for it."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Talk:
    """A run's connection to the service.

    Args:
        connect: Makes the service; blocks.
        pace: How often it is asked.
    """

    def __init__(self, connect: Callable[[], Service], pace: Pace) -> None:
        self._connect, self._line = connect, Line()
        self._bucket, self._asking = Bucket(pace, time.monotonic), asyncio.Lock()
        self._service: Service | None = None

    async def open(self) -> None:
        """Connect.

        Raises:
            FanfoldError: There is no login, or the service refused or did not answer.
        """
        self._service = await self._line.call(self._connect)

    async def ask(self, what: Callable[[Service], T]) -> T:
        """Ask the service, when there is a turn.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        async with self._asking:  # else turns would gather behind a slow answer, and go at once
            await self._bucket.turn()
            if self._service is None:
                raise SiteError("globus_compute: not connected")
            return await self._line.call(what, self._service)

    async def close(self) -> None:
        """Close the connection; a request that is held up is left behind."""
        service, self._service = self._service, None
        if service is not None:
            closed = asyncio.ensure_future(self._line.call(service.close))
            await asyncio.wait({closed}, timeout=_CLOSE_S)
            closed.cancel()
        self._line.hang_up()


def _tell(loop: asyncio.AbstractEventLoop, told: Callable[..., None], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the loop has ended, and nobody listens
        loop.call_soon_threadsafe(told, *arguments)


def _end(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


logger = logging.getLogger(__name__)

ASKED: Final = 64
"""Tasks asked after in one request; each answer may carry a result."""

Answer = asyncio.Future[dict[str, Json]]


@dataclass(frozen=True, slots=True)
class _Task:
    """A task that was posted: to whom, whom to tell, how long it may take, and when."""

    endpoint: str
    answer: Answer
    deadline_s: float
    since: float


class Asking:
    """Asks after tasks while some are open, and after the endpoints that have them.

    Args:
        talk: The connection to the service.
        pace: How often to ask.
    """

    def __init__(self, talk: Talk, pace: Pace) -> None:
        self._talk, self._pace = talk, pace
        self._tasks: dict[str, _Task] = {}
        self._down: dict[str, int] = {}
        self._doubts = itertools.count()
        self._idle: set[str] = set()
        self._missing: dict[str, float] = {}
        self._loop: asyncio.Task[None] | None = None

    def follow(self, task: str, endpoint: str, answer: Answer, deadline_s: float) -> None:
        """Bring the end of a task home to ``answer``; one that is done is no longer asked after.

        Args:
            task: The task's id.
            endpoint: Where it is.
            answer: Whom to tell.
            deadline_s: Seconds that a worker may take for it.
        """
        self._tasks[task] = _Task(endpoint, answer, deadline_s, time.monotonic())
        answer.add_done_callback(lambda _: self._tasks.pop(task, None))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._ask_on())

    def up(self, endpoint: str) -> bool:
        """Say whether an endpoint could be reached when last seen."""
        return endpoint not in self._down

    def suspect(self, endpoint: str) -> None:
        """Take an endpoint for down until a look that begins from now on sees it online."""
        self._down[endpoint] = next(self._doubts)

    async def check(self, endpoint: str) -> None:
        """Look how an endpoint is; tasks that are lost by that are given up.

        Raises:
            WorkerLostError: It is offline.
            FanfoldError: The service refused, or did not answer.
        """
        doubt = self._down.get(endpoint)
        health = await self._talk.ask(lambda service: service.health(endpoint))
        was_idle, now = endpoint in self._idle, time.monotonic()
        for name, task in list(self._tasks.items()):
            if task.endpoint == endpoint and (
                error := health.lost(endpoint, now - task.since, task.deadline_s, was_idle)
            ):
                self._settle(name, error)
        self._idle = self._idle - {endpoint} | ({endpoint} if health.idle else set())
        if not health.online:
            self.suspect(endpoint)
            raise offline(endpoint)
        if self._down.get(endpoint) == doubt:  # a later doubt is not answered by this look
            self._down.pop(endpoint, None)

    async def close(self) -> None:
        """Stop asking, and give up what is open; tasks go on at their endpoints."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.wait({loop})
        for name in list(self._tasks):
            self._settle(name, SiteError("globus_compute: closed"))

    async def _ask_on(self) -> None:
        pause, looked = self._pace.first_s, time.monotonic()
        while self._tasks:
            await asyncio.sleep(pause)
            ended = await self._ask_all()
            pause = self._pace.first_s if ended else min(self._pace.last_s, 1.5 * pause)
            if time.monotonic() - looked >= self._pace.look_s:
                await self._look()
                looked = time.monotonic()

    async def _ask_all(self) -> bool:
        """Ask after all open tasks; return whether some have ended."""
        tasks, ended = list(self._tasks), False
        for lo in range(0, len(tasks), ASKED):
            some = tasks[lo : lo + ASKED]
            try:
                ended |= await self._ask(some)
            except SiteError as error:  # they may be ready all the same: asked again
                logger.warning("%s; asking again", error.message)
            except FanfoldError as error:
                for task in some:
                    self._settle(task, error)
        return ended

    async def _ask(self, tasks: list[str]) -> bool:
        ends = await self._talk.ask(lambda service: service.ends(tasks))
        before = len(self._tasks)
        for name in tasks:
            if name not in ends:
                self._miss(name)
                continue
            self._missing.pop(name, None)
            if (end := ends[name]) is not None:
                self._settle(name, end)
        return len(self._tasks) < before

    def _miss(self, name: str) -> None:
        """Give a task up of which the service says nothing, unless it may only be new to it."""
        task, now = self._tasks.get(name), time.monotonic()
        since = self._missing.setdefault(name, now)
        if task is not None and now - since >= self._pace.missing_s:
            self._settle(name, forgotten(task.endpoint))

    def _settle(self, name: str, end: dict[str, Json] | FanfoldError) -> None:
        self._missing.pop(name, None)
        if task := self._tasks.pop(name, None):
            settle(task.answer, end)

    async def _look(self) -> None:
        """See which endpoints with open tasks are offline."""
        for endpoint in {task.endpoint for task in self._tasks.values()}:
            try:
                await self.check(endpoint)
            except FanfoldError as error:
                logger.warning("%s", error.message)


def settle(answer: Answer, end: dict[str, Json] | FanfoldError) -> None:
    """Give an answer, unless one was given."""
    if answer.done():
        return
    if isinstance(end, FanfoldError):
        answer.set_exception(end)
    else:
        answer.set_result(end)
