"""Job chain: event log, decision about the next job, node-hours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from ..core.errors import EXIT_BUDGET, EXIT_DONE, EXIT_FAILURES, EXIT_USAGE, JournalError
from ..core.terminal import count_nouns
from ..core.types import Json

if TYPE_CHECKING:
    from .schedulers import JobState, SchedulerUsage

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a chain.

    Attributes:
        id: The scheduler's id.
        nodes: Number of nodes.
        walltime_s: Most seconds that it may take.
        submitted: When it was submitted, ISO 8601 in UTC.
        after: The job that it waits for, or None.
        began: When it began, or None.
        ended: When it ended, or None if it runs, waits, or was lost.
        code: Exit code of its run, or None.
        outcome: How it ended, as text, or None.
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
    def finished_items(self) -> int:
        """Return how many items it finished, as far as known."""
        return (self.done or 0) - (self.before or 0) if self.done is not None else 0

    @property
    def wall_s(self) -> float:
        """Return the seconds from its begin to its end, 0 if one is not known.

        The end of a lost job is recorded by the next one, perhaps much later: it counts for its
        walltime at most.
        """
        if self.began is None or self.ended is None:
            return 0.0
        return min(seconds_between(self.began, self.ended), float(self.walltime_s))


@dataclass(frozen=True, slots=True)
class JobChain:
    """The jobs of a run.

    Attributes:
        jobs: All jobs, in the order of submission.
        root: Position of the first job since the last submission by a user.
        options: Options of ``submit``: site, nodes, limits of the chain.
        halt_reason: Why no job follows, or None.
    """

    jobs: tuple[Job, ...] = ()
    root: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    halt_reason: str | None = None

    @property
    def recent(self) -> tuple[Job, ...]:
        """Return the jobs since the last submission by a user."""
        return self.jobs[self.root :]

    def find_job(self, name: str) -> Job | None:
        """Return a job by its id."""
        return next((job for job in reversed(self.jobs) if job.id == name), None)

    def find_successor(self, name: str) -> Job | None:
        """Return the job that waits for another one, if it has neither begun nor ended."""
        return next(
            (j for j in self.jobs if j.after == name and j.began is None and j.ended is None), None
        )

    def unfinished_jobs(self) -> tuple[Job, ...]:
        """Return the jobs of this folder without a recorded end."""
        return tuple(job for job in self.jobs if job.ended is None and not job.foreign)


class ChainFile:
    """The event log of a job chain.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Json) -> None:
        """Append one event with the current time.

        Raises:
            JournalError: It cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own = {"folder": self._inode()} if event == "submitted" else {}
            record = {"v": VERSION, "at": utc_now(), "event": event, **own, **facts}
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, self._line_break(handle) + line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _inode(self) -> int:
        """Return the run folder's inode, which a renamed folder keeps and a copy does not have.

        The device is left out: nodes may see one network file system under several numbers.
        """
        return self.path.parent.parent.stat().st_ino

    @staticmethod
    def _line_break(handle: int) -> bytes:
        """Return a line break if the last line is cut off, else nothing."""
        size = os.fstat(handle).st_size
        return b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""

    def read(self) -> JobChain:
        """Return the chain from the file; an empty chain if there is none.

        Raises:
            JournalError: It cannot be read, is damaged, or has another version.
        """
        try:
            lines, own = self.path.read_bytes().split(b"\n"), self._inode()
        except FileNotFoundError:
            return JobChain()
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror}") from error
        return replay_events(self._records(lines), own)

    def _records(self, lines: list[bytes]) -> Iterable[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = orjson.loads(line)
                version = record["v"]
            except (orjson.JSONDecodeError, TypeError, KeyError):
                continue  # cut off: the machine stopped during the write
            if version != VERSION:
                msg = f"{self.path}, line {number}: version {version!r}, not {VERSION}"
                raise JournalError(msg)
            yield record


def chain_file(run: Path) -> ChainFile:
    """Return the event log of a run folder's chain."""
    return ChainFile(run / "cluster" / "chain.jsonl")


def replay_events(records: Iterable[Mapping[str, Any]], own: int | None = None) -> JobChain:
    """Return the chain that results from events, in their order.

    Args:
        records: The events.
        own: The run folder's inode; jobs submitted for another folder are foreign.
    """
    chain = JobChain()
    for record in records:
        chain = _apply_event(chain, record, own)
    return chain


def _apply_event(chain: JobChain, record: Mapping[str, Any], own: int | None) -> JobChain:
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
        options, root = record["terms"], len(chain.jobs)
        return JobChain((*chain.jobs, job), root, options)
    if event == "halted":
        return replace(chain, halt_reason=record["why"])
    changes: dict[str, Any] = {}
    if event == "began":
        changes = {"began": record["at"], "before": record["finished"]}
    elif event in ("ended", "lost", "withdrawn"):
        changes = {"ended": record["at"], "outcome": record["outcome"]}
        changes |= {"code": record.get("code"), "done": record.get("finished")}
        changes |= {"unserved": record.get("unserved", False)}
    jobs = tuple(replace(job, **changes) if job.id == name else job for job in chain.jobs)
    return replace(chain, jobs=jobs)


def utc_now() -> str:
    """Return the current time as ISO 8601 text in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_between(begin: str, end: str) -> float:
    """Return the seconds from one ISO 8601 time to another."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


@dataclass(frozen=True, slots=True)
class JobUsage:
    """What one job used; so far, if it has not ended.

    Attributes:
        job: The job.
        nodes: Its nodes; the average if it lost some.
        begin: When fanfold began in it, in seconds since 1970.
        end: End of the time that is counted from there.
        overhead_s: Further seconds in the scheduler's accounts, before fanfold began and after its
            end.
        by_scheduler: Whether the scheduler's accounts are used; else the chain's own times.
    """

    job: Job
    nodes: float
    begin: float
    end: float
    overhead_s: float
    by_scheduler: bool

    @property
    def node_s(self) -> float:
        """Return the node-seconds."""
        return self.nodes * (self.end - self.begin + self.overhead_s)


def list_job_usage(
    chain: JobChain,
    used: Mapping[str, SchedulerUsage],
    states: Mapping[str, JobState],
    now: float,
    last_alive: float | None = None,
) -> list[JobUsage]:
    """Return what each job that has begun used.

    A job that has not ended counts until now if it runs; otherwise it was lost or its state is
    unknown, and it counts until the last heartbeat. Without a heartbeat it is left out. So is a job
    that had not ended when the folder was copied from another run, to which it belongs.

    Args:
        chain: The chain.
        used: The scheduler's accounts, by job, as far as available.
        states: The scheduler's states of jobs that have not ended.
        now: The current time, in seconds since 1970.
        last_alive: Time of the run's last heartbeat.
    """
    found = []
    for job in chain.jobs:
        if job.began is None or (job.foreign and job.ended is None):
            continue
        begin, end = _seconds(job.began), _end(job, states.get(job.id), now, last_alive)
        own, wall = used.get(job.id), None
        if end is not None:
            wall = min(max(0.0, end - begin), float(job.walltime_s))
        if own is not None and own.wall_s > 0:
            inside = own.wall_s if wall is None else min(wall, own.wall_s)
            before = own.wall_s - inside
            nodes = own.node_s / own.wall_s
            found.append(JobUsage(job, nodes, begin, begin + inside, before, by_scheduler=True))
        elif wall is not None:
            found.append(JobUsage(job, job.nodes, begin, begin + wall, 0.0, by_scheduler=False))
    return found


def _end(job: Job, state: JobState | None, now: float, last_alive: float | None) -> float | None:
    if job.ended is not None:
        return _seconds(job.ended)
    return now if state == "running" else last_alive


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


EXIT_NOTHING_TO_DO: Final = 10
"""Exit code of ``chain begin``: this job has nothing to do, and none follows."""

MAX_IDLE_JOBS: Final = 2
"""A chain ends after this many jobs in a row that finish no item or lose all their servers."""


@dataclass(frozen=True, slots=True)
class NextJob:
    """Whether a chain continues.

    Attributes:
        is_due: Whether another job follows.
        reason: The reason, as a message.
    """

    is_due: bool
    reason: str


def next_job(chain: JobChain, open_items: int) -> NextJob:
    """Decide whether another job should follow the jobs so far.

    Args:
        chain: The chain; the last job that began has ended or is about to.
        open_items: Items that are not finished.
    """
    if chain.halt_reason is not None:
        return NextJob(False, chain.halt_reason)
    if open_items == 0:
        return NextJob(False, "all items are finished")
    last = _last(chain)
    if last is not None and (why := _final(last)) is not None:
        return NextJob(False, why)
    if (idle := _count_idle_jobs(chain)) >= MAX_IDLE_JOBS:
        lost = " or lost all their model servers" if last is not None and last.unserved else ""
        return NextJob(
            False,
            f"{idle} jobs in a row finished no item{lost}; see the logs beside the chain's file, "
            "fix the cause, then submit the run folder again",
        )
    if (why := _limit_reached(chain)) is not None:
        return NextJob(False, why)
    return NextJob(True, f"{count_nouns(open_items, 'item')} left")


def _last(chain: JobChain) -> Job | None:
    return next((job for job in reversed(chain.recent) if job.began is not None), None)


def _final(job: Job) -> str | None:
    """Return why a job's exit code ends the chain, or None."""
    if job.code in (EXIT_DONE, EXIT_FAILURES):
        return "the run is finished"
    if job.code == EXIT_USAGE:
        return f"job {job.id} ended with a wrong setting (exit code 2); see its log"
    if job.code == EXIT_BUDGET:
        return "the run's budget is spent (exit code 4)"
    return None


def _count_idle_jobs(chain: JobChain) -> int:
    """Return how many of the last jobs in a row finished no item or lost their servers.

    Servers that are given up repeatedly cost a job each; a few items do not make up for it.
    """
    count = 0
    for job in reversed(chain.recent):
        if job.began is None or job.ended is None:
            continue
        if job.finished_items > 0 and not job.unserved:
            break
        count += 1
    return count


def _limit_reached(chain: JobChain) -> str | None:
    """Return which limit of the chain is reached, or None."""
    most, hours = chain.options.get("jobs"), chain.options.get("node_hours")
    begun = [job for job in chain.recent if job.began is not None]
    if most is not None and len(begun) >= most:
        return f"the chain has reached its limit of {count_nouns(most, 'job')} (--jobs)"
    if hours is None or not begun:
        return None
    used = sum(job.nodes * job.wall_s for job in begun) / 3600
    due = chain.recent[-1].nodes * chain.recent[-1].walltime_s / 3600
    if used + due > hours:
        return (
            f"{used:.2f} of {hours:g} node-hours are used (--node-hours), and one more job may "
            f"take {due:.2f}"
        )
    return None
