"""Journals of a worker: records in the shared run folder, or in the shard result."""

from __future__ import annotations

from typing import Any

from ..core.messages import MAX_MESSAGE_BYTES
from ..core.types import Json
from ..core.values import json_size
from .journal_writer import JournalWriter


class ResultJournal:
    """Keep records in memory, to be sent with the shard result.

    Args:
        max_bytes: Total size of the records, by `json_size`, at which no further item starts, and
            the most that one record may take.
        streams: Items that may still be in flight then.

    Attributes:
        records_to_send: The records.
        altered: Whether a record was replaced by a failure because it alone was too large.
    """

    duplicates = 0

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES, streams: int = 1) -> None:
        self.records_to_send: list[dict[str, Json]] = []
        self.altered = False
        self._carry, self._streams = max_bytes, streams
        self._bytes = 0

    @property
    def full_reason(self) -> str | None:
        """Return why no further item may start, or None."""
        coming = self._streams * self._bytes / max(1, len(self.records_to_send))
        if not self.records_to_send or self._bytes + coming < self._carry:
            return None
        return f"the records take {self._bytes:,} bytes; the other items go to the next task"

    def is_finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Return False: a task contains open items only."""
        return False

    def find_open(self, lo: int, hi: int) -> int:  # noqa: ARG002 - the protocol's form
        """Return the first item of a range: a task contains open items only."""
        return lo

    def put(self, record: dict[str, Json]) -> None:
        """Keep a record; a record too large to send becomes a failure.

        Raises:
            TypeError: A value has no JSON form; the record is not kept.
        """
        size = json_size(record)
        if size > self._carry:
            record, self.altered = _too_large(record, size, self._carry), True
            size = json_size(record)
        self._bytes += size
        self.records_to_send.append(record)

    async def flush(self) -> None:
        """Do nothing: the coordinator writes the records to disk."""

    def read_answers(self, lo: int, hi: int) -> list[dict[str, Any] | None]:
        """Return no answer for each item: a task contains open items only."""
        return [None] * (hi - lo)


def _too_large(record: dict[str, Json], size: int, max_bytes: int) -> dict[str, Json]:
    text = (
        f"the answer takes {size:,} bytes, and a worker without the shared run folder can send at "
        f"most {max_bytes:,}; set backend.shared_folder: true where the folder is shared"
    )
    failed = {"status": "failed", "output": None, "error_class": "InvalidAnswerError"}
    return record | failed | {"error": text}


class WorkerJournal:
    """Append records to this worker's journal file in the shared run folder."""

    duplicates = 0
    records_to_send: None = None
    full_reason: None = None
    altered = False

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer

    def is_finished(self, index: int) -> bool:  # noqa: ARG002 - the protocol's form
        """Return False: a task contains open items only."""
        return False

    def find_open(self, lo: int, hi: int) -> int:  # noqa: ARG002 - the protocol's form
        """Return the first item of a range: a task contains open items only."""
        return lo

    def put(self, record: dict[str, Json]) -> None:
        """Append a record.

        Raises:
            TypeError: A value has no JSON form; nothing was written.
            JournalError: The record could not be written.
        """
        self._writer.write(record)

    async def flush(self) -> None:
        """Flush all records to disk, at the end of the task.

        Raises:
            JournalError: The flush failed.
        """
        await self._writer.flush(at_once=True)

    def read_answers(self, lo: int, hi: int) -> list[dict[str, Any] | None]:
        """Return no answer for each item: a task contains open items only."""
        return [None] * (hi - lo)


TaskJournal = ResultJournal | WorkerJournal
