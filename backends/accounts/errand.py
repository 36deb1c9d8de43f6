"""Where a worker records the items of its order: the shared journal, or the summary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from ..contract.errors import LedgerError
from ..contract.types import Json
from .journal import JournalWriter

MOST_BYTES: Final = 4_000_000
"""Records sent home take at most so many bytes: engines carry results of 10 MB at most."""


class SentLedger:
    """Keeps the records in memory, to be sent home with the summary."""

    twice = 0

    def __init__(self) -> None:
        self.sent: list[dict[str, Json]] = []
        self._bytes = 0

    @property
    def full(self) -> str | None:
        """Say why no further item shall begin, or None."""
        if self._bytes < MOST_BYTES:
            return None
        return f"the records take {self._bytes:,} bytes; the rest comes with the next order"

    def finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Say that no item has ended yet: an order holds open items only."""
        return False

    def put(self, record: dict[str, Json]) -> None:
        """Keep a record."""
        self._bytes += len(orjson.dumps(record))
        self.sent.append(record)

    async def flush(self) -> None:
        """Do nothing: the coordinator writes the records to disk."""

    def record(self, index: int) -> dict[str, Any]:
        """Refuse: nothing is read back here."""
        raise _unreadable(index)

    def records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is read back here."""
        raise _unreadable(status)


class FiledLedger:
    """Appends to a journal file of this worker's own in the shared run folder."""

    twice = 0
    sent: None = None
    full: None = None

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer

    def finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Say that no item has ended yet: an order holds open items only."""
        return False

    def put(self, record: dict[str, Json]) -> None:
        """Append a record.

        Raises:
            LedgerError: It could not be written.
        """
        self._writer.write(record)

    async def flush(self) -> None:
        """Wait until everything recorded so far is on disk.

        Raises:
            LedgerError: The disk refused.
        """
        await self._writer.flush()

    def record(self, index: int) -> dict[str, Any]:
        """Refuse: nothing is read back here."""
        raise _unreadable(index)

    def records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is read back here."""
        raise _unreadable(status)


WorkerLedger = SentLedger | FiledLedger


def _unreadable(what: object) -> LedgerError:
    return LedgerError(f"a worker's ledger is not read ({what!r})")


def worker_file(folder: Path, life: int, worker: str) -> Path:
    """Return a new journal file's path for a worker in one life of a run.

    Args:
        folder: The journal's folder.
        life: Number of the coordinator's life.
        worker: Host and process, e.g. ``node17:4242``.
    """
    stem = f"{life:04}-{worker.replace(':', '-').replace('/', '-')}"
    path, n = folder / f"{stem}.jsonl", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}.jsonl"
    return path
