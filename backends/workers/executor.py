"""Run shards on any ``concurrent.futures.Executor``; an executor of one process."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import multiprocessing
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from inspect import signature
from multiprocessing.connection import Connection
from typing import Any, Final, ParamSpec, TypeVar

from ..core.errors import BackendError, ConfigurationError, FanfoldError, WorkerLostError
from ..core.exit_with_parent import exit_with_parent
from ..core.types import Json

P = ParamSpec("P")
T = TypeVar("T")

_KILLED_S: Final = 5.0


class SingleProcessExecutor(Executor):
    """Run one call in a process that ends with this one.

    The future shows that the call returned, but not its value; an agent returns nothing. A process
    that dies fails only its own future.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._future: Future[Any] = Future()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start the process.

        Raises:
            RuntimeError: It was called before.
        """
        if self._process is not None:
            raise RuntimeError("SingleProcessExecutor accepts one call")
        context = multiprocessing.get_context("spawn")  # this process has threads and a loop
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(writer, fn, args, kwargs), name="agent")
        process.start()
        writer.close()
        atexit.register(process.kill)  # before multiprocessing waits for it there
        self._process = process
        self._future.set_running_or_notify_cancel()
        watching = (process, reader, self._future)
        threading.Thread(
            target=_watch_process, args=watching, name="agent watch", daemon=True
        ).start()
        return self._future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Kill the process if it still runs; ``cancel_futures`` has no effect."""
        if self._process is not None and not self._future.done():
            self._process.kill()
            if wait:
                concurrent.futures.wait({self._future}, _KILLED_S)


def _watch_process(
    process: multiprocessing.process.BaseProcess, reader: Connection, future: Future[Any]
) -> None:
    try:
        text = reader.recv_bytes().decode()
    except (EOFError, OSError):
        text = ""
    reader.close()
    process.join()
    atexit.unregister(process.kill)
    if process.exitcode == 0:
        future.set_result(None)
    else:
        text = text or f"it ended with exit code {process.exitcode}"
        future.set_exception(BrokenExecutor(f"process {process.pid}: {text}"))


def _child(
    writer: Connection, call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    exit_with_parent()
    try:
        call(*args, **kwargs)
    except Exception as error:
        writer.send_bytes(f"{type(error).__name__}: {error}"[:2000].encode())
        raise SystemExit(1) from error


def is_parsl_pool(executor: Executor) -> bool:
    """Return True if an executor is a Parsl pool."""
    module = sys.modules.get("parsl.concurrent")
    return module is not None and isinstance(executor, module.ParslPoolExecutor)


def shutdown_parsl_pool(executor: Executor) -> None:
    """Shut down a Parsl pool and the kernel it loaded, with running tasks; blocks."""
    import parsl  # noqa: PLC0415 - an extra

    kernel: Any = getattr(executor, "_dfk", None)
    executor.shutdown(wait=False)
    if kernel is not None and kernel.cleanup_called and _loaded() is kernel:
        parsl.clear()


def _loaded() -> Any:
    import parsl  # noqa: PLC0415 - an extra
    from parsl.errors import NoDataFlowKernelError  # noqa: PLC0415 - an extra

    try:
        return parsl.dfk()
    except NoDataFlowKernelError:
        return None


def is_fatal(error: BaseException | None) -> bool:
    """Return True if an error means that a Parsl pool is dead: it never recovers."""
    if error is None or "parsl.concurrent" not in sys.modules:
        return False
    from parsl.executors.errors import ExecutorError  # noqa: PLC0415 - an extra
    from parsl.jobs.errors import TooManyJobFailuresError  # noqa: PLC0415 - an extra

    return isinstance(error, ExecutorError | TooManyJobFailuresError)


WorkShard = Callable[[dict[str, Json]], dict[str, Json]]
"""An importable function: executors ship it by reference."""


class ExecutorBackend:
    """Run shards on an executor that a factory makes.

    It uses only ``submit``, the future's result and ``shutdown``.

    Args:
        factory: Makes the executor; called in a thread, and again to rebuild.
        work: The function that runs a shard.
        workers: Shards that it can run at a time.
        name: Name in messages.
    """

    def __init__(
        self, factory: Callable[[], Executor], work: WorkShard, workers: int, name: str
    ) -> None:
        self._factory, self._work, self._workers = factory, work, workers
        self._executor: Executor | None = None
        self._broken = False
        self.name = name

    def capacity(self) -> int:
        """Return the number of workers; 0 while it is broken."""
        return 0 if self._executor is None or self._broken else self._workers

    async def start(self) -> None:
        """Make the executor.

        Raises:
            BackendError: It cannot be made.
            ConfigurationError: It can never be made, or the factory returns another type.
        """
        self._executor, self._broken = await make_executor(self._factory, self.name), False

    async def submit(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task.

        Raises:
            WorkerLostError: A worker died; the executor may be broken as well.
            BackendError: The executor accepts no work.
            ConfigurationError: Workers cannot import fanfold.
        """
        executor = self._executor
        if executor is None:
            raise BackendError(f"{self.name}: not started")
        try:
            future = await asyncio.to_thread(executor.submit, self._work, task)
        except RuntimeError as error:  # BrokenExecutor is one, and so is "after shutdown"
            self._mark_broken(executor)
            raise BackendError(f"{self.name}: accepts no work: {error}") from error
        return await self._result(executor, future)

    async def _result(self, executor: Executor, future: Future[dict[str, Json]]) -> dict[str, Json]:
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except BrokenExecutor as error:
            self._mark_broken(executor)
            raise WorkerLostError(f"{self.name}: a worker died: {error}") from error
        except CancelledError as error:  # not asyncio's: the executor was shut down meanwhile
            raise WorkerLostError(f"{self.name}: was shut down") from error
        except (ImportError, AttributeError) as error:
            msg = f"{self.name}: a worker cannot load fanfold: {error}; install it there"
            raise ConfigurationError(msg) from error
        except Exception as error:
            if self.is_fatal(error):
                self._mark_broken(executor)
            msg = f"{self.name}: {type(error).__name__}: {error}"
            raise WorkerLostError(msg) from error

    def is_fatal(self, error: Exception) -> bool:
        """Return True if an error means that the executor is no longer usable."""
        return is_fatal(error)

    def _mark_broken(self, executor: Executor) -> None:
        if executor is self._executor:  # it may have been replaced meanwhile
            self._broken = True

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: an executor ends with its coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Discard the executor, kill its worker processes if known, and make a new one."""
        await self.close(0.0)
        await self.start()

    async def close(self, grace_s: float = 10.0) -> None:
        """Shut the executor down; workers that do not end in time are killed or abandoned."""
        executor, self._executor = self._executor, None
        if executor is not None:
            await self.dispose(executor, grace_s)

    async def dispose(self, executor: Executor, grace_s: float) -> None:
        """Shut one executor down, within ``grace_s`` and a little more."""
        workers = _processes(executor)  # not available after shutdown
        ended = run_in_thread(lambda: self.shutdown(executor))
        if not await _wait_shutdown(ended, grace_s):
            for process in workers:
                process.kill()
            if workers:
                await _wait_shutdown(ended, _KILLED_S)

    def shutdown(self, executor: Executor) -> None:
        """Shut an executor down; blocks as long as the executor does."""
        shutdown_executor(executor)


async def make_executor(factory: Callable[[], Any], name: str) -> Executor:
    """Make an executor, in a thread.

    Args:
        factory: Usually a function of the user's.
        name: Name in messages.

    Raises:
        BackendError: It cannot be made.
        ConfigurationError: It can never be made, or the function returns another type.
    """
    try:
        made = await asyncio.to_thread(factory)
    except FanfoldError:
        raise
    except (ImportError, TypeError) as error:
        msg = f"{name}: cannot be made: {type(error).__name__}: {error}"
        raise ConfigurationError(msg) from error
    except Exception as error:
        raise BackendError(f"{name}: cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, Executor):
        raise ConfigurationError(
            f"{name}: made {type(made).__name__}, not a concurrent.futures.Executor"
        )
    return made


def shutdown_executor(executor: Executor) -> None:
    """Shut an executor down and cancel pending calls; blocks as long as the executor does."""
    if is_parsl_pool(executor):
        shutdown_parsl_pool(executor)
    elif "cancel_futures" in signature(executor.shutdown).parameters:
        executor.shutdown(wait=True, cancel_futures=True)
    else:  # Dask's
        executor.shutdown(wait=True)


def _processes(executor: Executor) -> list[Any]:
    """Return the processes of a process pool; an empty list for other executors."""
    return list((getattr(executor, "_processes", None) or {}).values())


def run_in_thread(call: Callable[[], None]) -> asyncio.Future[None]:
    """Run a blocking call in a daemon thread, which delays neither loop nor process exit."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    # the exception is retrieved, because the caller may have stopped waiting
    ended.add_done_callback(lambda future: future.cancelled() or future.exception())

    def settle(error: Exception | None) -> None:
        if not ended.done():
            ended.set_exception(error) if error else ended.set_result(None)

    def run() -> None:
        error: Exception | None = None
        try:
            call()
        except Exception as raised:  # noqa: BLE001 - raised by the future
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="blocking call", daemon=True).start()
    return ended


async def _wait_shutdown(ended: asyncio.Future[None], seconds: float) -> bool:
    await asyncio.wait({ended}, timeout=seconds)
    if ended.done() and (error := ended.exception()) is not None:
        raise BackendError(f"the executor could not be shut down: {error}") from error
    return ended.done()
