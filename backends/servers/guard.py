"""The serving process's side of its watcher."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ..core.errors import SiteError
from .lock import HostLock
from .plan import Files

_WATCHER: Final = Path(__file__).with_name("watchdog.py")


class Guard:
    """Tells the watcher which process groups are to end with this process.

    Args:
        files: The node's files.
        lock: The lock on the node, which the watcher shares.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, files: Files, lock: HostLock, grace_s: float) -> None:
        self._files, self._lock, self._grace_s = files, lock, grace_s
        self._groups = set[int]()
        self._process: Process | None = None

    async def add(self, group: int) -> None:
        """Have a group ended if this process is killed; it holds as soon as this returns."""
        self._groups.add(group)
        await self._tell(f"+{group}\n")

    async def drop(self, group: int) -> None:
        """Forget a group that has ended."""
        self._groups.discard(group)
        await self._tell(f"-{group}\n")

    async def _tell(self, line: str) -> None:
        try:
            await self._send(line)
        except ConnectionError:
            await self.begin()  # it was killed; the new one is told of all

    async def _send(self, line: str) -> None:
        if self._process is None or self._process.returncode is not None:
            raise ConnectionError
        assert self._process.stdin is not None, "it was opened as a pipe"
        self._process.stdin.write(line.encode())
        await self._process.stdin.drain()

    async def check(self) -> None:
        """Start the watcher anew if it was killed."""
        if self._process is not None and self._process.returncode is not None:
            await self.begin()

    async def begin(self) -> None:
        """Start the watcher, and tell it of all groups.

        Raises:
            SiteError: It cannot be started.
        """
        await self.end()
        files = (str(self._files.endpoints), str(self._files.record), self._files.host)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_WATCHER), *files, str(self._grace_s)),
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=DEVNULL,
                pass_fds=self._lock.handles,
                start_new_session=True,
            )
            await self._send("".join(f"+{group}\n" for group in sorted(self._groups)))
        except OSError as error:
            raise SiteError(f"the servers' watcher cannot be started: {error}") from error

    async def end(self) -> None:
        """Let the watcher end; it ends what it was told of and that was not dropped."""
        if self._process is not None:
            assert self._process.stdin is not None, "it was opened as a pipe"
            self._process.stdin.close()
            await self._process.wait()
            self._process = None


@asynccontextmanager
async def guarded(files: Files, lock: HostLock, grace_s: float) -> AsyncIterator[Guard]:
    """Have a watcher beside this process while the block runs."""
    guard = Guard(files, lock, grace_s)
    await guard.begin()
    try:
        yield guard
    finally:
        await guard.end()
