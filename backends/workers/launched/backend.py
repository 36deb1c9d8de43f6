"""Run shards on workers that mpiexec or srun starts; the launcher process and command."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Self

from ....configs.backend import BackendConfig
from ...core.aio import wait_first
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
"""Names that a command may use in braces."""


def launcher_command(
    command: str | None, workers: int, environment: Mapping[str, str]
) -> tuple[str, ...] | None:
    """Return the launcher's command, or None if none is set.

    Args:
        command: ``backend.command``.
        workers: Number of workers to start.
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
    """Return the command of a launcher for processes on this machine."""
    return (sys.executable, "-P", "-m", f"{__package__}.local", str(workers))


def python_command(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the command that starts Python where workers run."""
    return (environment.get(PYTHON_ENV) or sys.executable, "-P")


def coordinator_host(host: str | None, environment: Mapping[str, str]) -> str:
    """Return the name or address by which workers reach this machine; loopback by default."""
    return host or environment.get(HOST_ENV) or "127.0.0.1"


_SHOWN_BYTES: Final = 8192
_SHOWN_LINES: Final = 20
_TERM_S: Final = 5.0
_KILL_S: Final = 5.0


class LauncherProcess:
    """A launcher's process, with its process group.

    Args:
        process: The process.
        log: Output of the launcher and its workers.
        begin: Offset in the log where that output begins.

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
        """Start the launcher.

        Args:
            words: The command.
            environment: Its variables.
            log: File to which its output is appended; None discards it at the end.

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
                process_group=0,  # only the coordinator handles a terminal's interrupt
            )
        except BaseException:
            file.close()
            raise
        return cls(process, file, begin)

    def read_last_lines(self) -> str:
        """Return the last output lines of the launcher and its workers; blocks."""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(self._begin, end - _SHOWN_BYTES)
        text = os.pread(self._log.fileno(), end - begin, begin).decode(errors="replace")
        return "\n".join(text.strip().splitlines()[-_SHOWN_LINES:]) or "(no output)"

    async def stop(self, grace_s: float) -> None:
        """End the launcher and its group within ``grace_s`` and a little more.

        Args:
            grace_s: Seconds in which it may exit after its workers were disconnected.
        """
        await asyncio.wait({self.ended}, timeout=grace_s)
        if not self.ended.done():
            self._signal(signal.SIGTERM)  # mpiexec and srun end their workers on other nodes
            await asyncio.wait({self.ended}, timeout=_TERM_S)
        self._signal(signal.SIGKILL)  # whatever is left of its group, exit_with_parent included
        await asyncio.wait({self.ended}, timeout=_KILL_S)
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
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
"""Seconds that a launcher may take to exit after its workers have ended."""
_LATE_S: Final = 60.0
"""Seconds to wait for another worker while the launcher runs."""


class LaunchedBackend:
    """Run shards on workers that one command starts and that connect to this process.

    A worker that starts late joins when it connects; one that disconnects is lost, with its task.
    The backend is broken only when no worker is connected and none is starting: then the command is
    started again.

    Args:
        config: The settings.
        work: The function that runs a shard; importable, as workers import it by name.
        log: File for the output of launcher and workers, or None.
    """

    def __init__(self, config: BackendConfig, work: WorkShard, log: Path | None = None) -> None:
        launcher = launcher_command(config.command, config.workers, os.environ)
        self._command = launcher or local_launcher_command(config.workers)
        self.name = f"launched ({self._command[0].rpartition('/')[2]})"
        self._config, self._log = config, log
        self._work = f"{work.__module__}:{work.__qualname__}"
        self._server: WorkerServer | None = None
        self._launcher: LauncherProcess | None = None

    def capacity(self) -> int:
        """Return how many workers are connected."""
        return 0 if self._server is None else self._server.worker_count

    async def start(self) -> None:
        """Start the server and the launcher, and wait for the first worker.

        Raises:
            BackendError: None connected; with the last output lines of the launcher and its
                workers.
            ConfigurationError: None can ever connect.
        """
        host = coordinator_host(self._config.host, os.environ)
        server = WorkerServer(host, self._config.silence_s)
        self._server = server
        await server.open()
        worker = (*python_command(os.environ), "-m", __package__, self._work)
        command = (*self._command, *worker, f"{self._config.silence_s:g}")
        environment = os.environ | {URL_ENV: server.url, TOKEN_ENV: server.token}
        launcher = await LauncherProcess.start(command, environment, self._log)
        self._launcher = launcher
        try:
            await self._wait_first_worker(server, launcher)
        except BaseException:
            await self.close(0.0)
            raise

    async def _wait_first_worker(self, server: WorkerServer, launcher: LauncherProcess) -> None:
        """Wait for the first worker.

        Raises:
            BackendError: None connected.
            ConfigurationError: None can ever connect.
        """
        wait_s = self._config.queue_s
        if await self._wait_for_worker(server, launcher, wait_s):
            return
        output = await asyncio.to_thread(launcher.read_last_lines)
        if launcher.ended.done():
            msg = (
                f"{self.name}: ended with code {launcher.ended.result()} before a worker connected"
            )
        else:
            msg = f"{self.name}: no worker connected to {server.url} within {wait_s:g} s"
        raise BackendError(f"{msg}; last output:\n{output}")

    @staticmethod
    async def _wait_for_worker(
        server: WorkerServer, launcher: LauncherProcess, wait_s: float
    ) -> bool:
        """Wait until a worker is connected, and return whether one is.

        Raises:
            ConfigurationError: A worker runs an incompatible version.
        """
        connected = server.any_worker.wait()
        await wait_first(connected, launcher.ended, server.refusal, timeout_s=wait_s)
        if server.refusal.done():
            raise server.refusal.result()
        return server.any_worker.is_set()

    async def submit(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task.

        Raises:
            WorkerLostError: The worker's connection ended.
            BackendError: No worker is connected.
            ConfigurationError: Workers cannot load fanfold.
        """
        if self._server is None:
            raise BackendError(f"{self.name}: not started")
        try:
            return await self._server.run_task(task)
        except (BackendError, ConfigurationError) as error:
            raise type(error)(f"{self.name}: {error.message}") from error

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: workers end with their coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Wait for workers that are starting; else start the launcher again.

        Remaining workers are ended before, unless all are idle: those have connected since the
        backend broke.

        Raises:
            BackendError: No worker connected.
            ConfigurationError: None can ever connect.
        """
        server, launcher = self._server, self._launcher
        if server is not None and server.is_idle:
            return
        if server is not None and launcher is not None and server.worker_count == 0:
            await asyncio.wait({launcher.ended}, timeout=_END_S)
            if not launcher.ended.done() and await self._wait_for_worker(server, launcher, _LATE_S):
                return
            output = await asyncio.to_thread(launcher.read_last_lines)
            logger.warning("%s: no worker is left; last output:\n%s", self.name, output)
        await self.close(0.0)
        await self.start()

    async def stop(self) -> None:
        """Ask the workers to begin no further item."""
        if self._server is not None:
            await self._server.stop()

    async def close(self, grace_s: float = 10.0) -> None:
        """Disconnect the workers and end the launcher within ``grace_s`` and a little more."""
        server, self._server = self._server, None
        launcher, self._launcher = self._launcher, None
        if server is not None:
            await server.close()
        if launcher is not None:
            await launcher.stop(grace_s)
