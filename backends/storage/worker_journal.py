"""Where a worker records the items of its order: the shared journal, or the summary."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from ..core.errors import LedgerError
from ..core.messages import CARRY
from ..core.types import Json
from .journal import JournalWriter, worker_prefix


class SentLedger:
    """Keeps the records in memory, to be sent home with the summary.

    Args:
        carry: Most bytes that they may take together.
        streams: Items that may be in flight when it is full, and still come.

    Attributes:
        sent: The records.
        altered: Whether a record is not what was put, for it alone was too large.
    """

    twice = 0

    def __init__(self, carry: int = CARRY, streams: int = 1) -> None:
        self.sent: list[dict[str, Json]] = []
        self.altered = False
        self._carry, self._streams = carry, streams
        self._bytes = 0

    @property
    def full(self) -> str | None:
        """Say why no further item shall begin, or None."""
        coming = self._streams * self._bytes / max(1, len(self.sent))
        if not self.sent or self._bytes + coming < self._carry:
            return None
        return f"the records take {self._bytes:,} bytes; the rest comes with the next order"

    def finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Say that no item has ended yet: an order holds open items only."""
        return False

    def put(self, record: dict[str, Json]) -> None:
        """Keep a record; one that nothing carries is kept as a failure.

        Raises:
            TypeError: JSON has no form for a value in it; it is not kept.
        """
        size = len(orjson.dumps(record))
        if size > self._carry:
            record, self.altered = _too_large(record, size, self._carry), True
            size = len(orjson.dumps(record))
        self._bytes += size
        self.sent.append(record)

    async def flush(self) -> None:
        """Do nothing: the coordinator writes the records to disk."""

    def extents(self) -> dict[str, int]:
        """Return nothing: nothing is read back here."""
        return {}

    def record(self, index: int) -> dict[str, Any]:
        """Refuse: nothing is read back here."""
        raise _unreadable(index)

    def records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is read back here."""
        raise _unreadable(status)


def _too_large(record: dict[str, Json], size: int, carry: int) -> dict[str, Json]:
    text = (
        f"the answer takes {size:,} bytes, and a worker without the shared run folder sends "
        f"{carry:,} at most; set backend.shared_folder: true where the folder is shared"
    )
    failed = {"status": "failed", "output": None, "error_class": "InvalidAnswerError"}
    return record | failed | {"error": text}


class FiledLedger:
    """Appends to a journal file of this worker's own in the shared run folder."""

    twice = 0
    sent: None = None
    full: None = None
    altered = False

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer

    def finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Say that no item has ended yet: an order holds open items only."""
        return False

    def put(self, record: dict[str, Json]) -> None:
        """Append a record.

        Raises:
            TypeError: JSON has no form for a value in it; nothing was written.
            LedgerError: It could not be written.
        """
        self._writer.write(record)

    async def flush(self) -> None:
        """Bring everything recorded so far to disk; the order is at its end.

        Raises:
            LedgerError: The disk refused.
        """
        await self._writer.flush(at_once=True)

    def extents(self) -> dict[str, int]:
        """Return nothing: nothing is read back here."""
        return {}

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

    Host and process do not name a worker for good: containers may share both.

    Args:
        folder: The journal's folder.
        life: Number of the coordinator's life.
        worker: Host and process, e.g. ``node17:4242``.
    """
    return folder / f"{worker_prefix(life, worker)}{secrets.token_hex(3)}.jsonl"
