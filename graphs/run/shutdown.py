"""Life_end -> session_deadline()."""

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
from ...configs.models import RunConfig
from ...nodes.shard.gate import Gate
from ..remote.coordinator import STOP_GRACE_S

T = TypeVar("T")

_HURRY: Final = 2

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""Signals of which a second one stops at once."""

WARNING_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals by which schedulers tell that the time is nearly over; they count only as the first."""


class Shutdown:
    """A wish to stop: at first no further item begins, at the second nothing is waited for.

    A third signal breaks off the graph itself, in whatever it is stuck.

    Args:
        console: Where to say what is going on.

    Attributes:
        control: The run's control, by which the graph hears of it.
        reason: Name of the signal that came first, or None.
    """

    def __init__(self, console: Console) -> None:
        self.control = RunControl()
        self.reason: str | None = None
        self._console = console
        self._times = 0
        self._gate: Gate | None = None
        self._work: asyncio.Future[Any] | None = None

    def request_stop(self, name: str) -> None:
        """Heed a signal."""
        self._times += 1
        self.reason = self.reason or name
        self.control.request_drain(self.reason)
        if self._gate is not None and self._times == 1:
            flying = self._gate.in_flight
            self._gate.close(name)
            what = self._gate.unit
            self._say(f"{name}: waiting for {flying:,} {what} in flight; once more stops at once")
        elif self._gate is not None and self._times == _HURRY:
            self._gate.stop_waiting()  # no cancelling: it would break off checkpoints half written
        elif self._work is not None:
            self._work.cancel()

    def request_stop_once(self, name: str) -> None:
        """Heed a wish to stop that counts only if it is the first."""
        if self.reason is None:
            self.request_stop(name)

    @contextmanager
    def stop_at_deadline(self, end: Walltime | None) -> Iterator[None]:
        """Stop in time, while the block runs."""
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
        """Open something, unless a signal comes first.

        Raises:
            RunStoppedError: A signal came.
        """
        self._work = asyncio.ensure_future(work)
        try:
            opened: T = await self._work
        except asyncio.CancelledError:
            if self.reason is None:
                raise
            msg = f"{self.reason} before the first item; nothing was asked, the run can be resumed"
            raise RunStoppedError(msg) from None
        finally:
            self._work = None
        return opened

    @contextmanager
    def watch_work(self, gate: Gate, work: asyncio.Future[Any]) -> Iterator[None]:
        """Say what signals act on while the block runs."""
        self._gate, self._work = gate, work
        if self.reason is not None:
            gate.close(self.reason)
        try:
            yield
        finally:
            self._work = None

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


@contextmanager
def handle_signals(console: Console) -> Iterator[Shutdown]:
    """Take signals for the block as a wish to stop; for the main thread's loop."""
    loop, stop = asyncio.get_running_loop(), Shutdown(console)
    handled: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = []
    for number in (*STOP_SIGNALS, *WARNING_SIGNALS):
        handled.append((number, signal.getsignal(number)))
        heed = stop.request_stop if number in STOP_SIGNALS else stop.request_stop_once
        loop.add_signal_handler(number, heed, number.name)
    try:
        yield stop
    finally:
        for number, handler in handled:
            loop.remove_signal_handler(number)
            # a warning that comes while the run ends must not break that off
            late = number in WARNING_SIGNALS and callable(handler)
            signal.signal(number, signal.SIG_IGN if late else handler)


def session_deadline(config: RunConfig, began: float) -> Walltime | None:
    """Return when a life of a run must end, or None when nothing bounds it.

    Args:
        config: The settings.
        began: When the life began, in seconds since 1970.

    Raises:
        ConfigurationError: What the environment says of the end is no time.
    """
    extra_s = STOP_GRACE_S if config.backend.is_remote else 0.0
    return walltime(config.limits, os.environ, began, extra_s)


@contextmanager
def close_at_deadline(gate: Gate, end: Walltime | None) -> Iterator[None]:
    """Close a gate in time, while the block runs."""
    if end is None:
        yield
        return
    timer = asyncio.get_running_loop().call_later(end.remaining_s(), gate.close, end.reason)
    try:
        yield
    finally:
        timer.cancel()


async def with_deadline(work: Awaitable[T], end: Walltime | None) -> T:
    """Do something that comes before the first item, unless there is no time left for it.

    Raises:
        RunStoppedError: There is none.
    """
    try:
        async with asyncio.timeout(None if end is None else end.remaining_s()) as timer:
            return await work
    except TimeoutError:
        if end is None or not timer.expired():
            raise
        msg = f"{end.reason}; nothing was asked, the same command goes on in a job with more time"
        raise RunStoppedError(msg) from None
