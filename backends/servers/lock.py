"""Who serves a node and who uses it; the guard that shares the lock with the watchdog."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from ..core.errors import SiteError
from .plan import Files

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PRIVATE: Final = 0o700
_AGAIN_S: Final = 0.1
_TRIES: Final = 5
_BETWEEN_TRIES_S: Final = 0.05


def node_folder() -> Path:
    """Return a folder of this node and user for locks; ``/tmp`` even where TMPDIR is shared.

    Raises:
        SiteError: It cannot be made, or is somebody else's.
    """
    usual = Path("/tmp")  # all processes of the node agree on it
    base = usual if os.access(usual, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = base / f"fanfold-{os.getuid()}"
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SiteError(f"{folder}: cannot be made: {error.strerror}") from None
    if found.st_uid != os.getuid() or folder.is_symlink() or not folder.is_dir():
        raise SiteError(f"{folder}: is no folder of this user's; remove it")
    if found.st_mode & 0o022:
        raise SiteError(f"{folder}: others can write this folder; remove it, or chmod 700 {folder}")
    return folder


def _near(files: Files, kind: str) -> Path:
    digest = hashlib.blake2b(f"{files.folder.resolve()}\0{files.host}".encode(), digest_size=12)
    return node_folder() / f"{digest.hexdigest()}.{kind}"


def _opened(path: Path, mode: int = 0o600) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    except OSError as error:
        raise SiteError(f"{path}: cannot be opened: {error.strerror}") from None


def _flock(handle: int, kind: int) -> bool | None:
    """Try to lock; None where the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise SiteError(f"a lock cannot be taken: {error.strerror}") from None
    return True


@dataclass(frozen=True, slots=True)
class HostLock:
    """The right to serve a node.

    Attributes:
        handles: Open files that hold it; a process that inherits them holds it as well.
    """

    handles: tuple[int, ...]

    @classmethod
    def take(cls, files: Files) -> Self | None:
        """Take it, or return None if another process has it; blocks.

        Raises:
            SiteError: The files cannot be opened.
        """
        near = _opened(_near(files, "lock"))
        if not _flock(near, fcntl.LOCK_EX):
            os.close(near)
            return None
        try:
            far = _opened(files.lock, 0o666)
        except SiteError:
            os.close(near)
            raise
        if _flock(far, fcntl.LOCK_EX) is False:
            os.close(near)
            os.close(far)
            return None
        lock = cls((near, far))
        lock.sign()
        return lock

    def sign(self) -> None:
        """Let others know that this process has it."""
        far = self.handles[-1]
        os.ftruncate(far, 0)
        os.pwrite(far, f"{os.uname().nodename} pid {os.getpid()}\n".encode(), 0)

    @classmethod
    def patiently(cls, files: Files) -> Self | None:
        """Take it, trying more than once: whoever only looks holds it for a moment; blocks.

        Raises:
            SiteError: The files cannot be opened.
        """
        for _ in range(_TRIES):
            lock = cls.take(files)
            if lock is not None:
                return lock
            time.sleep(_BETWEEN_TRIES_S)
        return None

    def give_back(self) -> None:
        """Give it up."""
        for handle in self.handles:
            os.close(handle)


def is_served(files: Files) -> bool:
    """Say whether a process serves the node; blocks.

    Raises:
        SiteError: The files cannot be opened.
    """
    for path, mode in ((_near(files, "lock"), 0o600), (files.lock, 0o666)):
        handle = _opened(path, mode)
        try:
            if _flock(handle, fcntl.LOCK_SH) is False:
                return True
        finally:
            os.close(handle)
    return False


def holder(files: Files) -> str:
    """Return who serves the node, as far as it has said so."""
    try:
        return files.lock.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


@asynccontextmanager
async def using(files: Files) -> AsyncIterator[None]:
    """Count as a user of the node's servers while the block runs.

    Waits while whoever serves is about to end for want of users.

    Raises:
        SiteError: The file cannot be opened.
    """
    handle = await asyncio.to_thread(lambda: _opened(_near(files, "users")))
    try:
        while not _flock(handle, fcntl.LOCK_SH):  # noqa: ASYNC110 - nothing tells of a lock
            await asyncio.sleep(_AGAIN_S)
        yield
    finally:
        os.close(handle)


def lingers(files: Files) -> bool:
    """Say whether a process serves the node for as long as somebody uses it; blocks.

    Raises:
        SiteError: The file cannot be opened.
    """
    handle = _opened(_near(files, "lingers"))
    try:
        return _flock(handle, fcntl.LOCK_SH) is False
    finally:
        os.close(handle)


def linger_not(files: Files) -> None:
    """Ask whoever serves the node for its users to end with the last of them; blocks.

    Raises:
        SiteError: The file cannot be opened.
    """
    os.close(_opened(_near(files, "over")))


class Users:
    """Whether anybody uses the node's servers; for the process that serves.

    Args:
        files: The node's files.

    Raises:
        SiteError: A file cannot be opened.
    """

    def __init__(self, files: Files) -> None:
        self._over = _near(files, "over")
        self._over.unlink(missing_ok=True)  # it was for whoever served before
        self._handle, self._own = _opened(_near(files, "users")), _opened(_near(files, "lingers"))
        while _flock(self._own, fcntl.LOCK_EX) is False:
            time.sleep(_BETWEEN_TRIES_S)  # somebody looks

    def asked(self) -> bool:
        """Say whether the servers shall end with their last user."""
        return self._over.exists()

    def any(self) -> bool:
        """Say whether there are users."""
        if not self.shut_out():
            return True
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        return False

    def shut_out(self) -> bool:
        """Let no user in any more, unless there are some; say whether there were none."""
        return _flock(self._handle, fcntl.LOCK_EX) is True

    def close(self) -> None:
        """Let users in again: there is nothing left that they could use by mistake."""
        os.close(self._handle)
        os.close(self._own)


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
