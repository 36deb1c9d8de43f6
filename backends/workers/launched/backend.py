"""Workers started by mpiexec or srun as a backend; launcher process and command."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from ...core.errors import BackendError, ConfigurationError
from ...core.exit_with_parent import launcher_exit_with_parent
from ...core.templates import fill_names, split_command
from ...core.types import Json
from ..executor import WorkShard
from .protocol import TOKEN_ENV, URL_ENV
from .server import WorkerServer

LAUNCHER_ENV: Final = "FANFOLD_LAUNCHER"
"""Variable of a coordinator: the command that starts one program per node; for job scripts."""
PYTHON_ENV: Final = "FANFOLD_PYTHON"
"""Variable of a coordinator: the Python of its workers, where that is not its own."""
HOST_ENV: Final = "FANFOLD_COORDINATOR_HOST"
"""Variable of a coordinator: the name or address by which workers reach it; for job scripts."""
COMMAND_NAMES: Final = ("workers",)
"""What a command may name in braces."""


def launcher_command(
    command: str | None, workers: int, environment: Mapping[str, str]
) -> tuple[str, ...] | None:
    """Return the launcher's words, or None where nobody names one.

    Args:
        command: ``backend.command``.
        workers: How many workers it shall start.
        environment: Variables of the coordinator.

    Raises:
        ConfigurationError: It is no command line.
    """
    text = command or environment.get(LAUNCHER_ENV)
    if not text:
        return None
    try:
        words = split_command(text, COMMAND_NAMES)
    except ConfigurationError as error:
        source = "backend.command" if command else LAUNCHER_ENV
        raise ConfigurationError(f"{source}: {error.message}") from None
    return fill_names(words, {"workers": str(workers)})


def local_launcher_command(workers: int) -> tuple[str, ...]:
    """Return a launcher of processes of this machine."""
    return (sys.executable, "-P", "-m", f"{__package__}.local", str(workers))


def python_command(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return how Python is started where workers run."""
    return (environment.get(PYTHON_ENV) or sys.executable, "-P")


def coordinator_host(host: str | None, environment: Mapping[str, str]) -> str:
    """Return the name or address by which workers reach this machine; loopback by default."""
    return host or environment.get(HOST_ENV) or "127.0.0.1"


_SHOWN_BYTES: Final = 8192
_SHOWN_LINES: Final = 20
_TERM_S: Final = 5.0
_KILL_S: Final = 5.0


class LauncherProcess:
    """A launcher's process, and everything in its process group.

    Args:
        process: The process.
        log: What it and its workers say.
        begin: Where that begins in the log.

    Attributes:
        ended: Done when it has ended, with its exit code.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes], begin: int) -> None:
        self._process, self._log, self._begin = process, log, begin
        self.ended = asyncio.create_task(process.wait())

    @classmethod
    async def start(
        cls, words: Sequence[str], environment: Mapping[str, str], log: Path | None
    ) -> Self:
        """Start it.

        Args:
            words: The command.
            environment: Its variables.
            log: File for what it says, appended to; None keeps it out of sight.

        Raises:
            ConfigurationError: The log cannot be written.
        """
        file = await asyncio.to_thread(_open_log, log)
        try:
            begin = file.seek(0, os.SEEK_END)
            script = launcher_exit_with_parent(os.getpid()) + '\nexec "$@"'
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", script, "launcher", *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=dict(environment),
                process_group=0,  # a terminal's interrupt is the coordinator's to heed
            )
        except BaseException:
            file.close()
            raise
        return cls(process, file, begin)

    def read_last_lines(self) -> str:
        """Return the last lines that it and its workers have said; blocks."""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(self._begin, end - _SHOWN_BYTES)
        text = os.pread(self._log.fileno(), end - begin, begin).decode(errors="replace")
        return "\n".join(text.strip().splitlines()[-_SHOWN_LINES:]) or "it said nothing"

    async def stop(self, grace_s: float) -> None:
        """End it and its group within ``grace_s`` and a little more.

        Args:
            grace_s: Seconds in which it may end by itself, its workers being dismissed.
        """
        await asyncio.wait({self.ended}, timeout=grace_s)
        if not self.ended.done():
            self._tell(signal.SIGTERM)  # mpiexec and srun end their workers on other nodes
            await asyncio.wait({self.ended}, timeout=_TERM_S)
        self._tell(signal.SIGKILL)  # its leash, and what it has left behind
        await asyncio.wait({self.ended}, timeout=_KILL_S)
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)
        self._log.close()

    def _tell(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _open_log(log: Path | None) -> IO[Any]:
    if log is None:
        return tempfile.TemporaryFile()
    try:
        return log.open("ab+")
    except OSError as error:
        raise ConfigurationError(f"{log}: cannot be written: {error.strerror}") from None


logger = logging.getLogger(__name__)

_END_S: Final = 2.0
"""So long may a launcher take to end by itself when its workers have gone."""
_LATE_S: Final = 60.0
"""A launcher that lives has workers on their way: so long is one waited for."""


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How workers are started.

    Attributes:
        command: The launcher's words; the worker's command follows them.
        host: Name or address of this machine by which workers reach it.
        silence_s: Seconds without a sign of life after which a connection counts as ended.
        queue_s: Seconds until the first worker must have come.
        log: File for what launcher and workers say, or None.
    """

    command: Sequence[str]
    host: str
    silence_s: float
    queue_s: float
    log: Path | None = None


class LaunchedBackend:
    """Runs shards on workers that one command starts and that come to a desk in this process.

    A worker that comes late joins by itself; one that goes is lost, with what it had in work. The
    place is broken only when no worker is left, nor on its way: then the command is started again.

    Args:
        launch: How workers are started.
        work: What they run: an importable function, which they name and import themselves.
    """

    def __init__(self, launch: LaunchSettings, work: WorkShard) -> None:
        self.name = f"launched ({launch.command[0].rpartition('/')[2]})"
        self._settings, self._work = launch, f"{work.__module__}:{work.__qualname__}"
        self._server: WorkerServer | None = None
        self._launcher: LauncherProcess | None = None

    def capacity(self) -> int:
        """Return how many workers are there."""
        return 0 if self._server is None else self._server.worker_count

    async def start(self) -> None:
        """Open the desk, start the launcher, and wait for the first worker.

        Raises:
            BackendError: None came; with the last lines that the launcher and its workers said.
            ConfigurationError: None can ever come.
        """
        desk = WorkerServer(self._settings.host, self._settings.silence_s)
        self._server = desk
        await desk.open()
        worker = (*python_command(os.environ), "-m", __package__, self._work)
        words = (*self._settings.command, *worker, f"{self._settings.silence_s:g}")
        environment = os.environ | {URL_ENV: desk.url, TOKEN_ENV: desk.token}
        launcher = await LauncherProcess.start(words, environment, self._settings.log)
        self._launcher = launcher
        try:
            await self._wait_first_worker(desk, launcher)
        except BaseException:
            await self.close(0.0)
            raise

    async def _wait_first_worker(self, desk: WorkerServer, launcher: LauncherProcess) -> None:
        """Wait for the first worker.

        Raises:
            BackendError: None came.
            ConfigurationError: None can ever come.
        """
        wait_s = self._settings.queue_s
        if await self._wait_for_worker(desk, launcher, wait_s):
            return
        said = await asyncio.to_thread(launcher.read_last_lines)
        if launcher.ended.done():
            msg = f"{self.name}: ended with code {launcher.ended.result()} before a worker came"
        else:
            msg = f"{self.name}: no worker came to {desk.url} within {wait_s:g} s"
        raise BackendError(f"{msg}; the last that was said:\n{said}")

    @staticmethod
    async def _wait_for_worker(
        desk: WorkerServer, launcher: LauncherProcess, wait_s: float
    ) -> bool:
        """Wait until a worker is there, and say whether one is.

        Raises:
            ConfigurationError: None can be understood.
        """
        came = asyncio.ensure_future(desk.any_worker.wait())
        events: set[asyncio.Future[Any]] = {came, launcher.ended, desk.refusal}
        try:
            await asyncio.wait(events, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            came.cancel()
        if desk.refusal.done():
            raise desk.refusal.result()
        return desk.any_worker.is_set()

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on.

        Raises:
            WorkerLostError: The worker's connection ended.
            BackendError: No worker is there.
            ConfigurationError: Workers cannot load fanfold.
        """
        if self._server is None:
            raise BackendError(f"{self.name}: not started")
        try:
            return await self._server.run_task(order)
        except (BackendError, ConfigurationError) as error:
            raise type(error)(f"{self.name}: {error.message}") from error

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: workers end with their coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Wait for workers that are on their way; else start the launcher again.

        What is left of the workers is ended before, unless all are ready: those have come since
        the place broke.

        Raises:
            BackendError: No worker came.
            ConfigurationError: None can ever come.
        """
        desk, launcher = self._server, self._launcher
        if desk is not None and desk.is_idle:
            return
        if desk is not None and launcher is not None and desk.worker_count == 0:
            await asyncio.wait({launcher.ended}, timeout=_END_S)
            if not launcher.ended.done() and await self._wait_for_worker(desk, launcher, _LATE_S):
                return
            said = await asyncio.to_thread(launcher.read_last_lines)
            logger.warning("%s: no worker is left; the last that was said:\n%s", self.name, said)
        await self.close(0.0)
        await self.start()

    async def stop(self) -> None:
        """Ask the workers to begin no further item."""
        if self._server is not None:
            await self._server.stop()

    async def close(self, grace_s: float = 10.0) -> None:
        """Dismiss the workers and end the launcher within ``grace_s`` and a little more."""
        desk, self._server = self._server, None
        launcher, self._launcher = self._launcher, None
        if desk is not None:
            await desk.close()
        if launcher is not None:
            await launcher.stop(grace_s)
