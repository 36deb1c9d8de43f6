"""Write the timeline of a run while a session goes on, and note which endpoints are silent."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from ...backends.core.errors import JournalError
from ...backends.core.silence import SilenceWatch
from ...backends.core.timeline import TimelineDelta
from ...backends.fleet.endpoint import BreakerState, Endpoint
from ...backends.fleet.fleet import Fleet
from ...backends.fleet.timeline import open_recorder
from ...backends.storage.run_folder import RunFolder, write_silent_endpoints
from ...backends.storage.timeline import FILE_NAME, Timeline

logger = logging.getLogger(__name__)

_WRITE_S: Final = 5.0
"""Seconds between two writes: what a kill costs."""
_SHARE: Final = 500.0
"""Writing takes at most one part in so many of a core, however large the timeline is."""
_MOST_PAUSE_S: Final = 60.0
_SHORT_S: Final = 5.0
"""Levels of an operator that end sooner need no timeline if all requests were answered."""

TakeDeltas = Callable[[int], Sequence[TimelineDelta]]
"""Returns what processes have reported since the last call, in bins of at least a width in ms."""


Note = Callable[[Sequence[TimelineDelta]], None]
"""Adds reports to the watch of silent endpoints."""


class _TimelineWriter:
    """Adds reports to the timeline of a run and writes it; a failure is a warning, once."""

    def __init__(
        self, folder: RunFolder, take: TakeDeltas, silence: SilenceWatch, note: Note
    ) -> None:
        self._timeline, self._take = Timeline(folder.path / FILE_NAME), take
        self._folder, self._silence, self._note = folder, silence, note
        self._silent = dict[str, float]()
        self._loaded = self._failed = self._changed = False
        self._writing: asyncio.Task[None] | None = None
        self._took_s = 0.0

    async def write(self, *, if_failed: bool = False) -> None:
        """Write the timeline if there is anything new.

        Args:
            if_failed: Do not begin a timeline if no request has failed.
        """
        if self._writing is not None:  # a thread goes on when its caller is cancelled
            await asyncio.wait({self._writing})
        deltas = [delta for delta in self._take(self._timeline.width_ms) if delta]
        self._note(deltas)
        await self.write_silent()
        if not deltas and not self._changed:
            return
        if if_failed and not self._loaded and not any(map(_has_failures, deltas)):
            return
        self._changed = True
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, deltas))
        await asyncio.shield(self._writing)

    async def write_silent(self, *, first: bool = False) -> None:
        """Write which endpoints are silent if that has changed, or at the begin of the session."""
        silent = self._silence.find_silent()
        if not first and silent.keys() == self._silent.keys():
            return
        self._silent = silent
        try:
            await asyncio.to_thread(write_silent_endpoints, self._folder, silent)
        except JournalError as error:
            logger.warning("%s", error.message)

    def _write(self, deltas: Sequence[TimelineDelta]) -> None:
        began = time.thread_time()
        if not self._loaded:
            self._loaded = True
            try:
                self._timeline.load()
            except JournalError as error:
                logger.warning("%s; this session begins a new one", error.message)
        self._timeline.add(deltas)
        try:
            self._timeline.write()
        except JournalError as error:  # the run is worth more than its timeline
            if not self._failed:
                logger.warning("%s; will retry", error.message)
            self._failed = True
        else:
            self._failed = self._changed = False
        self._took_s = time.thread_time() - began

    async def follow(self) -> None:
        """Write every few seconds; never returns."""
        while True:
            await asyncio.sleep(min(max(_WRITE_S, _SHARE * self._took_s), _MOST_PAUSE_S))
            await self.write()


def _has_failures(delta: TimelineDelta) -> bool:
    return any(counts.failures for counts in delta.cells.values())


@asynccontextmanager
async def write_timeline(
    folder: RunFolder,
    take: TakeDeltas,
    silence: SilenceWatch,
    note: Note | None = None,
    *,
    may_lack: bool = False,
) -> AsyncIterator[None]:
    """Write the timeline of a run every few seconds while the block runs, and when it ends.

    Args:
        folder: The run's folder.
        take: Returns what there is to add.
        silence: Receives the same.
        note: Adds it to ``silence``; None adds it alone.
        may_lack: Whether it is no loss if a short session without failures is not in it.
    """
    began = time.monotonic()
    writer = _TimelineWriter(folder, take, silence, note or silence.add)
    await writer.write_silent(first=True)
    following = asyncio.create_task(writer.follow())
    try:
        yield
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await writer.write(if_failed=may_lack and time.monotonic() - began < _SHORT_S)


@asynccontextmanager
async def record_timeline(
    folder: RunFolder, fleet: Fleet, silence: SilenceWatch, *, may_lack: bool = False
) -> AsyncIterator[None]:
    """Write the timeline of a run whose requests this process sends, while the block runs.

    Args:
        folder: The run's folder.
        fleet: The fleet of this process.
        silence: Receives what the endpoints did.
        may_lack: As for `write_timeline`.
    """

    def note(deltas: Sequence[TimelineDelta]) -> None:
        members = [one for one in fleet.endpoints if not one.retired]
        down = [one.label for one in members if _is_down(one)]
        left = {one.label for one in fleet.endpoints} - {one.label for one in members}
        silence.add(deltas, down, left)

    async with (
        open_recorder(lambda: fleet.endpoints) as recorder,
        write_timeline(
            folder,
            lambda width_ms: [recorder.take(width_ms)],
            silence,
            note,
            may_lack=may_lack,
        ),
    ):
        yield


def _is_down(endpoint: Endpoint) -> bool:
    """Return True if an endpoint should work and does not; on standby its model need not run."""
    return not endpoint.standby and (
        endpoint.ejected or endpoint.breaker.state is not BreakerState.CLOSED
    )
