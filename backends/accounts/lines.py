"""What a journal's files and lines must be to be a run's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, Final, NamedTuple

from ..contract.errors import LedgerError
from .journal import Line
from .totals import NUMBERS

_NUMBER: Final = frozenset({int, NoneType})
_INDEX: Final = frozenset({int})
_TEXT: Final = frozenset({str})
_STATUS: Final = frozenset({"done", "failed"})
_FACTS: Final = ("index", "status", *NUMBERS)
_facts: Final = itemgetter(*_FACTS)


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


Facts = tuple[Any, ...]
"""A record's index, status, and :data:`NUMBERS`; what it lacks is None."""


def facts_of(record: dict[str, Any]) -> Facts:
    """Return what a ledger keeps in mind of a record."""
    try:
        facts: Facts = _facts(record)
    except KeyError:
        return tuple(map(record.get, _FACTS))
    return facts


def worker_prefix(life: int, worker: str) -> str:
    """Return how the names of a worker's journal files begin.

    Args:
        life: Number of the coordinator's life.
        worker: Host and process, e.g. ``node17:4242``.
    """
    return f"{life:04}-{worker.replace(':', '-').replace('/', '-')}-"


class Noted(NamedTuple):
    """What is kept in mind of a line: its number, start and length in bytes, and facts."""

    number: int
    start: int
    length: int
    facts: Facts


def noted(line: Line) -> Noted:
    """Return what is kept in mind of a line; its record goes."""
    return Noted(line.number, line.start, line.length, facts_of(line.record))


def are_fine(facts: Sequence[Facts], items: int) -> bool:
    """Say whether :func:`check_line` refuses none of these records: looked at column by column."""
    indices, statuses, *numbers = zip(*facts, strict=True)
    return (
        _INDEX.issuperset(map(type, indices))
        and min(indices) >= 0
        and max(indices) < items
        and _TEXT.issuperset(map(type, statuses))
        and _STATUS.issuperset(statuses)
        and _NUMBER.issuperset(map(type, chain.from_iterable(numbers)))
    )


def check_line(line: Line, path: Path, items: int) -> None:
    """Refuse what no ledger of this run has written.

    Raises:
        LedgerError: It says something else.
    """
    record = line.record
    index, status, *numbers = facts_of(record)
    fine = (
        type(index) is int
        and 0 <= index < items
        and type(status) is str
        and status in _STATUS
        and _NUMBER.issuperset(map(type, numbers))
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
    if record.get("status") not in (*_STATUS,):
        return f"{name} has no status known here"
    return f"{name}: {', '.join(NUMBERS)}: no numbers"
