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
from ..core.errors import JournalError
from ..core.money import Amount, NodeTime
from ..core.types import Json
from ..core.values import MAX_COUNT
from ..storage.journal import (
    JournalSource,
    RunIds,
    check_renamed_files,
    get_current_run_id,
    make_header,
    scan_lines,
)

HEADER_KIND: Final = "budget"
"""What the header of a spend log says."""

Level = Mapping[str, int]
"""A bound for each limited field of an :class:`Amount`."""

_SETTLE_S: Final = 60.0
"""Seconds after a lease's end until its book is believed: clocks differ, files show late."""


class SpendLog:
    """Writes one file; every method blocks.

    Args:
        path: The file to create; it must not exist.
        run: The run's id.

    Raises:
        JournalError: The file cannot be created.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._crc = path, 0
        try:
            made = not path.parent.exists()
            path.parent.mkdir(exist_ok=True)
            self._file = FileIO(path, "xb")
        except OSError as error:
            raise JournalError(f"{path}: cannot be created: {error.strerror}") from error
        try:
            self._append(make_header(path, HEADER_KIND, {"run": run}), sync=False)
            self._sync_names(made)
        except JournalError:
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
            raise JournalError(msg) from error

    def write(self, line: Mapping[str, Json], *, sync: bool) -> None:
        """Append one line.

        Args:
            line: What it says.
            sync: Return only when it is on disk.

        Raises:
            JournalError: It cannot be written.
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
            raise JournalError(msg) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Lease:
    """What was lent to a worker elsewhere.

    Attributes:
        amount: How much.
        until: Unix time in seconds after which no worker begins on it.
        has_log: Whether the worker keeps a book of it that is seen here.
    """

    amount: Amount
    until: float
    has_log: bool = False


@dataclass(slots=True)
class SpendState:
    """A book as it was read.

    Attributes:
        level: The last bound, by field.
        settled: What was spent, leases apart; None: the life was killed, or still goes on.
        node_time: How long nodes were held, as far as noted.
        leases: What was lent and has not come back.
        until: (a lease's book) Unix time in seconds after which nothing more is spent.
        late_returns: Leases of earlier lives that came back in this one: what was spent of each.
    """

    level: dict[str, int] = field(default_factory=dict)
    settled: Amount | None = None
    node_time: NodeTime = field(default_factory=NodeTime)
    leases: dict[str, Lease] = field(default_factory=dict)
    until: float = float("inf")
    late_returns: dict[str, Amount] = field(default_factory=dict)


def read_spend_state(path: Path, run: RunIds) -> SpendState:
    """Read a book.

    Args:
        path: The book.
        run: The run's ids.

    Raises:
        JournalError: It is damaged, or another run's.
    """
    page, source = SpendState(), JournalSource(path, run, HEADER_KIND)
    for line in scan_lines(source):
        try:
            _apply(page, line.record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"not a line of a budget's book ({error!r})"
            raise source.make_error(line.number, msg) from None
    return page


def _apply(page: SpendState, record: dict[str, Any]) -> None:
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
        page.late_returns[record["late"]] = Amount.from_json(record["used"])
    if "settled" in record:
        page.settled = Amount.from_json(record["settled"])
    if "held" in record:
        page.node_time = NodeTime.from_json(record["held"])


def _time(value: Any) -> float:
    """Return seconds since 1970.

    Raises:
        ValueError: It is no such number.
    """
    if type(value) not in (int, float) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"until is {value!r}, not a time in seconds since 1970")
    return float(value)


class SpendLogs:
    """The books of a run.

    Args:
        folder: Where they lie.
        run: The run's ids; new books carry the present one.
    """

    def __init__(self, folder: Path, run: RunIds) -> None:
        self._folder, self._run = folder, run

    def session_path(self, session: int) -> Path:
        """Return the path of a life's book."""
        return self._folder / f"{session:04}.jsonl"

    def next_session(self) -> int:
        """Return the number of the first life without a book, from 1."""
        return 1 + max((int(p.stem) for p in self._session_paths()), default=0)

    def _session_paths(self) -> list[Path]:
        """Return the books of sessions.

        Raises:
            JournalError: A file has a name that no book has.
        """
        found = sorted(self._folder.glob("*.jsonl"))
        lives = [path for path in found if path.stem.isascii() and path.stem.isdigit()]
        for path in found:
            if not (path.stem.startswith("lease-") or path in lives):
                msg = f"{path}, line 1: not a spend log of fanfold; move it out of the run folder"
                raise JournalError(msg)
        return lives

    def lease_path(self, lease: str) -> Path:
        """Return the path of the book of a lease, written by who has it."""
        return self._folder / f"lease-{lease}.jsonl"

    def create(self, path: Path) -> SpendLog:
        """Begin a book.

        Raises:
            JournalError: It cannot be created.
        """
        return SpendLog(path, get_current_run_id(self._run))

    def read_lease(self, lease: str) -> SpendState:
        """Read a lease's book.

        Raises:
            JournalError: It is damaged.
        """
        return read_spend_state(self.lease_path(lease), self._run)

    def read_sessions(self) -> dict[int, SpendState]:
        """Read the books of all lives.

        Raises:
            JournalError: One is damaged.
        """
        try:
            if self._folder.is_dir():
                check_renamed_files(self._folder, self._run)
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be listed: {error.strerror}") from error
        return {int(path.stem): read_spend_state(path, self._run) for path in self._session_paths()}

    def unreturned_leases(self, now: float | None = None) -> dict[str, Amount]:
        """Return, by name, what counts as spent of each lease that did not come back to its life.

        Args:
            now: Unix time in seconds.

        Raises:
            JournalError: A book is damaged.
        """
        pages = self.read_sessions()
        late = _collect_late(pages)
        return {
            name: late[name] if name in late else self.proven_spending(name, lease, now)
            for page in pages.values()
            for name, lease in page.leases.items()
        }

    def proven_spending(self, name: str, lease: Lease, now: float | None = None) -> Amount:
        """Return the most that was spent of a lease, as far as its own book tells.

        A worker that is taken for lost may go on until its time ends; only then its book is
        believed, or at once if it says that it has settled. A worker whose book is not seen here
        may have spent everything.

        Args:
            name: The lease's name.
            lease: What was lent.
            now: Unix time in seconds.

        Raises:
            JournalError: The lease's book is damaged.
        """
        path, now = self.lease_path(name), time.time() if now is None else now
        if not path.exists():
            never_begun = lease.has_log and now > lease.until + _SETTLE_S
            return Amount() if never_begun else lease.amount
        page = read_spend_state(path, self._run)
        if page.settled is not None:
            return page.settled.minimum(lease.amount)
        if now < page.until + _SETTLE_S:
            return lease.amount
        return Amount(**(lease.amount.to_json() | page.level)).minimum(lease.amount)

    def total_node_time(self) -> NodeTime:
        """Return how long nodes were held in all lives, as far as noted.

        Raises:
            JournalError: A book is damaged.
        """
        total = NodeTime()
        for page in self.read_sessions().values():
            total = total.plus(page.node_time)
        return total

    def total_spent(self, recorded: Mapping[int, Amount], now: float | None = None) -> Amount:
        """Return the most that all lives so far may have spent.

        Args:
            recorded: By life, what the journal says; it counts where no book does.
            now: Unix time in seconds.

        Raises:
            JournalError: A book is damaged.
        """
        pages, lent, total = self.read_sessions(), self.unreturned_leases(now), Amount()
        for life in pages.keys() | recorded.keys():
            journal = recorded.get(life, Amount())
            page = pages.get(life)
            total = total.plus(journal if page is None else _sum_session(page, journal, lent))
        return total

    def unaccounted(self, recorded: Mapping[int, Amount], now: float | None = None) -> Amount:
        """Return what may have been spent besides what the journal and the time of nodes tell.

        Args:
            recorded: By life, what the journal says.
            now: Unix time in seconds.

        Raises:
            JournalError: A book is damaged.
        """
        lent, total = self.unreturned_leases(now), Amount()
        for life, page in self.read_sessions().items():
            journal = recorded.get(life, Amount())
            known = journal.plus(page.node_time.amount)
            more = _sum_session(page, journal, lent).minus(known).maximum(Amount())
            if more.nano_usd <= journal.requests:  # each request's price is rounded up by itself
                more = more._replace(nano_usd=0)
            total = total.plus(more)
        return total


def _sum_session(page: SpendState, journal: Amount, lent: Mapping[str, Amount]) -> Amount:
    """Return the most that a life may have spent.

    Args:
        page: Its book.
        journal: What the journal says of it, for what no cap limits.
        lent: What counts as spent of each lease.
    """
    if page.settled is not None:
        total = page.settled.maximum(Amount(node_ms=page.node_time.node_ms))
        for name in page.leases:
            total = total.plus(lent[name])
        return total
    total = Amount(**(journal.plus(page.node_time.amount).to_json() | page.level))
    for name, lease in page.leases.items():
        saved = lease.amount.minus(lent[name]).to_json()
        total = total.minus(Amount(**{k: v for k, v in saved.items() if k in page.level}))
    return total


def _collect_late(pages: Mapping[int, SpendState]) -> dict[str, Amount]:
    """Return what was spent of leases that came back in a later life."""
    return {name: used for page in pages.values() for name, used in page.late_returns.items()}
