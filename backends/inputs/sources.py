"""The shape of a source: rows in order, each with a place that messages can name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.types import Json, Row


@dataclass(frozen=True, slots=True)
class Source:
    """Something that yields rows.

    Attributes:
        name: The input in words, for messages and summaries.
        rows: Opens the input and yields ``(place, row)``; reads no further than it is asked.
        locate: Puts a place in words, e.g. ``a.jsonl, line 7``.
        id: Column of ids when the user names none; None for row numbers.
        drop_unparsable: Column of SMILES; rows that RDKit cannot parse become no item.
        ragged: Whether rows may differ in their columns.
    """

    name: str
    rows: Callable[[], Iterator[tuple[int, Row]]]
    locate: Callable[[int], str]
    id: str | None = None
    drop_unparsable: str | None = None
    ragged: bool = False


def at_line(path: Path) -> Callable[[int], str]:
    """Return a `Source.locate` for text files, whose places are physical lines from 1."""
    return lambda line: f"{path}, line {line}"


def id_text(value: Json) -> str | None:
    """Write a cell of the id column as an id.

    Args:
        value: Text or a number; None counts as blank.

    Returns:
        The text without surrounding blanks (``""`` when blank); None when the value is neither
        text nor a number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None
