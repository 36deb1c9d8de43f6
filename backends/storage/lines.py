"""What a journal's files and lines must be to be a run's own."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, Final, NamedTuple

from ..core.errors import LedgerError
from ..core.values import MOST, NUMBERS, STATUSES, check_record
from .journal import Line, Source
from .totals import Spent

_NUMBER: Final = frozenset({int, NoneType})
_INDEX: Final = frozenset({int})
_TEXT: Final = frozenset({str})
_STATUS: Final = frozenset(STATUSES)
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
    """What is kept in mind of a line: number, start and length in bytes, checksum, and facts."""

    number: int
    start: int
    length: int
    crc: int
    facts: Facts


def noted(line: Line) -> Noted:
    """Return what is kept in mind of a line; its record goes."""
    record = line.record
    facts = facts_of(record)
    if "shares" in record:
        facts = _none_if_odd(record, facts)
    return Noted(line.number, line.start, line.length, line.crc, facts)


def _none_if_odd(record: dict[str, Any], facts: Facts) -> Facts:
    """Return a record's facts, without the index if it is to be refused."""
    try:
        check_record(record)
    except ValueError:
        return None, *facts[1:]  # refused with the others, by its line
    return facts


def add_up(facts: Sequence[Facts], items: int) -> Spent | None:
    """Return the sums over records: column by column, which is less work.

    Args:
        facts: What is kept in mind of each record; at least one.
        items: Number of items of the run.

    Returns:
        The sums; None where :func:`check_line` refuses one of the records.
    """
    indices, statuses, *columns = zip(*facts, strict=True)
    fine = (
        _INDEX.issuperset(map(type, indices))
        and min(indices) >= 0
        and max(indices) < items
        and _TEXT.issuperset(map(type, statuses))
        and _STATUS.issuperset(statuses)
    )
    sums = list[int]()
    for column in columns if fine else ():
        if not _NUMBER.issuperset(map(type, column)):
            return None
        told = list(filter(None, column))  # neither null nor 0
        total = sum(told)
        if told and (min(told) < 0 or (total > MOST and max(told) > MOST)):
            return None
        sums.append(total)
    return Spent(*sums) if fine else None


def check_line(line: Line, source: Source, items: int) -> None:
    """Refuse what no ledger of this run has written.

    Raises:
        LedgerError: It says something else.
    """
    record = line.record
    if (trouble := find_trouble(record, items)) is not None:
        raise source.fault(line.number, trouble)


def find_trouble(record: dict[str, Any], items: int) -> str | None:
    """Return what is wrong with a record, or None.

    Args:
        record: The record.
        items: Number of items of the run.
    """
    index = record.get("index")
    if type(index) is not int:
        found = "a second header" if "v" in record else "not a record of an item"
        return f"{found}; the file was damaged or edited"
    if not 0 <= index < items:
        return f"item {record.get('id')!r} has index {index}, this run has {items} items"
    try:
        check_record(record)
    except ValueError as error:
        return str(error)
    return None
