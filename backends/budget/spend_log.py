"""Spend log: an upper bound of a session's spending, written to disk before anything is spent.

There is one file per session and per lease; each line is a JSON object. ``level`` is an upper
bound of what the session spends until a later line changes it. A higher level is written to disk
before anything is spent on it; the level may be lowered at any time. ``open`` is the most that the
calls of items without a record may have cost: those in flight, and at the end those of items that
were cut off. ``held`` is the node time so
far. ``lease`` records what was lent to a worker, ``back`` that the lease was returned, and
``settled`` the final spending of the session. A session that was killed has no ``settled`` line:
its level counts as spent, minus what the spend logs of its leases prove unspent. The spend log of
a session without limits contains ``held`` and ``open`` lines only. A worker that shares the run
folder has a spend log of its own, with ``open`` lines only (``0002-node17-4242-abcdef.jsonl``).
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
from ..storage.journal_file import (
    JournalSource,
    RunIds,
    check_renamed_files,
    get_current_run_id,
    make_header,
    make_worker_path,
    parse_session_number,
    scan_lines,
)
from ..storage.run_folder import RunFolder, get_run_ids

HEADER_KIND: Final = "budget"
"""Kind of file that the header of a spend log names."""

Level = Mapping[str, int]
"""A bound for each limited field of an :class:`Amount`."""

CLOCK_SKEW_S: Final = 600.0
"""Most seconds by which the clocks of two hosts differ, where only their times can be compared."""

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def read_lease_clock() -> float:
    """Return seconds of this host's monotonic clock, the time while it was suspended included.

    Linux has such a clock; ``time.monotonic`` stands still while a laptop sleeps. On macOS
    CLOCK_MONOTONIC goes on.
    """
    return time.clock_gettime(_CLOCK)


class SpendLog:
    """Write one spend log; every method blocks.

    Args:
        path: The file to create; it must not exist.
        run: The run's id.

    Raises:
        JournalError: The file cannot be created.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._crc, self._size = path, 0, 0
        self._failure: JournalError | None = None
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
        """Make the names of file and folder durable: spending relies on what the file allows."""
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
            line: Content of the line.
            sync: Return only when the line is on disk.

        Raises:
            JournalError: The line cannot be written.
        """
        self._append(orjson.dumps(line), sync=sync)

    def _append(self, data: bytes, *, sync: bool) -> None:
        if self._failure is not None:
            raise self._failure
        line, crc = add_crc(data, self._crc)
        try:
            self._write(line)
            self._crc, self._size = crc, self._size + len(line)
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            msg = f"{self._path}: the spend log cannot be written: {error.strerror}"
            raise JournalError(msg) from error

    def _write(self, line: bytes) -> None:
        """Write a whole line or nothing: after a part of one, no reader could go on."""
        rest = line
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if rest != line:
                self._remove_part(error)
            raise

    def _remove_part(self, error: OSError) -> None:
        try:
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except OSError:
            self._failure = JournalError(
                f"{self._path}: the spend log cannot be written: {error.strerror}"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Lease:
    """Budget lent to a worker.

    Attributes:
        amount: Amount lent.
        until: Unix time in seconds after which the worker starts nothing on this lease.
        has_log: Whether the worker writes a spend log that this process can read.
    """

    amount: Amount
    until: float
    has_log: bool = False


@dataclass(slots=True)
class SpendState:
    """Contents of a spend log.

    Attributes:
        level: Last bound, by field.
        settled: Final spending without leases; None if the session was killed or still runs.
        node_time: Node time recorded so far.
        open_calls: The most that calls of items without a record may have cost; of a session, those
            of its workers included.
        leases: Leases that have not been returned.
        until: (log of a lease) Unix time in seconds, by the holder's clock, after which nothing
            more is spent.
        term: (log of a lease) Seconds from its receipt until then.
        late_returns: Leases of earlier sessions returned in this one, with what each spent.
        part: (session of a pipeline) Key of the run that it worked on.
    """

    level: dict[str, int] = field(default_factory=dict)
    settled: Amount | None = None
    node_time: NodeTime = field(default_factory=NodeTime)
    open_calls: Amount = field(default_factory=Amount)
    leases: dict[str, Lease] = field(default_factory=dict)
    until: float = float("inf")
    term: float = 0.0
    late_returns: dict[str, Amount] = field(default_factory=dict)
    part: str = ""


def read_spend_state(path: Path, run: RunIds, *, live: bool = False) -> SpendState:
    """Read a spend log.

    Args:
        path: The spend log.
        run: The run's ids.
        live: Whether a process may be writing it: what has not arrived whole is no damage.

    Raises:
        JournalError: The file is damaged or belongs to another run.
    """
    state, source = SpendState(), JournalSource(path, run, HEADER_KIND)
    for line in scan_lines(source, live=live):
        try:
            _apply(state, line.record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"not a line of a spend log ({error!r})"
            raise source.make_error(line.number, msg) from None
    return state


def _apply(state: SpendState, record: dict[str, Any]) -> None:
    if "part" in record:
        state.part = str(record["part"])
    if "level" in record:
        level = Amount.from_json(record["level"])
        state.level = {name: getattr(level, name) for name in record["level"]}
    if "lease" in record:
        amount = Amount.from_json(record["amount"])
        until, booked = _time(record["until"]), record["booked"]
        if type(booked) is not bool:
            raise TypeError(f"booked is {booked!r}")
        state.leases[record["lease"]] = Lease(amount, until, booked)
    elif "until" in record:
        state.until, state.term = _time(record["until"]), _time(record.get("term", 0))
    if "back" in record:
        state.leases.pop(record["back"], None)
    if "late" in record:
        state.late_returns[record["late"]] = Amount.from_json(record["used"])
    if "settled" in record:
        state.settled = Amount.from_json(record["settled"])
    if "open" in record:
        state.open_calls = Amount.from_json(record["open"])
    if "held" in record:
        state.node_time = NodeTime.from_json(record["held"])


def _time(value: Any) -> float:
    """Return a Unix time in seconds.

    Raises:
        ValueError: The value is not a time.
    """
    if type(value) not in (int, float) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"until is {value!r}, not a time in seconds since 1970")
    return float(value)


class SpendLogs:
    """Spend logs of a run.

    The runs of a pipeline share one folder, and each session has a number of its own in it.

    Args:
        folder: Folder of the spend logs.
        run: The run's ids; new spend logs carry the current one.
        part: (pipeline) Key of one run: reports count its sessions only; empty: all sessions.
        live: Whether another process may be writing: what has not arrived whole is no damage.
    """

    def __init__(self, folder: Path, run: RunIds, part: str = "", *, live: bool = False) -> None:
        self._folder, self._run, self._part, self._live = folder, run, part, live

    def _read(self, path: Path) -> SpendState:
        return read_spend_state(path, self._run, live=self._live)

    @property
    def part(self) -> str:
        """Return the key of the run in its pipeline, or an empty text."""
        return self._part

    def of_part(self, part: str) -> SpendLogs:
        """Return the same spend logs, whose reports count the sessions of another run."""
        return SpendLogs(self._folder, self._run, part, live=self._live)

    def session_path(self, session: int) -> Path:
        """Return the path of a session's spend log."""
        return self._folder / f"{session:04}.jsonl"

    def next_session(self) -> int:
        """Return the number of the first session without a spend log, from 1."""
        return 1 + max((int(p.stem) for p in self._session_paths()), default=0)

    def worker_path(self, session: int, worker: str) -> Path:
        """Return the path of a new spend log for the open calls of a worker in one session."""
        return make_worker_path(self._folder, session, worker)

    def _worker_paths(self) -> list[Path]:
        return [path for path in sorted(self._folder.glob("*.jsonl")) if _is_of_worker(path)]

    def _session_paths(self) -> list[Path]:
        """Return the spend logs of sessions.

        Raises:
            JournalError: The folder contains a file that is not a spend log.
        """
        found = sorted(self._folder.glob("*.jsonl"))
        sessions = [path for path in found if path.stem.isascii() and path.stem.isdigit()]
        for path in found:
            if not (path.stem.startswith("lease-") or path in sessions or _is_of_worker(path)):
                msg = f"{path}, line 1: not a spend log of fanfold; move it out of the run folder"
                raise JournalError(msg)
        return sessions

    def lease_path(self, lease: str) -> Path:
        """Return the path of a lease's spend log, which the holder of the lease writes."""
        return self._folder / f"lease-{lease}.jsonl"

    def create(self, path: Path) -> SpendLog:
        """Create a spend log.

        Raises:
            JournalError: The file cannot be created.
        """
        log = SpendLog(path, get_current_run_id(self._run))
        if self._part:
            log.write({"part": self._part}, sync=False)
        return log

    def read_lease(self, lease: str) -> SpendState:
        """Read a lease's spend log.

        Raises:
            JournalError: The spend log is damaged.
        """
        return self._read(self.lease_path(lease))

    def read_sessions(self) -> dict[int, SpendState]:
        """Read the spend logs of all sessions.

        Raises:
            JournalError: A spend log is damaged.
        """
        try:
            if self._folder.is_dir():
                check_renamed_files(self._folder, self._run)
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be listed: {error.strerror}") from error
        states = {int(path.stem): self._read(path) for path in self._session_paths()}
        for path in self._worker_paths():
            state = states.setdefault(parse_session_number(path), SpendState())
            found = self._read(path).open_calls
            state.open_calls = state.open_calls.plus(found)
        return states

    def read_own_sessions(self) -> dict[int, SpendState]:
        """Read the spend logs of the sessions of the run, without those of other runs.

        Raises:
            JournalError: A spend log is damaged.
        """
        states = self.read_sessions()
        if not self._part:
            return states
        return {number: state for number, state in states.items() if state.part == self._part}

    def unreturned_leases(
        self, now: float | None = None, *, own: bool = False
    ) -> dict[str, Amount]:
        """Return, by name, what counts as spent of each lease not returned to its session.

        Args:
            now: Unix time in seconds.
            own: Leave out leases of the pipeline's other runs.

        Raises:
            JournalError: A spend log is damaged.
        """
        states = self.read_sessions()
        late = _collect_late(states)
        return {
            name: late[name] if name in late else self.proven_spending(name, lease, now)
            for state in states.values()
            if not own or state.part == self._part
            for name, lease in state.leases.items()
        }

    def proven_spending(self, name: str, lease: Lease, now: float | None = None) -> Amount:
        """Return the most that was spent of a lease, as far as its own spend log proves.

        A worker marked as lost may continue until its term ends. Its spend log is therefore
        trusted only after twice the term, or at once if it is settled. The times are those of
        several clocks, which may differ by minutes. A worker whose spend log cannot be read here
        may have spent everything.

        Args:
            name: The lease's name.
            lease: The lease.
            now: Unix time in seconds.

        Raises:
            JournalError: The lease's spend log is damaged.
        """
        path, now = self.lease_path(name), time.time() if now is None else now
        if not path.exists():
            never_begun = lease.has_log and now > lease.until + 2 * CLOCK_SKEW_S
            return Amount() if never_begun else lease.amount
        state = self._read(path)
        if state.settled is not None:
            return state.settled.minimum(lease.amount)
        if now < state.until + state.term + CLOCK_SKEW_S:
            return lease.amount
        return _sum_level(state, lease)

    def recover(self, name: str, lease: Lease, waited_s: float) -> Amount | None:
        """Return the most that the lost holder of a lease has spent; None while it may spend more.

        No clock of another host is read. A lease that was not received gets a settled spend log
        here: a worker that receives it later finds the log and may spend nothing.

        Args:
            name: The lease's name.
            lease: The lease; its holder writes a spend log.
            waited_s: Seconds since a call of this method first found the holder's spend log.

        Raises:
            JournalError: The lease's spend log is damaged or cannot be written.
        """
        if (log := self.create_lease_log(name)) is not None:
            try:
                log.write({"settled": Amount().to_json()}, sync=True)
            finally:
                log.close()
            return Amount()
        state = self.read_lease(name)
        if state.settled is not None:
            return state.settled.minimum(lease.amount)
        if state.until == float("inf") or waited_s < 2 * state.term:
            return None
        return _sum_level(state, lease)

    def create_lease_log(self, name: str) -> SpendLog | None:
        """Create the spend log of a lease; return None if it exists.

        Raises:
            JournalError: The file cannot be created.
        """
        path = self.lease_path(name)
        try:
            return self.create(path)
        except JournalError:
            if path.exists():
                return None
            raise

    def total_node_time(self) -> NodeTime:
        """Return the node time recorded in all sessions.

        Raises:
            JournalError: A spend log is damaged.
        """
        total = NodeTime()
        for state in self.read_own_sessions().values():
            total = total.plus(state.node_time)
        return total

    def total_spent(
        self, recorded: Mapping[int, Amount], now: float | None = None, *, own: bool = False
    ) -> Amount:
        """Return the most that all sessions so far may have spent.

        Args:
            recorded: Journal totals by session; used where there is no spend log.
            now: Unix time in seconds.
            own: Leave out the pipeline's other runs.

        Raises:
            JournalError: A spend log is damaged.
        """
        every = self.read_sessions()
        states = self.read_own_sessions() if own else every
        others = every.keys() - states.keys()
        lent, total = self.unreturned_leases(now), Amount()
        for session in (states.keys() | recorded.keys()) - others:
            journal = recorded.get(session, Amount())
            state = states.get(session)
            total = total.plus(journal if state is None else _sum_session(state, journal, lent))
        return total

    def unaccounted(self, recorded: Mapping[int, Amount], now: float | None = None) -> Amount:
        """Return what may have been spent beyond the journal's totals and the node time.

        Args:
            recorded: Journal totals by session.
            now: Unix time in seconds.

        Raises:
            JournalError: A spend log is damaged.
        """
        lent, total = self.unreturned_leases(now), Amount()
        for session, state in self.read_own_sessions().items():
            journal = recorded.get(session, Amount())
            known = journal.plus(state.node_time.amount)
            more = _sum_session(state, journal, lent).minus(known).maximum(Amount())
            if more.nano_usd <= journal.requests:  # the price of each request is rounded up
                more = more._replace(nano_usd=0)
            total = total.plus(more)
        return total


def open_spend_logs(folder: RunFolder, run: RunIds, *, is_working: bool = True) -> SpendLogs:
    """Return the spend logs of a run: its own, or those of the pipeline that it is a part of.

    Args:
        folder: The run's folder.
        run: The run's ids.
        is_working: Whether this process works on the run, rather than only reads it while another
            one may be writing.

    Raises:
        JournalError: The provenance of the pipeline cannot be read.
    """
    place = folder.read_place()
    root = folder if place is None else RunFolder(place.root)
    live = not is_working and root.is_in_use()
    if place is None:
        return SpendLogs(folder.budget, run, live=live)
    return SpendLogs(folder.budget, get_run_ids(root.read_provenance()), place.key, live=live)


def _is_of_worker(path: Path) -> bool:
    """Return True if a worker wrote a spend log, by its name: ``0002-node17-4242-abcdef``."""
    session, dash, _ = path.stem.partition("-")
    return bool(dash) and session.isascii() and session.isdigit()


def _sum_level(state: SpendState, lease: Lease) -> Amount:
    """Return the most that the holder of a lease has spent by its last level."""
    return Amount(**(lease.amount.to_json() | state.level)).minimum(lease.amount)


def _sum_session(state: SpendState, journal: Amount, lent: Mapping[str, Amount]) -> Amount:
    """Return the most that a session may have spent.

    Args:
        state: Its spend log.
        journal: Journal totals of the session; with its open calls, for fields without a limit.
        lent: What counts as spent of each lease.
    """
    if state.settled is not None:
        total = state.settled.maximum(Amount(node_ms=state.node_time.node_ms))
        for name in state.leases:
            total = total.plus(lent[name])
        return total
    known = journal.plus(state.node_time.amount).plus(state.open_calls)
    total = Amount(**(known.to_json() | state.level))
    for name, lease in state.leases.items():
        saved = lease.amount.minus(lent[name]).to_json()
        total = total.minus(Amount(**{k: v for k, v in saved.items() if k in state.level}))
    return total


def _collect_late(states: Mapping[int, SpendState]) -> dict[str, Amount]:
    """Return what was spent of leases that were returned in a later session."""
    return {name: used for state in states.values() for name, used in state.late_returns.items()}
