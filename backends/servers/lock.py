"""Lock a node for the process that serves it and for its users; run the watchdog."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import orjson
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_fixed

from ..core.errors import BackendError
from .plan import NodeFiles

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PRIVATE: Final = 0o700
_RETRY_S: Final = 0.1
_TRIES: Final = 5
_BETWEEN_TRIES_S: Final = 0.05


def local_lock_folder() -> Path:
    """Return a folder of this node and user for locks; in ``/tmp`` even if TMPDIR is shared.

    Raises:
        BackendError: It cannot be created, or belongs to another user.
    """
    usual = Path("/tmp")  # the same for all processes of the node
    base = usual if os.access(usual, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = base / f"fanfold-{os.getuid()}"
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BackendError(f"{folder}: cannot be made: {error.strerror}") from None
    if found.st_uid != os.getuid() or folder.is_symlink() or not folder.is_dir():
        raise BackendError(f"{folder}: is not a folder of this user; remove it")
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
    """Try to lock; None if the file system has no locks."""
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
    """The exclusive lock to serve a node.

    Attributes:
        handles: Open files that hold it; a process that inherits them holds it as well.
    """

    handles: tuple[int, ...]

    @classmethod
    def try_acquire(cls, files: NodeFiles) -> Self | None:
        """Acquire the lock, or return None if another process has it; blocks.

        Raises:
            BackendError: The files cannot be opened.
        """
        local = _open_lock_file(_local_lock_path(files, "lock"))
        if not _flock(local, fcntl.LOCK_EX):
            os.close(local)
            return None
        try:
            shared = _open_lock_file(files.lock, 0o666)
        except BackendError:
            os.close(local)
            raise
        if _flock(shared, fcntl.LOCK_EX) is False:
            os.close(local)
            os.close(shared)
            return None
        lock = cls((local, shared))
        lock.write_owner()
        return lock

    def write_owner(self) -> None:
        """Write this process into the lock file, for messages of others."""
        shared = self.handles[-1]
        os.ftruncate(shared, 0)
        os.pwrite(shared, f"{os.uname().nodename} pid {os.getpid()}\n".encode(), 0)

    @classmethod
    def acquire_with_retries(cls, files: NodeFiles) -> Self | None:
        """Acquire the lock with retries, as checks by others hold it for a moment; blocks.

        Raises:
            BackendError: The files cannot be opened.
        """
        retrying = Retrying(
            retry=retry_if_result(lambda lock: lock is None),
            stop=stop_after_attempt(_TRIES),
            wait=wait_fixed(_BETWEEN_TRIES_S),
            retry_error_callback=lambda _: None,
        )
        lock: Self | None = retrying(cls.try_acquire, files)
        return lock

    def release(self) -> None:
        """Release the lock."""
        for handle in self.handles:
            os.close(handle)


def is_served(files: NodeFiles) -> bool:
    """Return True if a process serves the node; blocks.

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
    """Return the process that serves the node, if it is known."""
    try:
        return files.lock.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


@asynccontextmanager
async def hold_user_lock(files: NodeFiles) -> AsyncIterator[None]:
    """Count as a user of the node's servers while the block runs.

    Waits while the process that serves is about to end because it has no users.

    Raises:
        BackendError: The file cannot be opened.
    """
    handle = await asyncio.to_thread(lambda: _open_lock_file(_local_lock_path(files, "users")))
    try:
        while not _flock(handle, fcntl.LOCK_SH):  # noqa: ASYNC110 - a lock has no event
            await asyncio.sleep(_RETRY_S)
        yield
    finally:
        os.close(handle)


def is_on_demand(files: NodeFiles) -> bool:
    """Return True if a process serves the node only while it has users; blocks.

    Raises:
        BackendError: The file cannot be opened.
    """
    handle = _open_lock_file(_local_lock_path(files, "lingers"))
    try:
        return _flock(handle, fcntl.LOCK_SH) is False
    finally:
        os.close(handle)


def request_stop_when_unused(files: NodeFiles) -> None:
    """Ask the process that serves the node on demand to end with its last user; blocks.

    Raises:
        BackendError: The file cannot be opened.
    """
    os.close(_open_lock_file(_local_lock_path(files, "over")))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the process that serves a node has said about itself.

    Attributes:
        name: The model, or empty if it is not known.
        on_demand: Whether it serves the node only while it has users.
        servers: Digest of its servers; equal ones serve the same under all names.
    """

    name: str
    on_demand: bool
    servers: str = ""


def write_served_model(files: NodeFiles, served: ServedModel) -> None:
    """Say what the servers of this node serve, as the holder of its lock; blocks.

    Raises:
        BackendError: The file cannot be written.
    """
    path = _local_lock_path(files, "model")
    temporary = path.with_suffix(".model.tmp")
    try:
        temporary.write_bytes(orjson.dumps(asdict(served)))
        temporary.replace(path)
    except OSError as error:
        raise BackendError(f"{path}: cannot be written: {error.strerror}") from None


def read_served_model(files: NodeFiles) -> ServedModel | None:
    """Return what the process that serves the node serves, if it is known; blocks."""
    try:
        return ServedModel(**orjson.loads(_local_lock_path(files, "model").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


class NodeUsers:
    """Track the users of the node's servers, in the process that serves.

    Args:
        files: The node's files.

    Raises:
        BackendError: A file cannot be opened.
    """

    def __init__(self, files: NodeFiles) -> None:
        self._stop_request = _local_lock_path(files, "over")
        self._stop_request.unlink(missing_ok=True)  # a request to an earlier process
        self._handle, self._on_demand = (
            _open_lock_file(_local_lock_path(files, "users")),
            _open_lock_file(_local_lock_path(files, "lingers")),
        )
        while _flock(self._on_demand, fcntl.LOCK_EX) is False:
            time.sleep(_BETWEEN_TRIES_S)  # another process checks it

    def is_stop_requested(self) -> bool:
        """Return True if the servers are to end with their last user."""
        return self._stop_request.exists()

    def has_users(self) -> bool:
        """Return True if there are users."""
        if not self.try_block_users():
            return True
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        return False

    def try_block_users(self) -> bool:
        """Block new users unless there are some; return True if there were none."""
        return _flock(self._handle, fcntl.LOCK_EX) is True

    def close(self) -> None:
        """Unblock users: no server is left that they could use by mistake."""
        os.close(self._handle)
        os.close(self._on_demand)


_WATCHDOG: Final = Path(__file__).with_name("watchdog.py")


class WatchdogClient:
    """Register the process groups that the watchdog ends with this process.

    Args:
        files: The node's files.
        lock: The lock on the node, which the watchdog shares.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, files: NodeFiles, lock: NodeLock, grace_s: float) -> None:
        self._files, self._lock, self._grace_s = files, lock, grace_s
        self._groups = set[int]()
        self._process: Process | None = None

    async def add(self, group: int) -> None:
        """Register a group, which is ended if this process is killed from now on."""
        self._groups.add(group)
        await self._send_or_restart(f"+{group}\n")

    async def remove(self, group: int) -> None:
        """Unregister a group that has ended."""
        self._groups.discard(group)
        await self._send_or_restart(f"-{group}\n")

    async def _send_or_restart(self, line: str) -> None:
        try:
            await self._send(line)
        except ConnectionError:
            await self.start()  # it was killed; the new one gets all groups

    async def _send(self, line: str) -> None:
        if self._process is None or self._process.returncode is not None:
            raise ConnectionError
        assert self._process.stdin is not None, "it was opened as a pipe"
        self._process.stdin.write(line.encode())
        await self._process.stdin.drain()

    async def ensure_running(self) -> None:
        """Restart the watchdog if it was killed."""
        if self._process is not None and self._process.returncode is not None:
            await self.start()

    async def start(self) -> None:
        """Start the watchdog with all groups.

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
            raise BackendError(f"the servers' watchdog cannot be started: {error}") from error

    async def stop(self) -> None:
        """Stop the watchdog; it ends the groups that are still registered."""
        if self._process is not None:
            assert self._process.stdin is not None, "it was opened as a pipe"
            self._process.stdin.close()
            await self._process.wait()
            self._process = None


@asynccontextmanager
async def run_watchdog(
    files: NodeFiles, lock: NodeLock, grace_s: float
) -> AsyncIterator[WatchdogClient]:
    """Run a watchdog beside this process while the block runs."""
    client = WatchdogClient(files, lock, grace_s)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()
