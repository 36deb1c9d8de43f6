"""Heartbeat and stop files in the journal folder, for the coordinator and the workers."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from ...backends.cluster.walltime import Walltime, walltime
from ...backends.core.errors import JournalError
from ...backends.core.messages import DUPLICATE_REASON, WALLTIME_REASON, ShardTask
from ...backends.core.timeline import TimelineDelta
from ...backends.fleet.timeline import TimelineRecorder
from ...backends.workers.member import Heartbeat
from ...configs.models import LimitsConfig

logger = logging.getLogger(__name__)

_OPEN: Final = "task-"
_STOP: Final = "stop-"
_BEAT: Final = "heartbeat-"
_RATES: Final = "rates-"
_STATES: Final = "states-"
_STOPPED_MODEL: Final = "standby-"
_BEGUN: Final = "begun "
MISSED_POLLS: Final = 4
"""Consecutive polls, at least, that must miss a heartbeat before a worker counts as lost."""


def stop_file(journal: Path, token: str) -> Path:
    """Return the file that stops the workers of one session."""
    return journal / f"{_STOP}{token}"


def heartbeat_file(journal: Path, token: str, shard: str, attempt: int) -> Path:
    """Return the file that a worker touches while it processes a task, and that permits it to."""
    return journal / f"{_BEAT}{token}-{shard}-{attempt}"


def rates_file(journal: Path, token: str) -> Path:
    """Return the file with the shares of the rate limits of one session's workers."""
    return journal / f"{_RATES}{token}"


def states_file(journal: Path, token: str) -> Path:
    """Return the file with the states of a gateway's deployments, for one session's workers."""
    return journal / f"{_STATES}{token}"


def stopped_model_file(journal: Path, token: str, path: str) -> Path:
    """Return the file by which a worker says that a model does not run at ``cluster/framework``."""
    return journal / f"{_STOPPED_MODEL}{token}-{path.replace('/', '+')}"


def stop_earlier_workers(journal: Path) -> None:
    """Stop the workers of earlier sessions and remove their files; blocks.

    Args:
        journal: The run's journal folder.
    """
    for file in journal.glob(f"{_BEAT}*"):
        file.unlink(missing_ok=True)
    for file in journal.glob(f"{_OPEN}*"):
        _rename(file, stop_file(journal, file.name.removeprefix(_OPEN)))
    for kind in (_RATES, _STATES, _STOPPED_MODEL):
        for file in journal.glob(f"{kind}*"):
            file.unlink(missing_ok=True)


class ControlFiles:
    """The control files of one session.

    While a session runs, ``task-TOKEN`` exists. Renamed to ``stop-TOKEN``, it stops the workers. A
    killed session leaves it behind, and the next session renames it: tasks that are still in an
    engine's queue then end before they send a request. Each task has its own file, created before
    the task is sent: its worker marks it as begun, touches it periodically, and stops once it is
    gone.

    Args:
        journal: The journal folder, or None if workers do not share it.
        token: Identifies this session.
        silence_s: Seconds of silence after which a worker counts as lost.
    """

    def __init__(self, journal: Path | None, token: str, silence_s: float) -> None:
        self._journal, self._token = journal, token
        self._watched = dict[Path, _FileState]()
        self._reports = deque[TimelineReport]()
        self._reading, self._damaged = threading.Lock(), False
        self._most_s, self._polled_at = silence_s / MISSED_POLLS, time.monotonic()
        self._unreadable = False

    def open_session(self) -> None:
        """Open this session; blocks."""
        if self._journal is not None:
            self._open(self._journal).touch()

    def stop_workers(self) -> None:
        """Stop the workers of this session; blocks."""
        if self._journal is not None:
            _rename(self._open(self._journal), stop_file(self._journal, self._token))

    def close_session(self, in_flight: bool) -> None:
        """Close this session and stop tasks that are still in flight; blocks."""
        if self._journal is None:
            return
        if in_flight:
            self.stop_workers()
        self._open(self._journal).unlink(missing_ok=True)
        for file in self._journal.glob(f"{_BEAT}{self._token}-*"):
            file.unlink(missing_ok=True)

    def task_file(self, shard: str, attempt: int) -> Path | None:
        """Return the file of a task; None if workers do not share the folder."""
        if self._journal is None:
            return None
        return heartbeat_file(self._journal, self._token, shard, attempt)

    def create(self, file: Path) -> Heartbeat:
        """Create a task's file, not touched by any worker yet, and begin to poll it; blocks.

        Returns:
            A function for the seconds since the file last changed, as of the last poll.

        Raises:
            JournalError: The file cannot be created.
        """
        try:
            file.touch()
            seen = self._watched[file] = _FileState(file.stat().st_mtime_ns)
        except OSError as error:
            msg = f"{file}: cannot be created: {error.strerror}; fix the folder, then resume"
            raise JournalError(msg) from error
        return lambda: seen.silent_s

    def revoke(self, file: Path) -> None:
        """Revoke a task: its worker stops if it still runs. Blocks."""
        if (seen := self._watched.pop(file, None)) is not None:
            self._read_reports(file, seen)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:  # its worker then finishes items that others finish too
            logger.warning("%s: cannot be removed: %s", file, error.strerror)

    def poll(self) -> None:
        """Poll all watched files; blocks.

        Time without a poll, or while the file system does not answer, does not count as a worker's
        silence: one poll adds at most a part of the threshold.
        """
        passed, failed = min(time.monotonic() - self._polled_at, self._most_s), list[str]()
        for file, seen in list(self._watched.items()):
            try:
                stamp = file.stat().st_mtime_ns
            except FileNotFoundError:
                seen.update(None, passed)
            except OSError as error:
                failed.append(f"{file}: cannot be read: {error.strerror}")
            else:
                if seen.update(stamp, passed):
                    self._read_reports(file, seen)
        self._polled_at = time.monotonic()
        if failed and not self._unreadable:  # one warning, because thousands of files may be polled
            text = "%s (%d such files); still waiting for their workers"
            logger.warning(text, failed[0], len(failed))
        self._unreadable = bool(failed)

    @property
    def workers(self) -> set[str]:
        """Return the names of the workers that process a task, as of the last poll."""
        return {seen.worker for seen in list(self._watched.values()) if seen.worker}

    def take_reports(self) -> list[TimelineReport]:
        """Return what workers have reported for the timeline since the last call."""
        reports = list[TimelineReport]()
        while self._reports:  # other threads may add to them
            reports.append(self._reports.popleft())
        return reports

    def _read_reports(self, file: Path, seen: _FileState) -> None:
        """Read what a worker has written to the file of its task since the last time."""
        with self._reading:
            for line in seen.read_lines(file):
                if line.startswith(_BEGUN.encode()):
                    name = line.decode(errors="replace")
                    seen.worker = seen.worker or name.removeprefix(_BEGUN).strip() or None
                    continue
                try:
                    delta = TimelineDelta.from_json(orjson.loads(line))
                except ValueError as error:
                    if not self._damaged:  # one warning, because it is of no harm
                        text = "%s: a report for the timeline cannot be read (%s); it is left out"
                        logger.warning(text, file, error)
                    self._damaged = True
                    continue
                report = TimelineReport(delta, seen.worker or "", seen.sent_at, time.time())
                self._reports.append(report)

    def _open(self, journal: Path) -> Path:
        return journal / f"{_OPEN}{self._token}"


def _rename(file: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # it was renamed before
        file.rename(target)


class _FileState:
    """Time since a file last changed, by the local clock, because the clocks of nodes may differ.

    Args:
        mtime_ns: Time of its creation, in ns since 1970.

    Attributes:
        silent_s: Seconds since the last observed change; None before a worker has touched it.
        worker: Name of the worker that began the task, once it is known.
        sent_at: When it was created, in seconds since 1970.
    """

    def __init__(self, mtime_ns: int) -> None:
        self._mtime_ns = mtime_ns
        self.silent_s: float | None = None
        self.worker: str | None = None
        self.sent_at = time.time()
        self._offset = 0

    def update(self, stamp: int | None, passed_s: float) -> bool:
        """Count the time since the last poll; return True if the file has changed since."""
        if stamp is not None and stamp != self._mtime_ns:
            self._mtime_ns, self.silent_s = stamp, 0.0
            return True
        if self.silent_s is not None:
            self.silent_s += passed_s
        return False

    def read_lines(self, file: Path) -> list[bytes]:
        """Return the whole lines that were added since the last call; none if it cannot be read."""
        try:
            with file.open("rb") as opened:
                opened.seek(self._offset)
                data = opened.read(_MOST_READ)
        except OSError:  # a later poll, or the result of the task, tells what happened
            return []
        whole, _, _ = data.rpartition(b"\n")
        if len(data) == _MOST_READ and not whole:
            whole = data  # no report is so long: skip it
        self._offset += len(whole) + 1 if whole else 0
        return [line for line in whole.split(b"\n") if line]


@dataclass(frozen=True, slots=True)
class TimelineReport:
    """What a worker reports for the timeline.

    Attributes:
        delta: What its endpoints did, with times by the worker's clock.
        worker: Name of the worker.
        sent_at: When its task was sent, in seconds since 1970; None if an earlier session did.
        arrived_at: When the report arrived, in seconds since 1970.
    """

    delta: TimelineDelta
    worker: str
    sent_at: float | None
    arrived_at: float


STOPPED: Final = "the coordinator stopped the run"
REVOKED: Final = "the coordinator revoked the task"
TIME_OVER: Final = f"{WALLTIME_REASON}: the run's time is over"
_STOP_S: Final = 1.0
_BEAT_S: Final = 2.0
"""Seconds between the heartbeats of a worker."""
_MOST_REPORT: Final = 64_000
"""Bytes that a report for the timeline aims at."""
_APPEND_S: Final = 5.0
_MOST_READ: Final = 8_000_000


class StopSignal:
    """The reasons for a worker to stop a task: deadline, stop of the run, revocation.

    Args:
        deadline_s: Seconds from now until no further item starts.
        ends_at: End of the run's time, in seconds since 1970, or None.

    Attributes:
        stopped: True if the coordinator has stopped the run.
        revoked: True if it has revoked the task: this worker was silent for too long.
        repeated: True if the task was started before, on this or another worker.
        recorder: What the worker's endpoints do, which heartbeats report; None before they are
            open.
    """

    def __init__(self, deadline_s: float, ends_at: float | None = None) -> None:
        self._deadline, self._ends_at = time.monotonic() + deadline_s, ends_at
        self._job_end: Walltime | None = None
        self.stopped = self.revoked = self.repeated = False
        self.recorder: TimelineRecorder | None = None

    def stop_reason(self) -> str | None:
        """Return why no further item may start, or None."""
        if self.stopped:
            return STOPPED
        if self.revoked:
            return REVOKED
        if self.repeated:
            return DUPLICATE_REASON
        if self._ends_at is not None and time.time() > self._ends_at:
            return TIME_OVER
        if self._job_end is not None and not self._job_end.remaining_s():
            return self._job_end.reason
        return "the task's deadline" if time.monotonic() > self._deadline else None

    def check_walltime(self, limits: LimitsConfig, environment: Mapping[str, str]) -> None:
        """Also stop before this worker's own batch job ends.

        Raises:
            ConfigurationError: An environment variable for the end of the job is not a time.
        """
        self._job_end = walltime(
            limits.model_copy(update={"walltime_s": None}), environment, time.time()
        )


@asynccontextmanager
async def heartbeat(task: ShardTask, worker: str) -> AsyncIterator[StopSignal]:
    """Poll for the coordinator's stop and send heartbeats while the block runs.

    The event loop does both, so a worker whose loop hangs sends no heartbeat.

    Args:
        task: The task.
        worker: This worker's name.
    """
    signal = StopSignal(task.deadline_s, task.ends_at)
    tasks = list[asyncio.Task[None]]()
    try:
        if task.stop_file is not None:
            tasks.append(asyncio.create_task(_poll_stop_file(Path(task.stop_file), signal)))
        if task.journal is not None and "token" in task.run:
            file = heartbeat_file(Path(task.journal), task.run["token"], task.shard, task.attempt)
            await _check_file(partial(_mark_begun, worker=worker), file, signal)
            tasks.append(asyncio.create_task(_send_heartbeats(file, signal)))
        yield signal
    finally:
        for background in tasks:
            background.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send_heartbeats(file: Path, signal: StopSignal) -> None:
    while not signal.revoked:
        await asyncio.sleep(_BEAT_S)
        recorder = signal.recorder
        delta = None if recorder is None or signal.repeated else recorder.take()
        if recorder is None or not delta:
            await _check_file(_touch, file, signal)
            continue
        appending = asyncio.create_task(_check_file(partial(_append, delta=delta), file, signal))
        try:
            await asyncio.shield(appending)
        finally:  # the thread goes on when the task ends
            await asyncio.wait({appending}, timeout=_APPEND_S)
            if not appending.done() or not appending.result():
                recorder.put_back(delta)


async def _check_file(
    do: Callable[[Path, StopSignal], None], file: Path, signal: StopSignal
) -> bool:
    """Send a heartbeat; return True if it was sent.

    The file is missing if the coordinator has revoked the task.
    """
    try:
        await asyncio.to_thread(do, file, signal)
    except FileNotFoundError:
        signal.revoked = True
    except OSError as error:  # it may recover before the worker counts as lost
        logger.warning("%s: cannot be touched: %s", file, error.strerror)
    else:
        return True
    return False


def _mark_begun(file: Path, signal: StopSignal, worker: str) -> None:
    """Mark the task as begun; engines may deliver it again, even when parts are done."""
    with file.open("r+b") as opened:
        signal.repeated = bool(opened.read(1))
        if not signal.repeated:
            opened.write(f"{_BEGUN}{worker}\n".encode())


def _touch(file: Path, _: StopSignal) -> None:
    os.utime(file)


def _append(file: Path, _: StopSignal, delta: TimelineDelta) -> None:
    """Add a line to a file that must exist."""
    line = orjson.dumps(delta.to_json(_MOST_REPORT))
    with file.open("r+b") as opened:
        opened.seek(0, os.SEEK_END)
        opened.write(b"\n%b\n" % line)  # what an earlier failure left is a line of its own


async def _poll_stop_file(file: Path, signal: StopSignal) -> None:
    while not signal.stopped:
        try:
            signal.stopped = await asyncio.to_thread(file.exists)
        except OSError as error:
            logger.warning("%s: cannot be checked: %s", file, error.strerror)
        await asyncio.sleep(_STOP_S)
