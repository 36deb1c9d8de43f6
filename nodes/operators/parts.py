"""Parts of documents (``input.split``): where they stand, in the results about a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...backends.core.errors import InputError
from ...backends.core.types import PART_COLUMN, Item, Json
from ..item.part import is_part

PARTS: Final = "parts"
"""Column of a document with its parts: of, missing, sources."""

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


def describe_parts(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Json]:
    """Return the column ``parts`` of a document.

    Args:
        parts: Id and column ``part`` of each part that is there; at least one.
    """
    count = parts[0][1]["of"]
    abouts = {about["number"]: (name, about) for name, about in parts}
    return {
        "of": count,
        "missing": [n for n in range(1, count + 1) if n not in abouts],
        "sources": [
            {"id": name, "start": about["start"], "end": about["end"]}
            for name, about in abouts.values()
        ],
    }
