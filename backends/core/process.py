"""Temporary folders that do not outlive their owners, and limits on open files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Final

from .errors import BackendError, ConfigurationError

_OWNER: Final = "owner"
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems without locks."""
_YOUNG_S: Final = 60.0
"""A folder younger than this may not be locked yet."""


class TemporaryFolder:
    """A temporary folder that its process locks until it removes the folder or exits.

    Creating one also removes folders of the same kind whose owners exited without removing them.

    Args:
        kind: Its purpose; part of its name.
        parent: Its parent folder; None is the system's temporary folder.

    Attributes:
        path: The folder.

    Raises:
        BackendError: The folder cannot be locked, on a file system that has locks.
    """

    def __init__(self, kind: str, parent: Path | None = None) -> None:
        prefix, parent = f"fanfold-{kind}-", parent or Path(tempfile.gettempdir())
        for folder in parent.glob(f"{prefix}*"):
            _remove_orphan(folder)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock = os.open(self.path / _OWNER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.remove()
                msg = f"{self.path}: lock cannot be taken: {error.strerror}; set another TMPDIR"
                raise BackendError(msg) from error
            # without locks no other process removes it either, even after this one is killed

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_orphan(folder: Path) -> None:
    """Remove a folder whose owner is gone; keep folders of other users and recent ones."""
    with suppress(OSError):
        found = folder.lstat()
        if not S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return  # another user's folder, or a link
        if time.time() - found.st_mtime < _YOUNG_S:
            return
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


_LOG: Final = logging.getLogger(__name__)
_RESERVE: Final = 256
"""For files, pipes, and idle connections."""


def ensure_open_files(
    streams: int, what: str = "requests in flight", setting: str = "limits.streams"
) -> None:
    """Raise this process' soft limit of open files so that ``streams`` connections fit.

    Args:
        streams: Limit of connections.
        what: What needs one connection each, for the message.
        setting: The setting that limits them.

    Raises:
        ConfigurationError: The hard limit is too low.
    """
    wanted, (_, hard) = streams + _RESERVE, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigurationError(
            f"{streams} {what} need {wanted} open files, but this process may have {hard} at "
            f"most (ulimit -Hn): set {setting} to {max(1, hard - _RESERVE)} or less, use more "
            "processes or jobs, or have the hard limit raised"
        )
    raise_file_limit(wanted)


_WANTED: Final = 65_536


def raise_file_limit(wanted: int = _WANTED) -> int:
    """Raise the soft limit on open files, as far as the hard limit allows.

    Args:
        wanted: The desired limit; a higher one is kept.

    Returns:
        The soft limit afterwards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = wanted if hard == unlimited else min(wanted, hard)
    if soft == unlimited or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    _LOG.info("raised the limit of open files from %d to %d", soft, most)
    return most
