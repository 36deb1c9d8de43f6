"""The command that starts workers, for as long as they are wanted and no longer."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Self

from ...core.errors import ConfigurationError
from ...core.exit_with_parent import launcher_leash

_SHOWN_BYTES: Final = 8192
_SHOWN_LINES: Final = 20
_TERM_S: Final = 5.0
_KILL_S: Final = 5.0


class Launcher:
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
        file = await asyncio.to_thread(_opened, log)
        try:
            begin = file.seek(0, os.SEEK_END)
            script = launcher_leash(os.getpid()) + '\nexec "$@"'
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

    def last_lines(self) -> str:
        """Return the last lines that it and its workers have said; blocks."""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(self._begin, end - _SHOWN_BYTES)
        text = os.pread(self._log.fileno(), end - begin, begin).decode(errors="replace")
        return "\n".join(text.strip().splitlines()[-_SHOWN_LINES:]) or "it said nothing"

    async def end(self, grace_s: float) -> None:
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


def _opened(log: Path | None) -> IO[Any]:
    if log is None:
        return tempfile.TemporaryFile()
    try:
        return log.open("ab+")
    except OSError as error:
        raise ConfigurationError(f"{log}: cannot be written: {error.strerror}") from None
