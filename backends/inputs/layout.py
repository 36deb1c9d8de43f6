"""The layout of an item store, shared by its writer and its reader.

An Arrow IPC file: record batches of ``id`` (text), ``row`` (JSON), ``problem`` (text or null),
then one batch without rows whose metadata holds the summary as JSON. The summary stands last
because it is known last, and the schema's own metadata is written first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson
import pyarrow as pa

from .base import Skipped

VERSION: Final = "1"
VERSION_KEY: Final = b"fanfold.items"
SUMMARY_KEY: Final = b"fanfold.summary"
_FIELDS: Final[list[tuple[str, pa.DataType]]] = [
    ("id", pa.string()),
    ("row", pa.binary()),
    ("problem", pa.string()),
]
SCHEMA: Final = pa.schema(
    _FIELDS,
    metadata={VERSION_KEY: VERSION.encode()},
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the store knows about its items.

    Attributes:
        starts: Index of the first item of each batch, ascending from 0.
        items: Number of items.
        columns: Names of the columns over all items.
        digest: Digest over ids and rows, hexadecimal.
        skipped: Rows left out, the first ones.
        skipped_total: Number of rows left out.
        invalid: Number of items that carry a problem.
        source: The input in words.
    """

    starts: tuple[int, ...]
    items: int
    columns: tuple[str, ...]
    digest: str
    skipped: tuple[Skipped, ...]
    skipped_total: int
    invalid: int
    source: str

    def dumps(self) -> bytes:
        """Write as JSON."""
        return orjson.dumps(self)

    @classmethod
    def loads(cls, data: bytes) -> Header:
        """Read from JSON.

        Args:
            data: What `dumps` wrote.

        Returns:
            The header.

        Raises:
            ValueError: It is no JSON.
            KeyError: A field is missing.
            TypeError: A field has another type.
        """
        found: dict[str, Any] = orjson.loads(data)
        return cls(
            starts=tuple(found["starts"]),
            items=found["items"],
            columns=tuple(found["columns"]),
            digest=found["digest"],
            skipped=tuple(Skipped(one["id"], one["reason"]) for one in found["skipped"]),
            skipped_total=found["skipped_total"],
            invalid=found["invalid"],
            source=found["source"],
        )
