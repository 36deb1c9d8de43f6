"""One invocation of the map-reduce: its open runs, its end, and its exclusive claims.

LangGraph runs the nodes of a graph as separate tasks and cancels them at its end, but not always:
if a sibling of the graph fails in a parent graph, tasks can be left behind that are never awaited,
and threads cannot be cancelled at all. So the graph itself detects the end of an invocation, and
then drains and closes everything that it has open.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from types import FrameType
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.runtime import Runtime

from ..backends.core.errors import ConfigurationError, RunStoppedError
from ..backends.storage.run_folder import RunFolder, make_busy_message
from ..nodes.context import RunTools

_POLL_S: Final = 0.05
_OVER: Final = "the invocation has ended"
_PULLS: Final = 2
"""Parts of a stream that a task must take in a row to count as its reader."""

CURRENT_INVOCATION: Final[ContextVar[Invocation | None]] = ContextVar(
    "fanfold_invocation", default=None
)
"""The invocation of the current node."""


class Invocation:
    """A call of the graph, from its start until everything that it opened is closed.

    Args:
        config: The configuration of the call.
        keeps_claims: Keep its claims until :meth:`end`; else until nothing is open.
    """

    def __init__(self, config: RunnableConfig | None = None, *, keeps_claims: bool = True) -> None:
        self._keeps_claims = keeps_claims
        ambient = var_child_runnable_config.get() or {}
        self._around = next((c for c in (config, ambient) if c and _pregel_call(c)), None)
        self._thread = threading.current_thread()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._pulls = 0
        self._reading = self._has_ended = False
        self._open = dict[asyncio.Task[Any], RunTools | None]()
        self._idle: asyncio.Event | None = None
        self._runtime: Runtime[Any] | None = None
        self._claims = dict[Hashable, Callable[[], None]]()

    # -- lifecycle ----------------------------------------------------------------------

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make this the current invocation while the block reads the next part of its stream."""
        before, self._thread = CURRENT_INVOCATION.set(self), threading.current_thread()
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None  # synchronous code
        if task is not None:
            self._loop = task.get_loop()
        self._pulls = self._pulls + 1 if task is self._reader else 1
        self._reader, self._reading = task, True
        try:
            yield
        finally:
            self._reading = False
            CURRENT_INVOCATION.reset(before)

    @contextmanager
    def track_opening(self) -> Iterator[None]:
        """Track the current task while it opens, uses and closes a run in the block.

        Raises:
            RunStoppedError: The invocation has ended.
        """
        if self._has_ended:
            raise RunStoppedError(_OVER)
        task = asyncio.current_task()
        assert task is not None, "a run is opened by a task"
        self._open[task] = None
        try:
            yield
        finally:
            del self._open[task]
            if not self._open:
                if self._idle is not None:
                    self._idle.set()
                if self._has_ended or not self._keeps_claims:
                    self.release_claims()

    @contextmanager
    def track_run(self, tools: RunTools) -> Iterator[None]:
        """Stop the run that the current task has opened when the invocation ends."""
        task = asyncio.current_task()
        assert task is not None, "a run is opened by a task"
        self._open[task] = tools
        above = [future for future in self._parent_futures() if isinstance(future, asyncio.Future)]
        for future in above:
            future.add_done_callback(self._drain)
        watching = None if self._runtime is None else asyncio.create_task(self._watch(tools))
        try:
            with tools.gate.poll_stop(self.stop_reason):
                if self._has_ended:
                    self._drain()
                yield
        finally:
            if watching is not None:
                watching.cancel()
            for future in above:
                future.remove_done_callback(self._drain)

    async def _watch(self, tools: RunTools) -> None:
        """Poll more often than the gate, only in synchronous code, which has a separate loop."""
        while not tools.gate.is_closed:
            await asyncio.sleep(_POLL_S)
            if self._is_unwinding():
                tools.gate.cancel()

    def _drain(self, _: object = None) -> None:
        for tools in self._open_runs():
            tools.gate.cancel()

    def set_runtime(self, runtime: Runtime[Any]) -> None:
        """Record the runtime of a node in synchronous code, to detect the end of the loop."""
        self._runtime = runtime

    def stop_reason(self) -> str | None:
        """Return why nothing more may start, or None; also detects an unannounced end."""
        if self._has_ended or self._is_abandoned or self._is_orphaned() or self._is_unwinding():
            return _OVER
        return None

    async def end(self) -> None:
        """Drain and close what is open, and release the claims.

        A cancellation by LangGraph, which cancels more than once, still waits; any other cancels
        the items in flight.

        Raises:
            CancelledError: It was cancelled while it waited.
        """
        self._has_ended, cancelled = True, None
        for task, tools in self._open.items():
            if tools is not None:
                tools.gate.cancel()
            else:
                task.cancel()  # still opening: nothing is in flight
        while self._open:
            self._idle = asyncio.Event()
            try:
                await self._idle.wait()
            except asyncio.CancelledError as error:
                cancelled = error
                if not is_engine_cancel(error):
                    self.stop_waiting()
        self.release_claims()
        if cancelled is not None:
            raise cancelled

    def end_sync(self) -> None:
        """Release the claims at the end of synchronous code, or when the open runs close."""
        self._has_ended = True
        if not self._open:
            self.release_claims()

    def stop_waiting(self) -> None:
        """Stop waiting for the items in flight."""
        for tools in self._open_runs():
            tools.gate.close(_OVER)
            tools.gate.stop_waiting()

    def _open_runs(self) -> list[RunTools]:
        return [tools for tools in self._open.values() if tools is not None]

    # -- state -----------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        """Return True if the invocation is about to end."""
        cancelling = self._reading and self._reader is not None and self._reader.cancelling() > 0
        cancelled = any(tools.gate.is_cancelled for tools in self._open_runs())
        return (
            self._has_ended or cancelling or cancelled or self._is_abandoned or self._is_orphaned()
        )

    @property
    def is_dead(self) -> bool:
        """Return True if it can no longer end: its loop or thread is dead, or it has no reader."""
        if self._loop is None:
            return not self._thread.is_alive()
        return self._loop.is_closed() or (self._is_abandoned and not self._open)

    @property
    def _is_abandoned(self) -> bool:
        """Return True if the task that read its stream has ended before the stream did.

        Servers read each part in a separate task; they close the stream itself.
        """
        reader = self._reader
        return (
            not self._reading
            and reader is not None
            and reader.done()
            and self._pulls >= _PULLS
            and not self._has_ended
        )

    def _is_orphaned(self) -> bool:
        """Return True if a parent graph, or the task of one, has ended.

        A task that LangGraph cancels twice, as it does if a sibling fails, can leave behind the
        tasks that it has started.
        """
        return any(future is None or future.done() for future in self._parent_futures())

    def _parent_futures(self) -> Iterator[Any]:
        """Yield the future of each parent graph that has one; None for a graph that has ended.

        A graph that runs a single node needs no future for it.
        """
        config: Mapping[str, Any] | None = self._around
        while config is not None and (call := _pregel_call(config)) is not None:
            node, futures = call.args[0](), call.keywords["futures"]()
            if node is None or futures is None:
                yield None
                return
            yield from [future for future, of in list(futures.items()) if of is node]
            config = call.keywords["schedule_task"].__self__.config

    def _is_unwinding(self) -> bool:
        """Return True if an exception is leaving LangGraph's synchronous loop around a node.

        The loop then waits for the threads of its nodes without a signal to them, whether a sibling
        failed, a step timed out, or Ctrl-C was pressed. So this inspects the stack frames.
        """
        runtime = self._runtime
        if runtime is None or runtime.execution_info is None:
            return False
        namespace = tuple(runtime.execution_info.checkpoint_ns.split("|"))
        for top in sys._current_frames().values():  # noqa: SLF001 - documented, if named so
            frame: FrameType | None = top
            while frame is not None:
                if frame.f_code.co_qualname == "SyncPregelLoop.__exit__":
                    values = frame.f_locals
                    around = values["self"]
                    if (
                        values["exc_type"] is not None
                        and around.control is runtime.control
                        and namespace[: len(around.checkpoint_ns)] == around.checkpoint_ns
                    ):
                        return True
                frame = frame.f_back
        return False

    # -- claims ----------------------------------------------------------------------

    def add_claim(self, key: Hashable, release: Callable[[], None]) -> None:
        """Record a claim and the function that releases it."""
        self._claims[key] = release

    def release_claims(self) -> None:
        """Release all claims."""
        while self._claims:
            self._claims.popitem()[1]()


def _pregel_call(config: Mapping[str, Any]) -> partial[Any] | None:
    """Return LangGraph's task-calling function in the configuration of a node, or None.

    It holds the node, the futures of the nodes that run at the same time, and the graph's loop.
    """
    call = config.get("configurable", {}).get("__pregel_call")
    known = isinstance(call, partial) and {"futures", "schedule_task"} <= call.keywords.keys()
    return call if known and call.args else None


def is_engine_cancel(error: asyncio.CancelledError) -> bool:
    """Return True if LangGraph cancelled a task, by the marker in the error."""
    return any(type(argument) is object for argument in error.args)


def is_forced_cancel(error: asyncio.CancelledError) -> bool:
    """Return True if a graph was cancelled again while it waited for its nodes.

    The error then contains LangGraph's task that waits for them.
    """
    handed_out = any(isinstance(argument, asyncio.Task) for argument in error.args)
    return handed_out and not is_engine_cancel(error)


class RunClaims:
    """Claims of the invocations of this process on run folders and on threads of savers.

    File locks keep processes apart, if the file system supports them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = dict[Hashable, Invocation]()

    async def claim_run(self, run: RunFolder, invocation: Invocation) -> None:
        """Claim a run for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation or process uses it.
            JournalError: The folder cannot be written.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while (taken := self._try_claim(key, invocation)) is None:
            self._check_ending(key, make_busy_message(run.path))
            await asyncio.sleep(_POLL_S)
        if not taken:
            return
        lock = run.lock()
        locking = asyncio.ensure_future(asyncio.to_thread(lock.__enter__))
        try:
            await asyncio.shield(locking)
        except BaseException:
            await asyncio.wait({locking})
            if not locking.cancelled() and locking.exception() is None:
                lock.__exit__(None, None, None)
            self._release(key, invocation)
            raise
        invocation.add_claim(key, lambda: self._unlock(key, invocation, lock))

    async def wait_for_run(self, run: RunFolder, invocation: Invocation) -> None:
        """Wait while another invocation of a run is ending.

        Raises:
            ConfigurationError: Another invocation uses it and does not end.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while self._other_holder(key, invocation) is not None:
            self._check_ending(key, make_busy_message(run.path))
            await asyncio.sleep(_POLL_S)

    async def claim_thread(self, key: Hashable, name: str, invocation: Invocation) -> None:
        """Claim a saver's thread for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation uses it.
        """
        while self._try_claim(key, invocation) is None:
            self._check_ending(key, make_busy_message(name))
            await asyncio.sleep(_POLL_S)
        invocation.add_claim(key, lambda: self._release(key, invocation))

    def claim_thread_sync(self, key: Hashable, name: str, invocation: Invocation) -> None:
        """Claim a saver's thread in synchronous code; blocks."""
        while self._try_claim(key, invocation) is None:
            self._check_ending(key, make_busy_message(name))
            time.sleep(_POLL_S)
        invocation.add_claim(key, lambda: self._release(key, invocation))

    def _try_claim(self, key: Hashable, invocation: Invocation) -> bool | None:
        """Try to claim a key; return True if it was free, False if held already, None if taken."""
        with self._lock:
            holder = self._holders.get(key)
            if holder is invocation:
                return False
            if holder is not None and not holder.is_dead:
                return None
        if holder is not None:
            holder.release_claims()
        with self._lock:
            return self._holders.setdefault(key, invocation) is invocation or None

    def _other_holder(self, key: Hashable, invocation: Invocation) -> Invocation | None:
        with self._lock:
            holder = self._holders.get(key)
        return None if holder is invocation or holder is None or holder.is_dead else holder

    def _check_ending(self, key: Hashable, message: str) -> None:
        with self._lock:
            holder = self._holders.get(key)
        if holder is not None and not (holder.is_ending or holder.is_dead):
            raise ConfigurationError(message)

    def _release(self, key: Hashable, invocation: Invocation) -> None:
        with self._lock:
            if self._holders.get(key) is invocation:
                del self._holders[key]

    def _unlock(
        self, key: Hashable, invocation: Invocation, lock: AbstractContextManager[None]
    ) -> None:
        lock.__exit__(None, None, None)
        self._release(key, invocation)


@lru_cache(maxsize=1)
def get_claims() -> RunClaims:
    """Return the claims of this process."""
    return RunClaims()


async def follow_stream(
    parts: AsyncIterator[Any], config: RunnableConfig | None, thread: tuple[Hashable, str] | None
) -> AsyncIterator[Any]:
    """Yield a graph's stream as an invocation, and close everything at its end.

    Args:
        parts: LangGraph's stream.
        config: The configuration of the call.
        thread: Key and name of the saver's thread, or None.

    Raises:
        ConfigurationError: Another invocation uses the thread.
    """
    invocation = Invocation(config)
    try:
        if thread is not None:
            await get_claims().claim_thread(*thread, invocation)
        while True:
            with invocation.activate():
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part
    except asyncio.CancelledError as error:
        if is_forced_cancel(error):
            invocation.stop_waiting()
        raise
    finally:
        try:
            await parts.aclose()  # type: ignore[attr-defined]  # it is a generator
        finally:
            await invocation.end()


def follow_stream_sync(
    parts: Iterator[Any], config: RunnableConfig | None, thread: tuple[Hashable, str] | None
) -> Iterator[Any]:
    """Do what :func:`follow_stream` does in synchronous code."""
    invocation = Invocation(config)
    try:
        if thread is not None:
            get_claims().claim_thread_sync(*thread, invocation)
        while True:
            with invocation.activate():
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part
    finally:
        try:
            parts.close()  # type: ignore[attr-defined]  # it is a generator
        finally:
            invocation.end_sync()
