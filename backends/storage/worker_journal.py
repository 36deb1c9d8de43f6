"""Where a worker records the items of its order: the shared journal, or the summary."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from ..core.errors import JournalError
from ..core.messages import MAX_MESSAGE_BYTES
from ..core.types import Json
from .journal import JournalWriter, make_worker_prefix


class ResultJournal:
    """Keeps the records in memory, to be sent home with the summary.

    Args:
        carry: Most bytes that they may take together.
        streams: Items that may be in flight when it is full, and still come.

    Attributes:
        records_to_send: The records.
        altered: Whether a record is not what was put, for it alone was too large.
    """

    duplicates = 0

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES, streams: int = 1) -> None:
        self.records_to_send: list[dict[str, Json]] = []
        self.altered = False
        self._carry, self._streams = max_bytes, streams
        self._bytes = 0

    @property
    def full_reason(self) -> str | None:
        """Say why no further item shall begin, or None."""
        coming = self._streams * self._bytes / max(1, len(self.records_to_send))
        if not self.records_to_send or self._bytes + coming < self._carry:
            return None
        return f"the records take {self._bytes:,} bytes; the rest comes with the next order"

    def is_finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
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
        self.records_to_send.append(record)

    async def flush(self) -> None:
        """Do nothing: the coordinator writes the records to disk."""

    def extents(self) -> dict[str, int]:
        """Return nothing: nothing is read back here."""
        return {}

    def read_record(self, index: int) -> dict[str, Any]:
        """Refuse: nothing is read back here."""
        raise _unreadable(index)

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is read back here."""
        raise _unreadable(status)


def _too_large(record: dict[str, Json], size: int, carry: int) -> dict[str, Json]:
    text = (
        f"the answer takes {size:,} bytes, and a worker without the shared run folder sends "
        f"{carry:,} at most; set backend.shared_folder: true where the folder is shared"
    )
    failed = {"status": "failed", "output": None, "error_class": "InvalidAnswerError"}
    return record | failed | {"error": text}


class WorkerJournal:
    """Appends to a journal file of this worker's own in the shared run folder."""

    duplicates = 0
    records_to_send: None = None
    full_reason: None = None
    altered = False

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer

    def is_finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Say that no item has ended yet: an order holds open items only."""
        return False

    def put(self, record: dict[str, Json]) -> None:
        """Append a record.

        Raises:
            TypeError: JSON has no form for a value in it; nothing was written.
            JournalError: It could not be written.
        """
        self._writer.write(record)

    async def flush(self) -> None:
        """Bring everything recorded so far to disk; the order is at its end.

        Raises:
            JournalError: The disk refused.
        """
        await self._writer.flush(at_once=True)

    def extents(self) -> dict[str, int]:
        """Return nothing: nothing is read back here."""
        return {}

    def read_record(self, index: int) -> dict[str, Any]:
        """Refuse: nothing is read back here."""
        raise _unreadable(index)

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is read back here."""
        raise _unreadable(status)


TaskJournal = ResultJournal | WorkerJournal


def _unreadable(what: object) -> JournalError:
    return JournalError(f"a worker's ledger is not read ({what!r})")


def make_worker_path(folder: Path, session: int, worker: str) -> Path:
    """Return a new journal file's path for a worker in one life of a run.

    Host and process do not name a worker for good: containers may share both.

    Args:
        folder: The journal's folder.
        session: Number of the coordinator's life.
        worker: Host and process, e.g. ``node17:4242``.
    """
    return folder / f"{make_worker_prefix(session, worker)}{secrets.token_hex(3)}.jsonl"
