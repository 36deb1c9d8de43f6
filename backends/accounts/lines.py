"""What a journal's files and lines must be to be a run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..contract.errors import LedgerError
from .journal import Line
from .totals import NUMBERS

_NUMBER: Final = frozenset({int, type(None)})


def life_of(path: Path) -> int:
    """Return the number of the life in which a journal file was written.

    Raises:
        LedgerError: It is none.
    """
    life = path.stem.partition("-")[0]
    if not (life.isascii() and life.isdigit()):
        msg = f"{path}: not a journal file of fanfold; move it out of the run folder"
        raise LedgerError(msg)
    return int(life)


def check_line(line: Line, path: Path, items: int) -> None:
    """Refuse what no ledger of this run has written.

    Raises:
        LedgerError: It says something else.
    """
    record = line.record
    index = record.get("index")
    fine = (
        type(index) is int
        and 0 <= index < items
        and record.get("status") in ("done", "failed")
        and _NUMBER.issuperset(map(type, map(record.get, NUMBERS)))
    )
    if not fine:
        raise LedgerError(f"{path}, line {line.number}: {_trouble(record, index, items)}")


def _trouble(record: dict[str, Any], index: Any, items: int) -> str:
    """Say what is wrong with a line."""
    name = f"item {record.get('id')!r}"
    if type(index) is not int:
        found = "a second header" if "v" in record else "not a record of an item"
        return f"{found}; the file was damaged or edited"
    if not 0 <= index < items:
        return f"{name} has index {index}, this run has {items} items"
    if record.get("status") not in ("done", "failed"):
        return f"{name} has no status known here"
    return f"{name}: {', '.join(NUMBERS)}: no numbers"
