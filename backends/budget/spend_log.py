"""The book of a budget: what one life of a run may have spent at most, on disk before it is spent.

A file per life and per lease, each line a JSON object. ``level`` is an upper bound of what the
life spends until a later line says otherwise; it is raised on disk before anything is spent on
it, and may be lowered at any time. ``held`` tells how long nodes have been held. ``lease`` notes
what was lent to a worker elsewhere, ``back`` what became of it, ``settled`` how the life ended. A
life that was killed has no ``settled``: then its level counts as spent, less what the books of
its leases prove. The book of a life without limits has ``held`` only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.checksum import add_crc
from ..core.disk import sync_folder
from ..core.errors import LedgerError
from ..core.money import Amount, Held
from ..core.types import Json
from ..core.values import MOST
from ..storage.journal import RunIds, Source, find_renamed, make_header, present_id, scan

KIND: Final = "budget"
"""What the header of a spend log says."""

Level = Mapping[str, int]
"""A bound for each limited field of an :class:`Amount`."""

_SETTLE_S: Final = 60.0
"""Seconds after a lease's end until its book is believed: clocks differ, files show late."""


class Book:
    """Writes one file; every method blocks.

    Args:
        path: The file to create; it must not exist.
        run: The run's id.

    Raises:
        LedgerError: The file cannot be created.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._crc = path, 0
        try:
            made = not path.parent.exists()
            path.parent.mkdir(exist_ok=True)
            self._file = FileIO(path, "xb")
        except OSError as error:
            raise LedgerError(f"{path}: cannot be created: {error.strerror}") from error
        try:
            self._append(make_header(path, KIND, {"run": run}), sync=False)
            self._sync_names(made)
        except LedgerError:
            self._file.close()
            raise

    def _sync_names(self, made: bool) -> None:
        """Make the file's name durable, and its folder's: what it allows is spent on that."""
        folder = self._path.parent
        try:
            sync_folder(folder)
            if made:
                sync_folder(folder.parent)
        except OSError as error:
            msg = f"{folder}: cannot be flushed to disk: {error.strerror}"
            raise LedgerError(msg) from error

    def write(self, line: Mapping[str, Json], *, sync: bool) -> None:
        """Append one line.

        Args:
            line: What it says.
            sync: Return only when it is on disk.

        Raises:
            LedgerError: It cannot be written.
        """
        self._append(orjson.dumps(line), sync=sync)

    def _append(self, data: bytes, *, sync: bool) -> None:
        data, self._crc = add_crc(data, self._crc)
        try:
            while data:
                data = data[self._file.write(data) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            msg = f"{self._path}: the budget's book cannot be written: {error.strerror}"
            raise LedgerError(msg) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Lease:
    """What was lent to a worker elsewhere.

    Attributes:
        amount: How much.
        until: Unix time in seconds after which no worker begins on it.
        booked: Whether the worker keeps a book of it that is seen here.
    """

    amount: Amount
    until: float
    booked: bool = False


@dataclass(slots=True)
class Page:
    """A book as it was read.

    Attributes:
        level: The last bound, by field.
        settled: What was spent, leases apart; None: the life was killed, or still goes on.
        held: How long nodes were held, as far as noted.
        leases: What was lent and has not come back.
        until: (a lease's book) Unix time in seconds after which nothing more is spent.
        late: Leases of earlier lives that came back in this one: what was spent of each.
    """

    level: dict[str, int] = field(default_factory=dict)
    settled: Amount | None = None
    held: Held = field(default_factory=Held)
    leases: dict[str, Lease] = field(default_factory=dict)
    until: float = float("inf")
    late: dict[str, Amount] = field(default_factory=dict)


def read_page(path: Path, run: RunIds) -> Page:
    """Read a book.

    Args:
        path: The book.
        run: The run's ids.

    Raises:
        LedgerError: It is damaged, or another run's.
    """
    page, source = Page(), Source(path, run, KIND)
    for line in scan(source):
        try:
            _apply(page, line.record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"not a line of a budget's book ({error!r})"
            raise source.fault(line.number, msg) from None
    return page


def _apply(page: Page, record: dict[str, Any]) -> None:
    if "level" in record:
        level = Amount.from_json(record["level"])
        page.level = {name: getattr(level, name) for name in record["level"]}
    if "lease" in record:
        amount = Amount.from_json(record["amount"])
        until, booked = _time(record["until"]), record["booked"]
        if type(booked) is not bool:
            raise TypeError(f"booked is {booked!r}")
        page.leases[record["lease"]] = Lease(amount, until, booked)
    elif "until" in record:
        page.until = _time(record["until"])
    if "back" in record:
        page.leases.pop(record["back"], None)
    if "late" in record:
        page.late[record["late"]] = Amount.from_json(record["used"])
    if "settled" in record:
        page.settled = Amount.from_json(record["settled"])
    if "held" in record:
        page.held = Held.from_json(record["held"])


def _time(value: Any) -> float:
    """Return seconds since 1970.

    Raises:
        ValueError: It is no such number.
    """
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise ValueError(f"until is {value!r}, not a time in seconds since 1970")
    return float(value)


class Shelf:
    """The books of a run.

    Args:
        folder: Where they lie.
        run: The run's ids; new books carry the present one.
    """

    def __init__(self, folder: Path, run: RunIds) -> None:
        self._folder, self._run = folder, run

    def of_life(self, life: int) -> Path:
        """Return the path of a life's book."""
        return self._folder / f"{life:04}.jsonl"

    def next_life(self) -> int:
        """Return the number of the first life without a book, from 1."""
        return 1 + max((int(p.stem) for p in self._lives()), default=0)

    def _lives(self) -> list[Path]:
        """Return the books of sessions.

        Raises:
            LedgerError: A file has a name that no book has.
        """
        found = sorted(self._folder.glob("*.jsonl"))
        lives = [path for path in found if path.stem.isascii() and path.stem.isdigit()]
        for path in found:
            if not (path.stem.startswith("lease-") or path in lives):
                msg = f"{path}, line 1: not a spend log of fanfold; move it out of the run folder"
                raise LedgerError(msg)
        return lives

    def of_lease(self, lease: str) -> Path:
        """Return the path of the book of a lease, written by who has it."""
        return self._folder / f"lease-{lease}.jsonl"

    def open(self, path: Path) -> Book:
        """Begin a book.

        Raises:
            LedgerError: It cannot be created.
        """
        return Book(path, present_id(self._run))

    def page(self, lease: str) -> Page:
        """Read a lease's book.

        Raises:
            LedgerError: It is damaged.
        """
        return read_page(self.of_lease(lease), self._run)

    def pages(self) -> dict[int, Page]:
        """Read the books of all lives.

        Raises:
            LedgerError: One is damaged.
        """
        try:
            if self._folder.is_dir():
                find_renamed(self._folder, self._run)
        except OSError as error:
            raise LedgerError(f"{self._folder}: cannot be listed: {error.strerror}") from error
        return {int(path.stem): read_page(path, self._run) for path in self._lives()}

    def lent(self, now: float | None = None) -> dict[str, Amount]:
        """Return, by name, what counts as spent of each lease that did not come back to its life.

        Args:
            now: Unix time in seconds.

        Raises:
            LedgerError: A book is damaged.
        """
        pages = self.pages()
        late = _late(pages)
        return {
            name: late[name] if name in late else self.proven(name, lease, now)
            for page in pages.values()
            for name, lease in page.leases.items()
        }

    def proven(self, name: str, lease: Lease, now: float | None = None) -> Amount:
        """Return the most that was spent of a lease, as far as its own book tells.

        A worker that is taken for lost may go on until its time ends; only then its book is
        believed, or at once if it says that it has settled. A worker whose book is not seen here
        may have spent everything.

        Args:
            name: The lease's name.
            lease: What was lent.
            now: Unix time in seconds.

        Raises:
            LedgerError: The lease's book is damaged.
        """
        path, now = self.of_lease(name), time.time() if now is None else now
        if not path.exists():
            never_begun = lease.booked and now > lease.until + _SETTLE_S
            return Amount() if never_begun else lease.amount
        page = read_page(path, self._run)
        if page.settled is not None:
            return page.settled.least(lease.amount)
        if now < page.until + _SETTLE_S:
            return lease.amount
        return Amount(**(lease.amount.to_json() | page.level)).least(lease.amount)

    def held(self) -> Held:
        """Return how long nodes were held in all lives, as far as noted.

        Raises:
            LedgerError: A book is damaged.
        """
        total = Held()
        for page in self.pages().values():
            total = total.plus(page.held)
        return total

    def spent(self, recorded: Mapping[int, Amount], now: float | None = None) -> Amount:
        """Return the most that all lives so far may have spent.

        Args:
            recorded: By life, what the journal says; it counts where no book does.
            now: Unix time in seconds.

        Raises:
            LedgerError: A book is damaged.
        """
        pages, lent, total = self.pages(), self.lent(now), Amount()
        for life in pages.keys() | recorded.keys():
            journal = recorded.get(life, Amount())
            page = pages.get(life)
            total = total.plus(journal if page is None else _of_life(page, journal, lent))
        return total

    def doubt(self, recorded: Mapping[int, Amount], now: float | None = None) -> Amount:
        """Return what may have been spent besides what the journal and the time of nodes tell.

        Args:
            recorded: By life, what the journal says.
            now: Unix time in seconds.

        Raises:
            LedgerError: A book is damaged.
        """
        lent, total = self.lent(now), Amount()
        for life, page in self.pages().items():
            journal = recorded.get(life, Amount())
            known = journal.plus(page.held.amount)
            more = _of_life(page, journal, lent).minus(known).most(Amount())
            if more.nano_usd <= journal.requests:  # each request's price is rounded up by itself
                more = more._replace(nano_usd=0)
            total = total.plus(more)
        return total


def _of_life(page: Page, journal: Amount, lent: Mapping[str, Amount]) -> Amount:
    """Return the most that a life may have spent.

    Args:
        page: Its book.
        journal: What the journal says of it, for what no cap limits.
        lent: What counts as spent of each lease.
    """
    if page.settled is not None:
        total = page.settled.most(Amount(node_ms=page.held.node_ms))
        for name in page.leases:
            total = total.plus(lent[name])
        return total
    total = Amount(**(journal.plus(page.held.amount).to_json() | page.level))
    for name, lease in page.leases.items():
        saved = lease.amount.minus(lent[name]).to_json()
        total = total.minus(Amount(**{k: v for k, v in saved.items() if k in page.level}))
    return total


def _late(pages: Mapping[int, Page]) -> dict[str, Amount]:
    """Return what was spent of leases that came back in a later life."""
    return {name: used for page in pages.values() for name, used in page.late.items()}
