"""Stop a session: signals, deadlines and draining."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from langgraph.runtime import RunControl
from rich.console import Console

from ...backends.cluster.walltime import Walltime, walltime
from ...backends.core.errors import RunStoppedError
from ...backends.core.terminal import count_nouns
from ...configs.models import RunConfig
from ...nodes.shard.gate import Gate
from ...nodes.shard.progress import ItemTimes
from ..remote.coordinator import STOP_GRACE_S
from .rich_console import print_message

T = TypeVar("T")

_HURRY: Final = 2
_FITTING: Final = 0.5
"""Share of the items that must fit in the time left, so that further ones start."""
_LOOK_S: Final = 1.0
"""Seconds between two looks at whether further items fit."""

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""Signals of which a second one stops without waiting."""

WARNING_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that schedulers send shortly before the end of a job; only the first one counts."""


class Shutdown:
    """Stop requests: the first starts no further item, the second does not wait for items.

    A third signal cancels the graph itself.

    Args:
        console: Console for messages.

    Attributes:
        control: The run's control, which tells the graph to drain.
        reason: Name of the first signal, or None.
    """

    def __init__(self, console: Console) -> None:
        self.control = RunControl()
        self.reason: str | None = None
        self._console = console
        self._times = 0
        self._gate: Gate | None = None
        self._work: asyncio.Future[Any] | None = None

    def request_stop(self, name: str) -> None:
        """Request a stop; each further request is more urgent."""
        self._times += 1
        self.reason = self.reason or name
        self.control.request_drain(self.reason)
        if self._gate is not None and self._times == 1:
            in_flight = self._gate.in_flight
            self._gate.close(name)
            what = f"{count_nouns(in_flight, self._gate.unit)} in flight"
            if self._gate.left is not None:
                what = f"requests that were sent one by one; {self._gate.left}"
            self._say(f"{name}: waiting for {what}; repeat to stop at once")
        elif self._gate is not None and self._times == _HURRY:
            self._gate.stop_waiting()  # do not cancel: that could leave a checkpoint half written
        elif self._work is not None:
            self._work.cancel()

    def request_stop_once(self, name: str) -> None:
        """Request a stop, unless one was requested before."""
        if self.reason is None:
            self.request_stop(name)

    @contextmanager
    def stop_at_deadline(self, end: Walltime | None) -> Iterator[None]:
        """Request a stop at the deadline, while the block runs."""
        if end is None:
            yield
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(end.remaining_s(), self.request_stop_once, end.reason)
        try:
            yield
        finally:
            timer.cancel()

    async def open_unless_stopped(self, work: Awaitable[T]) -> T:
        """Open a resource, unless a stop is requested first.

        Raises:
            RunStoppedError: A stop was requested.
        """
        self._work = asyncio.ensure_future(work)
        try:
            opened: T = await self._work
        except asyncio.CancelledError:
            if self.reason is None:
                raise
            msg = f"{self.reason} before the first item was sent; the run can be resumed"
            raise RunStoppedError(msg) from None
        finally:
            self._work = None
        return opened

    @contextmanager
    def watch_work(self, gate: Gate, work: asyncio.Future[Any]) -> Iterator[None]:
        """Apply stop requests to a gate and a task while the block runs."""
        self._gate, self._work = gate, work
        if self.reason is not None:
            gate.close(self.reason)
        try:
            yield
        finally:
            self._work = None

    def _say(self, text: str) -> None:
        print_message(self._console, text)


@contextmanager
def handle_signals(console: Console) -> Iterator[Shutdown]:
    """Turn signals into stop requests while the block runs; requires the main thread's loop."""
    loop, stop = asyncio.get_running_loop(), Shutdown(console)
    handled: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = []
    for number in (*STOP_SIGNALS, *WARNING_SIGNALS):
        handled.append((number, signal.getsignal(number)))
        handle = stop.request_stop if number in STOP_SIGNALS else stop.request_stop_once
        loop.add_signal_handler(number, handle, number.name)
    try:
        yield stop
    finally:
        for number, handler in handled:
            loop.remove_signal_handler(number)
            # a warning signal during the end of the run must not interrupt it
            is_warning = number in WARNING_SIGNALS and callable(handler)
            signal.signal(number, signal.SIG_IGN if is_warning else handler)


def session_deadline(config: RunConfig, began: float) -> Walltime | None:
    """Return the deadline of a session, or None if it has no limit.

    Args:
        config: The settings.
        began: Start of the session, in seconds since 1970.

    Raises:
        ConfigurationError: An environment variable for the end of the job is not a time.
    """
    extra_s = STOP_GRACE_S if config.backend.is_remote else 0.0
    return walltime(config.limits, os.environ, began, extra_s)


@contextmanager
def close_at_deadline(
    gate: Gate, end: Walltime | None, times: ItemTimes | None = None
) -> Iterator[None]:
    """Close a gate at the deadline, while the block runs.

    It closes earlier if most items would no longer end in time: those that started would be paid
    and lost. Only items of this session show that: otherwise one that is shorter than most items
    would start none.

    Args:
        gate: The gate.
        end: The deadline.
        times: How long items take; None: it closes at the deadline.
    """
    if end is None:
        yield
        return
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def check() -> None:
        nonlocal timer
        left_s = end.remaining_s()
        needed_s = None
        if times is not None and times.is_current:
            needed_s = times.quantile_s(_FITTING)
        if left_s <= 0.0:
            gate.close(end.reason)
        elif needed_s is not None and needed_s > left_s + gate.drain_s:
            lead = f"most items take more than the {left_s + gate.drain_s:.0f} s left for them"
            gate.close(f"{end.reason}; {lead}, so none starts any more", early_s=left_s)
        else:
            timer = loop.call_later(left_s if times is None else min(left_s, _LOOK_S), check)

    check()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


async def with_deadline(work: Awaitable[T], end: Walltime | None) -> T:
    """Await work that precedes the first item, up to the deadline.

    Raises:
        RunStoppedError: The deadline has passed.
    """
    try:
        async with asyncio.timeout(None if end is None else end.remaining_s()) as timer:
            return await work
    except TimeoutError:
        if end is None or not timer.expired():
            raise
        msg = f"{end.reason}; no item was sent: run the same command in a job with more time"
        raise RunStoppedError(msg) from None
