"""Asyncio helpers: first of several, shared resources, portal for sync callers, thread batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Final, Generic, ParamSpec, TypeVar

from .errors import RunStoppedError
from .protocols import BLOCKED_LOOPS

T = TypeVar("T")
P = ParamSpec("P")


async def wait_first(*events: Awaitable[Any], timeout_s: float | None = None) -> None:
    """Wait until one of several is done: an answer, or what makes waiting for it useless.

    Args:
        events: Futures and tasks, which are left as they are, and coroutines, which end with the
            wait.
        timeout_s: Most seconds to wait.
    """
    futures = {asyncio.ensure_future(event) for event in events}
    try:
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for started_here in futures.difference(events):
            started_here.cancel()


_STOP: Final = ContextVar[threading.Event | None]("fanfold_stop", default=None)


async def call_stoppable(function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a thread; if the caller is cancelled, stop the function and wait for it.

    ``asyncio.run`` waits at its end for all threads: one that reads for minutes must not go on.

    Args:
        function: The function, which calls :func:`check_stopped` repeatedly.
        arguments: Its arguments.
        options: Its named arguments.
    """
    stop, context = threading.Event(), copy_context()
    context.run(_STOP.set, stop)
    call = partial(context.run, partial(function, *arguments, **options))
    running = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        while not running.done():
            with suppress(asyncio.CancelledError):  # LangGraph cancels more than once
                await asyncio.wait({running})
        running.exception()  # it only says that the function was stopped
        raise


def check_stopped() -> None:
    """Raise an error if the caller of :func:`call_stoppable` was cancelled.

    Raises:
        RunStoppedError: It was.
    """
    stop = _STOP.get()
    if stop is not None and stop.is_set():
        raise RunStoppedError("stopped while the input was being read")


DETACH_TASKS: Final = ContextVar("fanfold_kept", default=False)
"""Whether tasks that are created in this context are detached (not cancelled by ``asyncio.run``).
"""


def create_detached_task(
    work: Coroutine[Any, Any, T], *, with_children: bool = False
) -> asyncio.Task[T]:
    """Create a task that ``asyncio.run`` does not cancel at its end, so that it can drain.

    ``asyncio.run`` ends by cancelling all tasks at once and waiting for them. Only tasks that are
    hidden from ``asyncio.all_tasks`` then keep running. A visible task must wait for them: that
    task is cancelled, and drains them.

    Args:
        work: What the task does.
        with_children: Whether the tasks that it creates are detached as well, also in code of third
            parties.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    if with_children:
        context.run(DETACH_TASKS.set, True)
        _install_task_factory(loop)
    return detach_task(loop.create_task(work, context=context))


def detach_task(task: asyncio.Task[T]) -> asyncio.Task[T]:
    """Hide a task from ``asyncio.all_tasks``, and return it."""
    asyncio.tasks._unregister_task(task)  # noqa: SLF001 - documented for extensions of asyncio
    return task


def _install_task_factory(loop: asyncio.AbstractEventLoop) -> None:
    """Make a loop detach the tasks that are created where :data:`DETACH_TASKS` is set."""
    before = loop.get_task_factory()
    if isinstance(before, _DetachingTaskFactory):
        return
    loop.set_task_factory(_DetachingTaskFactory(before))


class _DetachingTaskFactory:
    """A task factory around the loop's previous one."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Future[Any]:
        if self._before is None:
            task = asyncio.Task(work, loop=loop, **options)
        else:
            task = self._before(loop, work, **options)
        context = options.get("context")
        if DETACH_TASKS.get() if context is None else context.get(DETACH_TASKS, False):
            asyncio.tasks._unregister_task(task)  # noqa: SLF001 - see detach_task
        return task


_LoopKey = tuple[asyncio.AbstractEventLoop, Hashable]


class _OpenResource(Generic[T]):
    """One resource, opened and closed in its own task.

    So the order in which users come, leave and are cancelled does not matter.
    """

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self.users = 0
        self.close_requested = asyncio.Event()
        self.ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.task = create_detached_task(self._run_manager(manager), with_children=True)

    async def _run_manager(self, manager: AbstractAsyncContextManager[T]) -> T:
        async with manager as value:
            self.ready.set_result(value)
            await self.close_requested.wait()
        return value

    @property
    def is_closing(self) -> bool:
        """Return True if the resource can no longer be used."""
        return self.close_requested.is_set() or self.task.done()

    async def wait_ready(self) -> T:
        """Wait until the resource is open.

        Raises:
            Exception: Any error from opening it.
        """
        await wait_first(self.ready, self.task)
        return self.ready.result() if self.ready.done() else self.task.result()

    async def close(self) -> None:
        """Close the resource, or stop opening it; completes even if the caller is cancelled.

        Raises:
            Exception: Any error from closing it.
        """
        self.close_requested.set()
        if not self.ready.done():
            self.task.cancel()
        await asyncio.wait({self.task})
        error = None if self.task.cancelled() else self.task.exception()
        if error is not None and self.ready.done():
            raise error


class SharedResource(Generic[T]):
    """One resource per key and event loop, opened by its first user, closed by its last."""

    def __init__(self) -> None:
        self._resources: dict[_LoopKey, _OpenResource[T]] = {}

    @asynccontextmanager
    async def use(
        self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> AsyncIterator[T]:
        """Use the resource of a key, made by ``make`` if it is not open in this loop.

        An error from opening it is raised to every user who waits for it; a later user opens it
        again. While it is being closed, a new user waits.
        """
        loop_key = (asyncio.get_running_loop(), key)
        while (resource := self._resources.get(loop_key)) is not None and resource.is_closing:
            await asyncio.wait({resource.task})
            self._remove(loop_key, resource)
        if resource is None:
            resource = self._resources[loop_key] = _OpenResource(make())
            resource.task.add_done_callback(partial(self._remove, loop_key, resource))
        resource.users += 1
        try:
            yield await resource.wait_ready()
        finally:
            resource.users -= 1
            if resource.users == 0:
                await resource.close()

    def get_open(self, key: Hashable) -> T | None:
        """Return the open resource of a key in this loop, or None."""
        resource = self._resources.get((asyncio.get_running_loop(), key))
        ready = resource is not None and resource.ready.done() and not resource.is_closing
        return resource.ready.result() if resource is not None and ready else None

    def _remove(self, loop_key: _LoopKey, resource: _OpenResource[T], _: object = None) -> None:
        if self._resources.get(loop_key) is resource:
            del self._resources[loop_key]


R = TypeVar("R")


class ThreadBatcher(Generic[T, R]):
    """Collects inputs while a thread is busy, and passes them to the next call together.

    It belongs to the loop that first uses it.

    Args:
        work: Takes a list of inputs, and returns one result for each; it blocks.
    """

    def __init__(self, work: Callable[[list[T]], list[R]]) -> None:
        self._work = work
        self._next: tuple[list[T], asyncio.Task[list[R]]] | None = None
        self._tasks = set[asyncio.Task[list[R]]]()
        self._working = asyncio.Lock()

    async def run(self, piece: T) -> R:
        """Return the result for one input.

        Raises:
            Exception: Any error from ``work``, to all callers in the same batch.
        """
        number, task = self._enqueue(piece)
        return (await asyncio.shield(task))[number]

    def submit(self, piece: T) -> None:
        """Queue an input without waiting for its result."""
        self._enqueue(piece)

    async def wait_idle(self) -> None:
        """Wait until no work is pending."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _enqueue(self, piece: T) -> tuple[int, asyncio.Task[list[R]]]:
        if self._next is None:
            pieces = list[T]()
            task = asyncio.create_task(self._run_batch(pieces))
            self._next = pieces, task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        pieces, task = self._next
        pieces.append(piece)
        return len(pieces) - 1, task

    async def _run_batch(self, pieces: list[T]) -> list[R]:
        async with self._working:
            self._next = None  # the batch is complete: later inputs belong to the next one
            return await asyncio.to_thread(self._work, pieces)


class LoopThread:
    """An event loop in a daemon thread.

    This is not anyio's blocking portal: anyio cancels a task again at each ``await`` until it
    ends, so a cancelled run could neither wait for its items in flight nor close its resources.

    Args:
        name: Name of the thread.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, name: str) -> None:
        started = threading.Event()
        target = partial(self._run_loop, started)
        self._thread = threading.Thread(target=target, name=name, daemon=True)
        self._thread.start()
        started.wait()

    def _run_loop(self, started: threading.Event) -> None:
        with asyncio.Runner() as runner:  # at its end it cancels and awaits the remaining tasks
            self.loop = runner.get_loop()
            self.loop.call_soon(started.set)
            self.loop.run_forever()
            runner.run(_wait_cancelled_tasks())

    def stop(self) -> None:
        """End the tasks and the loop, and wait for the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


async def _wait_cancelled_tasks() -> None:
    """Wait for the tasks being cancelled: a second cancellation would interrupt their cleanup."""
    if tasks := {task for task in asyncio.all_tasks() if task.cancelling()}:
        await asyncio.wait(tasks)


def run_in_loop(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a coroutine to its end in the loop of another thread, with the caller's context."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        # Also on KeyboardInterrupt: the call must not continue unnoticed. No effect if done.
        future.cancel()
        raise


def _get_running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class SyncPortal:
    """Runs coroutines for callers that are not in a loop, or block one.

    Args:
        get_home_loop: Returns the loop of the fleet, or None.
        on_close: Called in the private loop before it ends, to close what was opened there.
    """

    def __init__(
        self,
        get_home_loop: Callable[[], asyncio.AbstractEventLoop | None],
        on_close: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._get_home_loop = get_home_loop
        self._on_close = on_close
        self._lock = threading.Lock()
        self._private: LoopThread | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run one coroutine to its end, with the caller's context variables."""
        loop, here = self._choose_loop(), _get_running_loop()
        if here is not None:
            BLOCKED_LOOPS.add(here)
        try:
            return run_in_loop(coroutine, loop)
        finally:
            BLOCKED_LOOPS.discard(here)

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Yield what an asynchronous generator yields, and close it at the end."""

        async def step() -> list[T]:
            try:
                return [await anext(source)]
            except StopAsyncIteration:
                return []

        try:
            while got := self.run(step()):
                yield from got
        finally:
            if (close := getattr(source, "aclose", None)) is not None:
                self.run(close())

    def _choose_loop(self) -> asyncio.AbstractEventLoop:
        home = self._get_home_loop()
        if home is not None and home.is_running() and home is not _get_running_loop():
            return home
        with self._lock:
            if self._private is None:
                self._private = LoopThread("fanfold-sync")
            return self._private.loop

    @property
    def is_open(self) -> bool:
        """Return True if there is a private loop."""
        return self._private is not None

    def close(self) -> None:
        """End the private loop, if there is one."""
        with self._lock:
            thread, self._private = self._private, None
        if thread is not None:
            run_in_loop(self._on_close(), thread.loop)
            thread.stop()


class PortalProvider:
    """Runs coroutines for threads without a loop; its thread runs only while it is used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._thread: LoopThread | None = None

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine to its end, with the caller's context variables.

        Args:
            make: Makes the coroutine.
        """
        with self._lock:
            thread = self._thread = self._thread or LoopThread("fanfold-aside")
            self._users += 1
        try:
            return run_in_loop(make(), thread.loop)
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._thread = None
                    thread.stop()
