"""The chain: one JSON line for everything that happened to the jobs of a run.

Jobs write it one after another, and ``fanfold submit`` and ``cancel`` beside them; each line is
one append, so that no two of them mix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import LedgerError
from ..core.types import Json

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a chain.

    Attributes:
        id: The scheduler's name for it.
        nodes: Nodes that it has.
        walltime_s: Most seconds that it may take.
        submitted: When it was submitted, ISO 8601 in UTC.
        after: The job that it waits for, or None.
        began: When it began, or None.
        ended: When it ended, or None: it runs, waits, or was lost.
        code: Exit code of its run, or None.
        outcome: How it ended, in words, or None.
        before: Finished items at its begin, or None.
        done: Finished items at its end, or None.
        unserved: Whether it ended because none of its model servers was left.
        foreign: Whether it was submitted for the folder that this one was copied from.
    """

    id: str
    nodes: int
    walltime_s: int
    submitted: str
    after: str | None = None
    began: str | None = None
    ended: str | None = None
    code: int | None = None
    outcome: str | None = None
    before: int | None = None
    done: int | None = None
    unserved: bool = False
    foreign: bool = False

    @property
    def progress(self) -> int:
        """Return how many items it finished, as far as is known."""
        return (self.done or 0) - (self.before or 0) if self.done is not None else 0

    @property
    def wall_s(self) -> float:
        """Return the seconds from its begin to its end, 0 when one is not known.

        Of a lost job the next one tells, much later perhaps: then it is its walltime at most.
        """
        if self.began is None or self.ended is None:
            return 0.0
        return min(seconds_between(self.began, self.ended), float(self.walltime_s))


@dataclass(frozen=True, slots=True)
class Chain:
    """The jobs of a run.

    Attributes:
        jobs: All of them, in the order of submission.
        root: Position of the first job since somebody last submitted by hand.
        terms: What ``submit`` was told: site, nodes, limits of the chain.
        halted: Why no job follows, or None.
    """

    jobs: tuple[Job, ...] = ()
    root: int = 0
    terms: dict[str, Any] = field(default_factory=dict)
    halted: str | None = None

    @property
    def recent(self) -> tuple[Job, ...]:
        """Return the jobs since somebody last submitted by hand."""
        return self.jobs[self.root :]

    def job(self, name: str) -> Job | None:
        """Return a job by its id."""
        return next((job for job in reversed(self.jobs) if job.id == name), None)

    def successor(self, name: str) -> Job | None:
        """Return the job that waits for another one, if it has neither begun nor ended."""
        return next(
            (j for j in self.jobs if j.after == name and j.began is None and j.ended is None), None
        )

    def unfinished(self) -> tuple[Job, ...]:
        """Return the jobs of this folder of which no end was noted."""
        return tuple(job for job in self.jobs if job.ended is None and not job.foreign)


class ChainFile:
    """The file that tells a chain.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, event: str, **facts: Json) -> None:
        """Append one event with the present time.

        Raises:
            LedgerError: It cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own = {"folder": self._inode()} if event == "submitted" else {}
            record = {"v": VERSION, "at": now(), "event": event, **own, **facts}
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, self._mended(handle) + line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _inode(self) -> int:
        """Return the run folder's inode, which a renamed folder keeps and a copy does not have.

        The device is left out: nodes may know one network file system by several numbers.
        """
        return self.path.parent.parent.stat().st_ino

    @staticmethod
    def _mended(handle: int) -> bytes:
        """Return what must stand before a new line: a line break after a torn one."""
        size = os.fstat(handle).st_size
        return b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""

    def read(self) -> Chain:
        """Return what the file tells; an empty chain if there is none.

        Raises:
            LedgerError: It cannot be read, is damaged, or of another version.
        """
        try:
            lines, own = self.path.read_bytes().split(b"\n"), self._inode()
        except FileNotFoundError:
            return Chain()
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be read: {error.strerror}") from error
        return told(self._records(lines), own)

    def _records(self, lines: list[bytes]) -> Iterable[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = orjson.loads(line)
                version = record["v"]
            except (orjson.JSONDecodeError, TypeError, KeyError):
                continue  # torn: the machine stopped in the middle of it
            if version != VERSION:
                msg = f"{self.path}, line {number}: version {version!r}, not {VERSION}"
                raise LedgerError(msg)
            yield record


def chain_file(run: Path) -> ChainFile:
    """Return the file that tells the chain of a run folder."""
    return ChainFile(run / "cluster" / "chain.jsonl")


def told(records: Iterable[Mapping[str, Any]], own: int | None = None) -> Chain:
    """Return the chain that events tell, in their order.

    Args:
        records: The events.
        own: The run folder's inode; jobs that were submitted for another one are foreign.
    """
    chain = Chain()
    for record in records:
        chain = _after(chain, record, own)
    return chain


def _after(chain: Chain, record: Mapping[str, Any], own: int | None) -> Chain:
    event, name = record["event"], str(record.get("job"))
    if event == "submitted":
        foreign = own is not None and record.get("folder", own) != own
        job = Job(
            name,
            record["nodes"],
            record["walltime_s"],
            record["at"],
            record["after"],
            foreign=foreign,
        )
        if not record["by_hand"]:
            return replace(chain, jobs=(*chain.jobs, job))
        terms, root = record["terms"], len(chain.jobs)
        return Chain((*chain.jobs, job), root, terms)
    if event == "halted":
        return replace(chain, halted=record["why"])
    changes: dict[str, Any] = {}
    if event == "began":
        changes = {"began": record["at"], "before": record["finished"]}
    elif event in ("ended", "lost", "withdrawn"):
        changes = {"ended": record["at"], "outcome": record["outcome"]}
        changes |= {"code": record.get("code"), "done": record.get("finished")}
        changes |= {"unserved": record.get("unserved", False)}
    jobs = tuple(replace(job, **changes) if job.id == name else job for job in chain.jobs)
    return replace(chain, jobs=jobs)


def now() -> str:
    """Return the present time as ISO 8601 text in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_between(begin: str, end: str) -> float:
    """Return the seconds from one ISO 8601 time to another."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
