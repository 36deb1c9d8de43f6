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
from ..backends.storage.run_folder import RunFolder, make_busy_message
from ..nodes.context import RunTools

_LOOK_S: Final = 0.05
_OVER: Final = "the invocation has ended"
_PULLS: Final = 2
"""A task that took so many parts of a stream in a row is its reader."""

CURRENT_INVOCATION: Final[ContextVar[Invocation | None]] = ContextVar(
    "fanfold_invocation", default=None
)
"""The invocation that a node belongs to."""


class Invocation:
    """A call of the graph, from its start until everything that it opened is closed.

    Args:
        config: What the graph was called with.
        lasting: Whether it keeps its claims until :meth:`end`; else until nothing is open.
    """

    def __init__(self, config: RunnableConfig | None = None, *, keeps_claims: bool = True) -> None:
        self._lasting = keeps_claims
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

    # -- its course ----------------------------------------------------------------------

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Belong to this invocation in the block, in which the next part of its stream is made."""
        before, self._thread = CURRENT_INVOCATION.set(self), threading.current_thread()
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
            CURRENT_INVOCATION.reset(before)

    @contextmanager
    def track_opening(self) -> Iterator[None]:
        """Have the present task open a run, use it and close it in the block.

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
                if self._has_ended or not self._lasting:
                    self.release_claims()

    @contextmanager
    def track_run(self, tools: RunTools) -> Iterator[None]:
        """Have the run that the present task has opened stop when the invocation ends."""
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
        """Look more often than the gate does, in plain code: it costs a loop of its own nothing."""
        while not tools.gate.is_closed:
            await asyncio.sleep(_LOOK_S)
            if self._is_unwinding():
                tools.gate.cancel()

    def _drain(self, _: object = None) -> None:
        for tools in self._open_runs():
            tools.gate.cancel()

    def set_runtime(self, runtime: Runtime[Any]) -> None:
        """Note what a node is run with in plain code, by which LangGraph's end is recognised."""
        self._runtime = runtime

    def stop_reason(self) -> str | None:
        """Say why nothing more shall begin, or None; what nobody announces is found here."""
        if self._has_ended or self._is_abandoned or self._is_orphaned() or self._is_unwinding():
            return _OVER
        return None

    async def end(self) -> None:
        """Drain and close what is open, and give up the claims.

        A cancellation by LangGraph, which cancels more than once, is waited out; any other cuts
        off the items in flight.

        Raises:
            CancelledError: It was cancelled while it waited.
        """
        self._has_ended, cancelled = True, None
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
                if not is_engine_cancel(error):
                    self.stop_waiting()
        self.release_claims()
        if cancelled is not None:
            raise cancelled

    def end_sync(self) -> None:
        """Give up the claims, at the end of plain code; what is still open gives them up itself."""
        self._has_ended = True
        if not self._open:
            self.release_claims()

    def stop_waiting(self) -> None:
        """Wait no longer for the items in flight."""
        for tools in self._open_runs():
            tools.gate.close(_OVER)
            tools.gate.stop_waiting()

    def _open_runs(self) -> list[RunTools]:
        return [tools for tools in self._open.values() if tools is not None]

    # -- what others see of it -----------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        """Say whether it will be over soon without being asked."""
        cancelling = self._reading and self._reader is not None and self._reader.cancelling() > 0
        cancelled = any(tools.gate.is_cancelled for tools in self._open_runs())
        return (
            self._has_ended or cancelling or cancelled or self._is_abandoned or self._is_orphaned()
        )

    @property
    def is_dead(self) -> bool:
        """Say whether it cannot end any more: its loop or thread is dead, or nobody reads it."""
        if self._loop is None:
            return not self._thread.is_alive()
        return self._loop.is_closed() or (self._is_abandoned and not self._open)

    @property
    def _is_abandoned(self) -> bool:
        """Say whether the task that read its stream has ended without reading it to its end.

        Servers read each part in a task of its own; then the stream itself is closed.
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
        """Say whether a graph around this one has ended, or the task of one of them has.

        A task that LangGraph cancels twice, as it does where a sibling fails, can leave behind
        the tasks that it has started.
        """
        return any(future is None or future.done() for future in self._parent_futures())

    def _parent_futures(self) -> Iterator[Any]:
        """Yield the future of each graph around this one that has one; None for what has ended.

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

    def add_claim(self, key: Hashable, release: Callable[[], None]) -> None:
        """Note what is claimed, and how that is given up."""
        self._claims[key] = release

    def release_claims(self) -> None:
        """Give up all claims."""
        while self._claims:
            self._claims.popitem()[1]()


def _pregel_call(config: Mapping[str, Any]) -> partial[Any] | None:
    """Return what LangGraph gives the node of a configuration to call tasks by, or None.

    It knows the node, the futures of the nodes that run at the same time, and the graph's loop.
    """
    call = config.get("configurable", {}).get("__pregel_call")
    known = isinstance(call, partial) and {"futures", "schedule_task"} <= call.keywords.keys()
    return call if known and call.args else None


def is_engine_cancel(error: asyncio.CancelledError) -> bool:
    """Say whether LangGraph has cancelled a task, by the mark that it leaves."""
    return any(type(argument) is object for argument in error.args)


def is_forced_cancel(error: asyncio.CancelledError) -> bool:
    """Say whether a graph was cancelled again while it was waiting for its nodes to end.

    LangGraph then hands out the task that waits for them.
    """
    handed_out = any(isinstance(argument, asyncio.Task) for argument in error.args)
    return handed_out and not is_engine_cancel(error)


class RunClaims:
    """Which invocation of this process works on what: run folders, and threads of savers.

    Locks on files tell processes apart, where the file system has them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = dict[Hashable, Invocation]()

    async def claim_run(self, run: RunFolder, who: Invocation) -> None:
        """Claim a run for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation, or another process, works on it.
            JournalError: The folder cannot be written.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while (taken := self._try_claim(key, who)) is None:
            self._check_ending(key, make_busy_message(run.path))
            await asyncio.sleep(_LOOK_S)
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
            self._release(key, who)
            raise
        who.add_claim(key, lambda: self._unlock(key, who, lock))

    async def wait_for_run(self, run: RunFolder, who: Invocation) -> None:
        """Wait while another invocation of a run is ending.

        Raises:
            ConfigurationError: One works on it.
        """
        found = await asyncio.to_thread(run.path.stat)
        key = found.st_dev, found.st_ino
        while self._other_holder(key, who) is not None:
            self._check_ending(key, make_busy_message(run.path))
            await asyncio.sleep(_LOOK_S)

    async def claim_thread(self, key: Hashable, name: str, who: Invocation) -> None:
        """Claim a saver's thread for an invocation; wait for one that is ending.

        Raises:
            ConfigurationError: Another invocation works on it.
        """
        while self._try_claim(key, who) is None:
            self._check_ending(key, make_busy_message(name))
            await asyncio.sleep(_LOOK_S)
        who.add_claim(key, lambda: self._release(key, who))

    def claim_thread_sync(self, key: Hashable, name: str, who: Invocation) -> None:
        """Do the same in plain code; blocks."""
        while self._try_claim(key, who) is None:
            self._check_ending(key, make_busy_message(name))
            time.sleep(_LOOK_S)
        who.add_claim(key, lambda: self._release(key, who))

    def _try_claim(self, key: Hashable, who: Invocation) -> bool | None:
        """Claim something; return whether it was free, None if it is another's."""
        with self._lock:
            holder = self._holders.get(key)
            if holder is who:
                return False
            if holder is not None and not holder.is_dead:
                return None
        if holder is not None:
            holder.release_claims()
        with self._lock:
            return self._holders.setdefault(key, who) is who or None

    def _other_holder(self, key: Hashable, who: Invocation) -> Invocation | None:
        with self._lock:
            holder = self._holders.get(key)
        return None if holder is who or holder is None or holder.is_dead else holder

    def _check_ending(self, key: Hashable, message: str) -> None:
        with self._lock:
            holder = self._holders.get(key)
        if holder is not None and not (holder.is_ending or holder.is_dead):
            raise ConfigurationError(message)

    def _release(self, key: Hashable, who: Invocation) -> None:
        with self._lock:
            if self._holders.get(key) is who:
                del self._holders[key]

    def _unlock(self, key: Hashable, who: Invocation, lock: AbstractContextManager[None]) -> None:
        lock.__exit__(None, None, None)
        self._release(key, who)


@lru_cache(maxsize=1)
def get_claims() -> RunClaims:
    """Return this process's claims."""
    return RunClaims()


async def follow_stream(
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
    """Do what :func:`follow_stream` does in plain code."""
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
