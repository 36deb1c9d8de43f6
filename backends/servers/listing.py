"""A node's endpoints file: replaced in one step, there while a server is ready."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class Listing:
    """Writes the endpoints file; its methods block.

    Args:
        path: The file.
        host: The node's name.
    """

    def __init__(self, path: Path, host: str) -> None:
        self._path, self._host = path, host
        self._lock, self._closed = threading.Lock(), False

    def write(self, names: Sequence[str]) -> None:
        """List servers; without any the file is removed. After :meth:`close` nothing is written.

        Raises:
            OSError: The file cannot be written; the old one is as it was.
        """
        with self._lock:
            if self._closed:
                return
            if not names:
                self._path.unlink(missing_ok=True)
                return
            head = f"# servers of {self._host} that are ready, as fanfold saw them last\n"
            partial = self._path.with_name(f".{self._path.name}.partial")
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:
                file.write(head + "".join(f"{name}\n" for name in names))
            partial.replace(self._path)

    def close(self) -> None:
        """Remove the file for good."""
        with self._lock:
            self._closed = True
            with suppress(OSError):  # the folder is gone: so is the file
                self._path.unlink(missing_ok=True)
