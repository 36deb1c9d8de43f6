"""Parts of documents (``input.split``): where they stand, in the results about a document."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ...backends.core.errors import InputError
from ...backends.core.samples import find_row_error
from ...backends.core.terminal import count_nouns
from ...backends.core.types import PART_COLUMN, Item, Json, Row
from ..item.part import is_part
from .base import FailedItem, StageResult

PARTS: Final = "parts"
"""Column of a document with its parts: of, missing, sources."""

_SHOWN: Final = 5
"""Documents that a line names."""

PARTS_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "of": {"type": "integer"},
        "missing": {"type": "array", "items": {"type": "integer"}},
        "sources": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "start": {"type": "integer"},
                    "end": {"type": "integer"},
                },
            },
        },
    },
}


def read_part(item: Item) -> Mapping[str, Any]:
    """Return what the column of a part says.

    Raises:
        InputError: It is not one that ``input.split`` made.
    """
    if not is_part(item.row):
        raise InputError(f"merge: item {item.id!r} has no column {PART_COLUMN!r} from input.split")
    about: Mapping[str, Any] = item.row[PART_COLUMN]
    return about


def describe_parts(parts: Sequence[tuple[str, Mapping[str, Any]]], count: int) -> dict[str, Json]:
    """Return the column ``parts`` of a document.

    Args:
        parts: Id and column ``part`` of each part that is there.
        count: Number of its parts.
    """
    abouts = {about["number"]: (name, about) for name, about in parts}
    return {
        "of": count,
        "missing": [n for n in range(1, count + 1) if n not in abouts],
        "sources": [
            {"id": name, "start": about["start"], "end": about["end"]}
            for name, about in abouts.values()
        ],
    }


@dataclass(slots=True)
class LostDocument:
    """A document without a part that an operator could use.

    Attributes:
        id: Its id.
        parts: Number of its parts.
        row: The columns of its first part that failed.
        failed: Error class of each part that failed.
        errors: Id and error of a part, by error class.
    """

    id: str
    parts: int
    row: Row
    failed: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def to_result(self, row: Row) -> StageResult:
        """Return its failed result, with the most frequent error of its parts.

        Args:
            row: Columns of the result beside ``parts``.
        """
        name = str(find_row_error(self.failed))
        parts = count_nouns(self.parts, "part")
        what = f"all {parts} failed" if self.parts > 1 else "its only part failed"
        if len(self.failed) < self.parts:
            what = f"{len(self.failed):,} of {parts} failed, and no other is left"
        columns = row | {PARTS: describe_parts((), self.parts)}
        return StageResult(self.id, None, columns, name, f"{what}; {self.errors[name]}")


def find_lost_documents(failed: Iterable[FailedItem], known: Collection[str]) -> list[LostDocument]:
    """Return the documents whose parts have failed, and of which none is left.

    Args:
        failed: Items that failed in earlier stages.
        known: Documents of which a part is left.
    """
    found = dict[str, LostDocument]()
    for one in failed:
        if not is_part(one.item.row) or (about := read_part(one.item))["document"] in known:
            continue
        name = str(about["document"])
        lost = found.setdefault(name, LostDocument(name, about["of"], one.item.row))
        lost.failed.append(one.error_class)
        lost.errors.setdefault(one.error_class, f"{one.item.id}: {one.error}")
    return list(found.values())


def describe_lost(lost: Sequence[LostDocument]) -> str:
    """Return a line that names documents without a part that is left."""
    are = "document has" if len(lost) == 1 else "documents have"
    names = ", ".join(one.id for one in lost[:_SHOWN])
    more = f" and {len(lost) - _SHOWN:,} more" if len(lost) > _SHOWN else ""
    return f"{len(lost):,} {are} no part left, because parts failed: {names}{more}"
