"""What a journal's files and lines must be to be a run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..contract.errors import LedgerError
from .journal import Line
from .totals import NUMBERS

_NUMBER: Final = (int, type(None))


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
    record, where = line.record, f"{path}, line {line.number}"
    index = record.get("index")
    if type(index) is not int:
        found = "a second header" if "v" in record else "not a record of an item"
        raise LedgerError(f"{where}: {found}; the file was damaged or edited")
    if not 0 <= index < items:
        msg = f"{where}: item {record.get('id')!r} has index {index}, this run has {items} items"
        raise LedgerError(msg)
    if record.get("status") not in ("done", "failed"):
        raise LedgerError(f"{where}: item {record.get('id')!r} has no status known here")
    if not all(type(record.get(name)) in _NUMBER for name in NUMBERS):
        raise LedgerError(f"{where}: item {record.get('id')!r}: {', '.join(NUMBERS)}: no numbers")
