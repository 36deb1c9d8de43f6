"""One invocation of the map-reduce: what it has open, whether it has ended, and that it is alone.

LangGraph runs a graph's nodes as tasks of their own and cancels them at its end, but not always:
where a sibling of the graph fails in a parent graph, tasks can be left behind that nobody waits
for, and threads cannot be cancelled at all. So the graph itself says when an invocation ends, and
whatever it has open is then drained and closed.
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
from ..backends.storage.run_folder import RunFolder, busy
from ..nodes.context import RunTools

_LOOK_S: Final = 0.05
_OVER: Final = "the invocation has ended"
_PULLS: Final = 2
"""A task that took so many parts of a stream in a row is its reader."""

CURRENT: Final[ContextVar[Invocation | None]] = ContextVar("fanfold_invocation", default=None)
"""The invocation that a node belongs to."""


class Invocation:
    """A call of the graph, from its start until everything that it opened is closed.

    Args:
        config: What the graph was called with.
        lasting: Whether it keeps its claims until :meth:`end`; else until nothing is open.
    """

    def __init__(self, config: RunnableConfig | None = None, *, lasting: bool = True) -> None:
        self._lasting = lasting
        ambient = var_child_runnable_config.get() or {}
        self._around = next((c for c in (config, ambient) if c and _call_of(c)), None)
        self._thread = threading.current_thread()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._pulls = 0
        self._reading = self._over = False
        self._open = dict[asyncio.Task[Any], RunTools | None]()
        self._idle: asyncio.Event | None = None
        self._runtime: Runtime[Any] | None = None
        self._claims = dict[Hashable, Callable[[], None]]()

    # -- its course ----------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Belong to this invocation in the block, in which the next part of its stream is made."""
        before, self._thread = CURRENT.set(self), threading.current_thread()
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None  # plain code
        if task is not None:
            self._loop = task.get_loop()
        self._pulls = self._pulls + 1 if task is self._reader else 1
        self._reader, self._reading = task, True
        try:
            yield
        finally:
            self._reading = False
            CURRENT.reset(before)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Have the present task open a run, use it and close it in the block.

        Raises:
            RunStoppedError: The invocation has ended.
        """
        if self._over:
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
                if self._over or not self._lasting:
                    self.release()

    @contextmanager
    def using(self, tools: RunTools) -> Iterator[None]:
        """Have the run that the present task has opened stop when the invocation ends."""
        task = asyncio.current_task()
        assert task is not None, "a run is opened by a task"
        self._open[task] = tools
        above = [future for future in self._above() if isinstance(future, asyncio.Future)]
        for future in above:
            future.add_done_callback(self._drain)
        watching = None if self._runtime is None else asyncio.create_task(self._watch(tools))
        try:
            with tools.gate.heeding(self.stopped):
                if self._over:
                    self._drain()
                yield
        finally:
            if watching is not None:
                watching.cancel()
            for future in above:
                future.remove_done_callback(self._drain)

    async def _watch(self, tools: RunTools) -> None:
        """Look more often than the gate does, in plain code: it costs a loop of its own nothing."""
        while not tools.gate.closed:
            await asyncio.sleep(_LOOK_S)
            if self._unwinding():
                tools.gate.cancel()

    def _drain(self, _: object = None) -> None:
        for tools in self._tools():
            tools.gate.cancel()

    def entered(self, runtime: Runtime[Any]) -> None:
        """Note what a node is run with in plain code, by which LangGraph's end is recognised."""
        self._runtime = runtime

    def stopped(self) -> str | None:
        """Say why nothing more shall begin, or None; what nobody announces is found here."""
        if self._over or self._abandoned or self._orphaned() or self._unwinding():
            return _OVER
        return None

    async def end(self) -> None:
        """Drain and close what is open, and give up the claims.

        A cancellation by LangGraph, which cancels more than once, is waited out; any other cuts
        off the items in flight.

        Raises:
            CancelledError: It was cancelled while it waited.
        """
        self._over, cancelled = True, None
        for task, tools in self._open.items():
            if tools is not None:
                tools.gate.cancel()
            else:
                task.cancel()  # it is still opening: nothing is in flight
        while self._open:
            self._idle = asyncio.Event()
            try:
                await self._idle.wait()
            except asyncio.CancelledError as error:
                cancelled = error
                if not is_engines(error):
                    self.hurry()
        self.release()
        if cancelled is not None:
            raise cancelled

    def end_plainly(self) -> None:
        """Give up the claims, at the end of plain code; what is still open gives them up itself."""
        self._over = True
        if not self._open:
            self.release()

    def hurry(self) -> None:
        """Wait no longer for the items in flight."""
        for tools in self._tools():
            tools.gate.close(_OVER)
            tools.gate.hurry()

    def _tools(self) -> list[RunTools]:
        return [tools for tools in self._open.values() if tools is not None]

    # -- what others see of it -----------------------------------------------------------

    @property
    def ending(self) -> bool:
        """Say whether it will be over soon without being asked."""
        cancelling = self._reading and self._reader is not None and self._reader.cancelling() > 0
        cancelled = any(tools.gate.cancelled for tools in self._tools())
        return self._over or cancelling or cancelled or self._abandoned or self._orphaned()

    @property
    def gone(self) -> bool:
        """Say whether it cannot end any more: its loop or thread is dead, or nobody reads it."""
        if self._loop is None:
            return not self._thread.is_alive()
        return self._loop.is_closed() or (self._abandoned and not self._open)

    @property
    def _abandoned(self) -> bool:
        """Say whether the task that read its stream has ended without reading it to its end.

        Servers read each part in a task of its own; then the stream itself is closed.
        """
        reader = self._reader
        return (
            not self._reading
            and reader is not None
            and reader.done()
            and self._pulls >= _PULLS
            and not self._over
        )

    def _orphaned(self) -> bool:
        """Say whether a graph around this one has ended, or the task of one of them has.

        A task that LangGraph cancels twice, as it does where a sibling fails, can leave behind
        the tasks that it has started.
        """
        return any(future is None or future.done() for future in self._above())

    def _above(self) -> Iterator[Any]:
        """Yield the future of each graph around this one that has one; None for what has ended.

        A graph that runs a single node needs no future for it.
        """
        config: Mapping[str, Any] | None = self._around
        while config is not None and (call := _call_of(config)) is not None:
            node, futures = call.args[0](), call.keywords["futures"]()
            if node is None or futures is None:
                yield None
                return
            yield from [future for future, of in list(futures.items()) if of is node]
            config = call.keywords["schedule_task"].__self__.config

    def _unwinding(self) -> bool:
        """Say whether LangGraph's plain loop around a node is being left by an exception.

        It then waits for the threads of its nodes, which nothing tells of it: neither a failing
        sibling, nor a step's timeout, nor Ctrl-C. So the frames are looked at.
        """
        runtime = self._runtime
        if runtime is None or runtime.execution_info is None:
            return False
        place = tuple(runtime.execution_info.checkpoint_ns.split("|"))
        for top in sys._current_frames().values():  # noqa: SLF001 - documented, if named so
            frame: FrameType | None = top
            while frame is not None:
                if frame.f_code.co_qualname == "SyncPregelLoop.__exit__":
                    values = frame.f_locals
                    around = values["self"]
                    if (
                        values["exc_type"] is not None
                        and around.control is runtime.control
                        and place[: len(around.checkpoint_ns)] == around.checkpoint_ns
                    ):
                        return True
                frame = frame.f_back
        return False

    # -- its claims ----------------------------------------------------------------------

    def claimed(self, key: Hashable, release: Callable[[], None]) -> None:
        """Note what is claimed, and how that is given up."""
        self._claims[key] = release

    def release(self) -> None:
        """Give up all claims."""
        while self._claims:
            self._claims.popitem()[1]()


def _call_of(config: Mapping[str, Any]) -> partial[Any] | None:
    """Return what LangGraph gives the node of a configuration to call tasks by, or None.

    It knows the node, the futures of the nodes that run at the same time, and the graph's loop.
    """
    call = config.get("configurable", {}).get("__pregel_call")
    known = isinstance(call, partial) and {"futures", "schedule_task"} <= call.keywords.keys()
    return call if known and call.args else None


def is_engines(error: asyncio.CancelledError) -> bool:
    """Say whether LangGraph has cancelled a task, by the mark that it leaves."""
    return any(type(argument) is object for argument in error.args)


def is_forced(error: asyncio.CancelledError) -> bool:
    """Say whether a graph was cancelled again while it was waiting for its nodes to end.

    LangGraph then hands out the task that waits for them.
    """
    handed_out = any(isinstance(argument, asyncio.Task) for argument in error.args)
    return handed_out and not is_engines(error)


class Claims:
    """Which invocation of this process works on what: run folders, and threads of savers.

    Locks on files tell processes apart, where the file system has them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = dict[Hashable, Invocation]()

    async def take_run(self, run: RunFolder, who: Invocation) -> None:
        """Claim a run for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation, or another process, works on it.
            LedgerError: The folder cannot be written.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while (taken := self._try(key, who)) is None:
            self._check_ending(key, busy(run.path))
            await asyncio.sleep(_LOOK_S)
        if not taken:
            return
        lock = run.locked()
        locking = asyncio.ensure_future(asyncio.to_thread(lock.__enter__))
        try:
            await asyncio.shield(locking)
        except BaseException:
            await asyncio.wait({locking})
            if not locking.cancelled() and locking.exception() is None:
                lock.__exit__(None, None, None)
            self._drop(key, who)
            raise
        who.claimed(key, lambda: self._unlock(key, who, lock))

    async def wait_run(self, run: RunFolder, who: Invocation) -> None:
        """Wait while another invocation of a run is ending.

        Raises:
            ConfigurationError: One works on it.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while self._other(key, who) is not None:
            self._check_ending(key, busy(run.path))
            await asyncio.sleep(_LOOK_S)

    async def take_thread(self, key: Hashable, name: str, who: Invocation) -> None:
        """Claim a saver's thread for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation works on it.
        """
        while self._try(key, who) is None:
            self._check_ending(key, busy(name))
            await asyncio.sleep(_LOOK_S)
        who.claimed(key, lambda: self._drop(key, who))

    def take_thread_plainly(self, key: Hashable, name: str, who: Invocation) -> None:
        """Do the same in plain code; blocks."""
        while self._try(key, who) is None:
            self._check_ending(key, busy(name))
            time.sleep(_LOOK_S)
        who.claimed(key, lambda: self._drop(key, who))

    def _try(self, key: Hashable, who: Invocation) -> bool | None:
        """Claim something; return whether it was free, None if it is another's."""
        with self._lock:
            holder = self._holders.get(key)
            if holder is who:
                return False
            if holder is not None and not holder.gone:
                return None
        if holder is not None:
            holder.release()
        with self._lock:
            return self._holders.setdefault(key, who) is who or None

    def _other(self, key: Hashable, who: Invocation) -> Invocation | None:
        with self._lock:
            holder = self._holders.get(key)
        return None if holder is who or holder is None or holder.gone else holder

    def _check_ending(self, key: Hashable, message: str) -> None:
        with self._lock:
            holder = self._holders.get(key)
        if holder is not None and not (holder.ending or holder.gone):
            raise ConfigurationError(message)

    def _drop(self, key: Hashable, who: Invocation) -> None:
        with self._lock:
            if self._holders.get(key) is who:
                del self._holders[key]

    def _unlock(self, key: Hashable, who: Invocation, lock: AbstractContextManager[None]) -> None:
        lock.__exit__(None, None, None)
        self._drop(key, who)


@lru_cache(maxsize=1)
def claims() -> Claims:
    """Return this process's claims."""
    return Claims()


async def follow(
    parts: AsyncIterator[Any], config: RunnableConfig | None, thread: tuple[Hashable, str] | None
) -> AsyncIterator[Any]:
    """Yield a graph's stream as an invocation, of which nothing is left open at its end.

    Args:
        parts: LangGraph's stream.
        config: What the graph was called with.
        thread: The saver's thread that it works on, and the thread's name.

    Raises:
        ConfigurationError: Another invocation works on the thread.
    """
    invocation = Invocation(config)
    try:
        if thread is not None:
            await claims().take_thread(*thread, invocation)
        while True:
            with invocation.reading():
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part
    except asyncio.CancelledError as error:
        if is_forced(error):
            invocation.hurry()
        raise
    finally:
        try:
            await parts.aclose()  # type: ignore[attr-defined]  # it is a generator
        finally:
            await invocation.end()


def follow_plainly(
    parts: Iterator[Any], config: RunnableConfig | None, thread: tuple[Hashable, str] | None
) -> Iterator[Any]:
    """Do what :func:`follow` does in plain code."""
    invocation = Invocation(config)
    try:
        if thread is not None:
            claims().take_thread_plainly(*thread, invocation)
        while True:
            with invocation.reading():
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part
    finally:
        try:
            parts.close()  # type: ignore[attr-defined]  # it is a generator
        finally:
            invocation.end_plainly()
