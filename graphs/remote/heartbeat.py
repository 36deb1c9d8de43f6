"""Heartbeat, stop and withdraw files in the journal folder, both sides."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from ...backends.cluster.walltime import Walltime, walltime
from ...backends.core.errors import JournalError
from ...backends.core.messages import DUPLICATE_REASON, WALLTIME_REASON, ShardTask
from ...backends.workers.member import Heartbeat
from ...configs.models import LimitsConfig

logger = logging.getLogger(__name__)

_OPEN: Final = "task-"
_STOP: Final = "stop-"
_BEAT: Final = "heartbeat-"
MISSED_POLLS: Final = 4
"""So many looks in a row, at least, must find a worker silent before it counts as lost."""


def stop_file(journal: Path, token: str) -> Path:
    """Return the file that stops the workers of one life of a run."""
    return journal / f"{_STOP}{token}"


def heartbeat_file(journal: Path, token: str, shard: str, attempt: int) -> Path:
    """Return the file that a worker touches while it works on an order, and that allows it to."""
    return journal / f"{_BEAT}{token}-{shard}-{attempt}"


def stop_earlier_workers(journal: Path) -> None:
    """Stop the workers of earlier lives and sweep up after them, whoever works in this one; blocks.

    Args:
        journal: The run's journal folder.
    """
    for file in journal.glob(f"{_BEAT}*"):
        file.unlink(missing_ok=True)
    for file in journal.glob(f"{_OPEN}*"):
        _rename(file, stop_file(journal, file.name.removeprefix(_OPEN)))


class ControlFiles:
    """The files of one life of a run.

    While a life lasts there is ``open-TOKEN``. Renamed to ``stop-TOKEN`` it stops the workers; a
    life that was killed has left it, and the next one renames it: what is still in an engine's
    queue then ends before it has asked anything. An order has a file of its own, made before it is
    sent: its worker writes that it has begun, touches it from time to time, and stops once it is
    gone.

    Args:
        journal: The folder, or None if workers do not share it.
        token: Names this life.
        silence_s: Seconds of silence after which a worker counts as lost.
    """

    def __init__(self, journal: Path | None, token: str, silence_s: float) -> None:
        self._journal, self._token = journal, token
        self._watched = dict[Path, _FileState]()
        self._most_s, self._looked = silence_s / MISSED_POLLS, time.monotonic()
        self._blind = False

    def open_session(self) -> None:
        """Open this life; blocks."""
        if self._journal is not None:
            self._open(self._journal).touch()

    def stop_workers(self) -> None:
        """Stop the workers of this life; blocks."""
        if self._journal is not None:
            _rename(self._open(self._journal), stop_file(self._journal, self._token))

    def close_session(self, still_out: bool) -> None:
        """Close this life; if orders are still out, they stop. Blocks."""
        if self._journal is None:
            return
        if still_out:
            self.stop_workers()
        self._open(self._journal).unlink(missing_ok=True)
        for file in self._journal.glob(f"{_BEAT}{self._token}-*"):
            file.unlink(missing_ok=True)

    def create(self, file: Path) -> None:
        """Make an order's file, not touched by any worker yet; blocks.

        Raises:
            JournalError: It cannot be made.
        """
        try:
            file.touch()
            made = file.stat().st_mtime_ns
        except OSError as error:
            msg = f"{file}: cannot be made: {error.strerror}; mend the folder, then resume"
            raise JournalError(msg) from error
        if (seen := self._watched.get(file)) is not None:
            seen.mtime_ns = made

    def revoke(self, file: Path) -> None:
        """Take an order back: its worker stops, should it still live. Blocks."""
        self.unwatch(file)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:  # its worker then ends items that others end as well
            logger.warning("%s: cannot be removed: %s", file, error.strerror)

    def watch(self, file: Path) -> Heartbeat:
        """Return what tells for how long a file has not changed, as of the last look."""
        seen = self._watched[file] = _FileState()
        return lambda: seen.silent_s

    def unwatch(self, file: Path) -> None:
        """Look at a file no more."""
        self._watched.pop(file, None)

    def poll(self) -> None:
        """Look at all files that somebody asked for; blocks.

        What passes while nobody looks, or while the file system answers nobody, is no worker's
        silence: one look adds a part of the patience at most.
        """
        passed, failed = min(time.monotonic() - self._looked, self._most_s), list[str]()
        for file, seen in list(self._watched.items()):
            try:
                stamp = file.stat().st_mtime_ns
            except FileNotFoundError:
                seen.update(None, passed)
            except OSError as error:
                failed.append(f"{file}: cannot be looked at: {error.strerror}")
            else:
                seen.update(stamp, passed)
        self._looked = time.monotonic()
        if failed and not self._blind:  # told once, for thousands of files may be looked at
            text = "%s (%d such files); their workers are waited for until it can be"
            logger.warning(text, failed[0], len(failed))
        self._blind = bool(failed)

    def _open(self, journal: Path) -> Path:
        return journal / f"{_OPEN}{self._token}"


def _rename(file: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # it has been renamed before
        file.rename(target)


class _FileState:
    """For how long a file has not changed, by this machine's clock: those of nodes may differ.

    Attributes:
        mtime_ns: When it was made or last seen to change (ns since 1970); None before it is made.
        silent_s: Seconds since it was last seen to change; None before a worker has touched it.
    """

    def __init__(self) -> None:
        self.mtime_ns: int | None = None
        self.silent_s: float | None = None

    def update(self, stamp: int | None, passed_s: float) -> None:
        if stamp is not None and self.mtime_ns is not None and stamp != self.mtime_ns:
            self.mtime_ns, self.silent_s = stamp, 0.0
        elif self.silent_s is not None:
            self.silent_s += passed_s


STOPPED: Final = "the coordinator stopped the run"
REVOKED: Final = "the coordinator has taken the order back"
TIME_OVER: Final = f"{WALLTIME_REASON}: the run's time is over"
_STOP_S: Final = 1.0
_BEAT_S: Final = 2.0
"""Seconds between a worker's signs of life."""


class StopSignal:
    """An order's deadline, and whether its coordinator stops all workers.

    Args:
        deadline_s: Seconds from now until no further item begins.
        ends_at: When the run's time is over, in seconds since 1970, or None.

    Attributes:
        stopped: Whether the coordinator has stopped the run.
        revoked: Whether it has taken the order back: this worker was silent for too long.
        repeated: Whether the order was begun before, here or elsewhere.
    """

    def __init__(self, deadline_s: float, ends_at: float | None = None) -> None:
        self._deadline, self._ends_at = time.monotonic() + deadline_s, ends_at
        self._job_end: Walltime | None = None
        self.stopped = self.revoked = self.repeated = False

    def stop_reason(self) -> str | None:
        """Tell why no further item shall begin, or None."""
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
        return "the order's deadline" if time.monotonic() > self._deadline else None

    def check_walltime(self, limits: LimitsConfig, environment: Mapping[str, str]) -> None:
        """Stop also before this worker's own batch job ends.

        Raises:
            ConfigurationError: What the environment says of the end is no time.
        """
        self._job_end = walltime(
            limits.model_copy(update={"walltime_s": None}), environment, time.time()
        )


@asynccontextmanager
async def heartbeat(order: ShardTask) -> AsyncIterator[StopSignal]:
    """Look for the coordinator's stop, and give signs of life, while the block runs.

    The event loop does both: a worker whose loop hangs gives no sign of life.
    """
    sign = StopSignal(order.deadline_s, order.ends_at)
    tasks = list[asyncio.Task[None]]()
    try:
        if order.stop_file is not None:
            tasks.append(asyncio.create_task(_poll_stop_file(Path(order.stop_file), sign)))
        if order.journal is not None and "token" in order.run:
            file = heartbeat_file(
                Path(order.journal), order.run["token"], order.shard, order.attempt
            )
            await _check_file(_mark_begun, file, sign)
            tasks.append(asyncio.create_task(_send_heartbeats(file, sign)))
        yield sign
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send_heartbeats(file: Path, sign: StopSignal) -> None:
    while not sign.revoked:
        await asyncio.sleep(_BEAT_S)
        await _check_file(_touch, file, sign)


async def _check_file(do: Callable[[Path, StopSignal], None], file: Path, sign: StopSignal) -> None:
    """Give a sign of life; the coordinator has made the file, and takes it away with the order."""
    try:
        await asyncio.to_thread(do, file, sign)
    except FileNotFoundError:
        sign.revoked = True
    except OSError as error:  # it may be well again before the coordinator's patience ends
        logger.warning("%s: cannot be touched: %s", file, error.strerror)


def _mark_begun(file: Path, sign: StopSignal) -> None:
    """Note that the order is begun; engines may deliver it again, however much of it is done."""
    with file.open("r+b") as opened:
        sign.repeated = bool(opened.read(1))
        if not sign.repeated:
            opened.write(b"begun\n")


def _touch(file: Path, _: StopSignal) -> None:
    os.utime(file)


async def _poll_stop_file(file: Path, sign: StopSignal) -> None:
    while not sign.stopped:
        try:
            sign.stopped = await asyncio.to_thread(file.exists)
        except OSError as error:
            logger.warning("%s: cannot be looked for: %s", file, error.strerror)
        await asyncio.sleep(_STOP_S)
