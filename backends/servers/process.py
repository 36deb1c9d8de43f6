"""One server's process: never forgotten, heard through its log, ended with all it started."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from asyncio.subprocess import PIPE, STDOUT, Process
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..core.errors import SiteError
from .guard import Guard
from .plan import ServerPlan
from .watchdog import alive

_GATE: Final = 'trap "" USR1 USR2; read -r _ && exec "$@" </dev/null'
"""Waits for a line before it becomes the server: if this process is killed before the watcher
knows of the server, there is none. Signals that ask a run to drain are not for servers."""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TAIL_BYTES: Final = 16_384
_TAIL_LINES: Final = 20
_TICK_S: Final = 0.1
_KILLED_S: Final = 10.0
_FIRST: Final = asyncio.FIRST_COMPLETED


class ServerProcess:
    """A server that runs.

    Args:
        process: Its process, the leader of a process group of its own.
        guard: What ends it if this process is killed.
        log: What it says.
        begin: Where in the log this start begins, in bytes.
    """

    def __init__(self, process: Process, guard: Guard, log: Path, begin: int) -> None:
        self._process, self._guard = process, guard
        self._log, self._begin = log, begin
        self.pid = process.pid

    @classmethod
    async def start(cls, plan: ServerPlan, guard: Guard, log: Path) -> ServerProcess:
        """Start a server.

        Raises:
            SiteError: The program is not there, or the log cannot be written.
        """
        environment = os.environ | plan.env
        program = await asyncio.to_thread(
            shutil.which, plan.command[0], path=environment.get("PATH")
        )
        if program is None:
            msg = f"node.serve: there is no program {plan.command[0]!r} on this node's PATH"
            raise SiteError(msg)
        handle, begin = await asyncio.to_thread(_opened, log)
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _GATE, "sh", program, *plan.command[1:]),
                stdin=PIPE,
                stdout=handle,
                stderr=STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise SiteError(f"node.serve: cannot be started: {error.strerror}") from None
        finally:
            os.close(handle)
        await cls._let_go(process, guard)
        return cls(process, guard, log, begin)

    @staticmethod
    async def _let_go(process: Process, guard: Guard) -> None:
        """Let a process become the server, once the watcher knows it."""
        assert process.stdin is not None, "it was opened as a pipe"
        try:
            await guard.add(process.pid)
            with suppress(ConnectionError):  # it was killed; its end tells
                process.stdin.write(b"\n")
                await process.stdin.drain()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        finally:
            process.stdin.close()

    async def ended(self) -> str:
        """Wait for its end, and say how it ended."""
        code = await self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """End it with all that it has started; at once if there is ``hurry``."""
        self._send(signal.SIGTERM)
        gone = asyncio.ensure_future(self._gone())
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            await asyncio.wait({gone, hurried}, timeout=grace_s, return_when=_FIRST)
        finally:
            hurried.cancel()
            self._send(signal.SIGKILL)
            # what it has started may hold ports and memory a moment longer
            await asyncio.wait({gone}, timeout=_KILLED_S)
            gone.cancel()
            await self._guard.drop(self.pid)

    async def _gone(self) -> None:
        """Wait until nobody of its group is left."""
        await self._process.wait()
        while await asyncio.to_thread(alive, self.pid):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(_TICK_S)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def last_lines(self) -> list[str]:
        """Return the last lines that it has said since this start; blocks."""
        try:
            with self._log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._begin, end - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            return [f"(its log {self._log} cannot be read: {error.strerror})"]
        return [_plain(line) for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def _plain(line: str) -> str:
    """Return a line without colours and other control characters."""
    line = _COLOUR.sub("", line)
    return "".join(c if c.isprintable() or c == "\t" else " " for c in line).rstrip()


def _opened(log: Path) -> tuple[int, int]:
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise SiteError(f"{log}: cannot be written: {error.strerror}") from None
    return handle, os.fstat(handle).st_size
