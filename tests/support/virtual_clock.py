"""Virtual time: an event loop whose clock jumps to the next timer when nothing is ready."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Any, TypeVar, TypeVarTuple
from unittest import mock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_RESOLUTION_S = 1e-6
_THREAD_WAIT_S = 5.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop in virtual time, which begins at 0.

    Work in threads takes no virtual time: the clock stands while a job of an executor runs.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._jobs = 0
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = _RESOLUTION_S

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    @property
    def waits_for_thread(self) -> bool:
        """Whether a job of an executor runs."""
        return self._jobs > 0

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run a job in a thread, and stop the clock until it has ended."""
        self._jobs += 1
        job = super().run_in_executor(executor, func, *args)
        job.add_done_callback(self._end_job)
        return job

    async def shutdown_default_executor(self, *args: Any) -> None:
        """Wait for the threads of the default executor, with the clock stopped."""
        self._jobs += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._jobs -= 1

    def _end_job(self, _: object) -> None:
        self._jobs -= 1


class _JumpingSelector(selectors.DefaultSelector):
    """Selector that moves the clock forward in place of waiting."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._loop.waits_for_thread:
            return super().select(_THREAD_WAIT_S)
        if timeout is None:
            raise RuntimeError("deadlock in virtual time: nothing is ready and no timer is set")
        self._loop.now += max(0.0, timeout)
        return ready


def run_virtual(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in virtual time; ``time.monotonic`` and ``perf_counter`` show that time.

    Threads that run already, those of other tests' servers for example, keep the real time.

    Args:
        main: Makes the coroutine, inside the loop's time.
    """
    loop, here = VirtualLoop(), threading.get_ident()
    others = {thread.ident for thread in threading.enumerate() if thread.ident != here}

    def show(real: Callable[[], float]) -> Callable[[], float]:
        return lambda: real() if threading.get_ident() in others else loop.now

    with ExitStack() as stack:
        for name in ("monotonic", "perf_counter"):
            stack.enter_context(mock.patch.object(time, name, show(getattr(time, name))))
        runner = stack.enter_context(asyncio.Runner(loop_factory=lambda: loop))
        return runner.run(main())
