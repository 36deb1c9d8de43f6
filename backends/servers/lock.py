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

from ..core.errors import BackendError
from .plan import NodeFiles

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PRIVATE: Final = 0o700
_AGAIN_S: Final = 0.1
_TRIES: Final = 5
_BETWEEN_TRIES_S: Final = 0.05


def local_lock_folder() -> Path:
    """Return a folder of this node and user for locks; ``/tmp`` even where TMPDIR is shared.

    Raises:
        BackendError: It cannot be made, or is somebody else's.
    """
    usual = Path("/tmp")  # all processes of the node agree on it
    base = usual if os.access(usual, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = base / f"fanfold-{os.getuid()}"
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BackendError(f"{folder}: cannot be made: {error.strerror}") from None
    if found.st_uid != os.getuid() or folder.is_symlink() or not folder.is_dir():
        raise BackendError(f"{folder}: is no folder of this user's; remove it")
    if found.st_mode & 0o022:
        raise BackendError(
            f"{folder}: others can write this folder; remove it, or chmod 700 {folder}"
        )
    return folder


def _local_lock_path(files: NodeFiles, kind: str) -> Path:
    digest = hashlib.blake2b(f"{files.folder.resolve()}\0{files.host}".encode(), digest_size=12)
    return local_lock_folder() / f"{digest.hexdigest()}.{kind}"


def _open_lock_file(path: Path, mode: int = 0o600) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    except OSError as error:
        raise BackendError(f"{path}: cannot be opened: {error.strerror}") from None


def _flock(handle: int, kind: int) -> bool | None:
    """Try to lock; None where the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise BackendError(f"a lock cannot be taken: {error.strerror}") from None
    return True


@dataclass(frozen=True, slots=True)
class NodeLock:
    """The right to serve a node.

    Attributes:
        handles: Open files that hold it; a process that inherits them holds it as well.
    """

    handles: tuple[int, ...]

    @classmethod
    def try_acquire(cls, files: NodeFiles) -> Self | None:
        """Take it, or return None if another process has it; blocks.

        Raises:
            BackendError: The files cannot be opened.
        """
        near = _open_lock_file(_local_lock_path(files, "lock"))
        if not _flock(near, fcntl.LOCK_EX):
            os.close(near)
            return None
        try:
            far = _open_lock_file(files.lock, 0o666)
        except BackendError:
            os.close(near)
            raise
        if _flock(far, fcntl.LOCK_EX) is False:
            os.close(near)
            os.close(far)
            return None
        lock = cls((near, far))
        lock.write_owner()
        return lock

    def write_owner(self) -> None:
        """Let others know that this process has it."""
        far = self.handles[-1]
        os.ftruncate(far, 0)
        os.pwrite(far, f"{os.uname().nodename} pid {os.getpid()}\n".encode(), 0)

    @classmethod
    def acquire_with_retries(cls, files: NodeFiles) -> Self | None:
        """Take it, trying more than once: whoever only looks holds it for a moment; blocks.

        Raises:
            BackendError: The files cannot be opened.
        """
        for _ in range(_TRIES):
            lock = cls.try_acquire(files)
            if lock is not None:
                return lock
            time.sleep(_BETWEEN_TRIES_S)
        return None

    def release(self) -> None:
        """Give it up."""
        for handle in self.handles:
            os.close(handle)


def is_served(files: NodeFiles) -> bool:
    """Say whether a process serves the node; blocks.

    Raises:
        BackendError: The files cannot be opened.
    """
    for path, mode in ((_local_lock_path(files, "lock"), 0o600), (files.lock, 0o666)):
        handle = _open_lock_file(path, mode)
        try:
            if _flock(handle, fcntl.LOCK_SH) is False:
                return True
        finally:
            os.close(handle)
    return False


def read_owner(files: NodeFiles) -> str:
    """Return who serves the node, as far as it has said so."""
    try:
        return files.lock.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


@asynccontextmanager
async def hold_user_lock(files: NodeFiles) -> AsyncIterator[None]:
    """Count as a user of the node's servers while the block runs.

    Waits while whoever serves is about to end for want of users.

    Raises:
        BackendError: The file cannot be opened.
    """
    handle = await asyncio.to_thread(lambda: _open_lock_file(_local_lock_path(files, "users")))
    try:
        while not _flock(handle, fcntl.LOCK_SH):  # noqa: ASYNC110 - nothing tells of a lock
            await asyncio.sleep(_AGAIN_S)
        yield
    finally:
        os.close(handle)


def is_on_demand(files: NodeFiles) -> bool:
    """Say whether a process serves the node for as long as somebody uses it; blocks.

    Raises:
        BackendError: The file cannot be opened.
    """
    handle = _open_lock_file(_local_lock_path(files, "lingers"))
    try:
        return _flock(handle, fcntl.LOCK_SH) is False
    finally:
        os.close(handle)


def request_stop_when_unused(files: NodeFiles) -> None:
    """Ask whoever serves the node for its users to end with the last of them; blocks.

    Raises:
        BackendError: The file cannot be opened.
    """
    os.close(_open_lock_file(_local_lock_path(files, "over")))


class NodeUsers:
    """Whether anybody uses the node's servers; for the process that serves.

    Args:
        files: The node's files.

    Raises:
        BackendError: A file cannot be opened.
    """

    def __init__(self, files: NodeFiles) -> None:
        self._over = _local_lock_path(files, "over")
        self._over.unlink(missing_ok=True)  # it was for whoever served before
        self._handle, self._own = (
            _open_lock_file(_local_lock_path(files, "users")),
            _open_lock_file(_local_lock_path(files, "lingers")),
        )
        while _flock(self._own, fcntl.LOCK_EX) is False:
            time.sleep(_BETWEEN_TRIES_S)  # somebody looks

    def is_stop_requested(self) -> bool:
        """Say whether the servers shall end with their last user."""
        return self._over.exists()

    def has_users(self) -> bool:
        """Say whether there are users."""
        if not self.try_block_users():
            return True
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        return False

    def try_block_users(self) -> bool:
        """Let no user in any more, unless there are some; say whether there were none."""
        return _flock(self._handle, fcntl.LOCK_EX) is True

    def close(self) -> None:
        """Let users in again: there is nothing left that they could use by mistake."""
        os.close(self._handle)
        os.close(self._own)


_WATCHDOG: Final = Path(__file__).with_name("watchdog.py")


class WatchdogClient:
    """Tells the watcher which process groups are to end with this process.

    Args:
        files: The node's files.
        lock: The lock on the node, which the watcher shares.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, files: NodeFiles, lock: NodeLock, grace_s: float) -> None:
        self._files, self._lock, self._grace_s = files, lock, grace_s
        self._groups = set[int]()
        self._process: Process | None = None

    async def add(self, group: int) -> None:
        """Have a group ended if this process is killed; it holds as soon as this returns."""
        self._groups.add(group)
        await self._send_or_restart(f"+{group}\n")

    async def remove(self, group: int) -> None:
        """Forget a group that has ended."""
        self._groups.discard(group)
        await self._send_or_restart(f"-{group}\n")

    async def _send_or_restart(self, line: str) -> None:
        try:
            await self._send(line)
        except ConnectionError:
            await self.start()  # it was killed; the new one is told of all

    async def _send(self, line: str) -> None:
        if self._process is None or self._process.returncode is not None:
            raise ConnectionError
        assert self._process.stdin is not None, "it was opened as a pipe"
        self._process.stdin.write(line.encode())
        await self._process.stdin.drain()

    async def ensure_running(self) -> None:
        """Start the watcher anew if it was killed."""
        if self._process is not None and self._process.returncode is not None:
            await self.start()

    async def start(self) -> None:
        """Start the watcher, and tell it of all groups.

        Raises:
            BackendError: It cannot be started.
        """
        await self.stop()
        files = (str(self._files.endpoints), str(self._files.event_log), self._files.host)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_WATCHDOG), *files, str(self._grace_s)),
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=DEVNULL,
                pass_fds=self._lock.handles,
                start_new_session=True,
            )
            await self._send("".join(f"+{group}\n" for group in sorted(self._groups)))
        except OSError as error:
            raise BackendError(f"the servers' watcher cannot be started: {error}") from error

    async def stop(self) -> None:
        """Let the watcher end; it ends what it was told of and that was not dropped."""
        if self._process is not None:
            assert self._process.stdin is not None, "it was opened as a pipe"
            self._process.stdin.close()
            await self._process.wait()
            self._process = None


@asynccontextmanager
async def run_watchdog(
    files: NodeFiles, lock: NodeLock, grace_s: float
) -> AsyncIterator[WatchdogClient]:
    """Have a watcher beside this process while the block runs."""
    guard = WatchdogClient(files, lock, grace_s)
    await guard.start()
    try:
        yield guard
    finally:
        await guard.stop()
