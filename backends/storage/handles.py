"""Files that are read again and again: thousands of them, few open at a time."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

_KEPT: Final = 128
"""Files kept open: processes are set up for few, and connections need most of them."""


class _Handle:
    """An open file; it is closed when neither those kept nor a reader refers to it any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Handles:
    """Keeps open the files that were read last; threads may read at the same time.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int = _KEPT) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept = dict[Path, _Handle]()  # the one read last comes last

    def __len__(self) -> int:
        """Return how many are open."""
        return len(self._kept)

    def read(self, path: Path, start: int, length: int) -> bytes:
        """Return a part of a file.

        Raises:
            OSError: It cannot be opened or read.
        """
        with self._lock:
            handle = self._kept.pop(path, None) or _Handle(os.open(path, os.O_RDONLY))
            self._kept[path] = handle
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return os.pread(handle.number, length, start)

    def close(self) -> None:
        """Close all; whoever reads just now still ends."""
        with self._lock:
            self._kept.clear()
