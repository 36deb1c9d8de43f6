"""An executor that is one process of this machine, for one agent."""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from multiprocessing.connection import Connection
from typing import Any, Final, ParamSpec, TypeVar

from ..core.exit_with_parent import follow_parent

P = ParamSpec("P")
T = TypeVar("T")

_KILLED_S: Final = 5.0


class OneProcess(Executor):
    """Runs one call, in a process of its own that ends with this one.

    The future tells that the call returned, not what; an agent returns nothing. A process that
    dies breaks nothing but its own future.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._future: Future[Any] = Future()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start the process.

        Raises:
            RuntimeError: There was a call before.
        """
        if self._process is not None:
            raise RuntimeError("a process of its own takes one call")
        context = multiprocessing.get_context("spawn")  # this process has threads and a loop
        said, saying = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(saying, fn, args, kwargs), name="agent")
        process.start()
        saying.close()
        atexit.register(process.kill)  # before multiprocessing waits for it there
        self._process = process
        self._future.set_running_or_notify_cancel()
        watching = (process, said, self._future)
        threading.Thread(target=_watch, args=watching, name="agent watch", daemon=True).start()
        return self._future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Kill the process if it still runs; ``cancel_futures`` is of no use here."""
        if self._process is not None and not self._future.done():
            self._process.kill()
            if wait:
                concurrent.futures.wait({self._future}, _KILLED_S)


def _watch(
    process: multiprocessing.process.BaseProcess, said: Connection, future: Future[Any]
) -> None:
    try:
        text = said.recv_bytes().decode()
    except (EOFError, OSError):
        text = ""
    said.close()
    process.join()
    atexit.unregister(process.kill)
    if process.exitcode == 0:
        future.set_result(None)
    else:
        text = text or f"it ended with exit code {process.exitcode}"
        future.set_exception(BrokenExecutor(f"process {process.pid}: {text}"))


def _child(
    saying: Connection, call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    follow_parent()
    try:
        call(*args, **kwargs)
    except Exception as error:
        saying.send_bytes(f"{type(error).__name__}: {error}"[:2000].encode())
        raise SystemExit(1) from error
