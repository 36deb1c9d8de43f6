"""Which process asks for an answer that several want: it holds a lock that ends with it.

The locks are on single bytes of one file that stays empty, one byte per key. The system lets go
of them when a process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path
from typing import Final

_TAKEN: Final = frozenset({errno.EAGAIN, errno.EACCES})

logger = logging.getLogger(__name__)


class Claims:
    """Locks by key, one process at a time; a file system that has none is used without.

    All of it blocks. Threads may use it at the same time; they are one process.

    Args:
        path: The file to lock; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: int | None = None

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
        """
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, key: bytes) -> bool:
        """Lock a key; say whether no other process holds it."""
        return self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB, key)

    def give(self, key: bytes) -> None:
        """Let go of a key, if it is ours."""
        self._locked(fcntl.LOCK_UN, key)

    def _locked(self, how: int, key: bytes) -> bool:
        with self._lock:
            if self._handle is None:
                return True
            try:
                fcntl.lockf(self._handle, how, 1, _byte(key))
            except OSError as error:
                if error.errno in _TAKEN:
                    return False
                text = "%s: cannot be locked: %s; processes may send equal requests at one time"
                logger.warning(text, self._path, error.strerror)
                self._close()
            return True

    def close(self) -> None:
        """Let go of all keys."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _byte(key: bytes) -> int:
    return int.from_bytes(key[:8]) >> 2  # offsets end at 2^63
