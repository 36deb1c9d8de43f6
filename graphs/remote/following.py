"""What workers elsewhere have recorded, counted as it comes."""

from __future__ import annotations

import asyncio

from ...backends.storage.journal import Fresh
from ...backends.storage.journal_index import Ledger
from ...nodes.shard.progress import Progress


class Follower:
    """Reads on in the workers' journal files.

    Args:
        ledger: The run's journal.
        progress: The run's counts.
    """

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self._ledger, self._progress = ledger, progress
        self._turn, self._rounds = asyncio.Lock(), 0
        self._resting = False
        self._reading = set[asyncio.Task[None]]()

    async def refresh(self, worker: str | None = None, *, earlier: bool = False) -> None:
        """Read what workers have recorded since the last time, and count it.

        Args:
            worker: Only this one, as ``host:process``.
            earlier: Whether those of earlier lives may still write.

        Raises:
            LedgerError: A worker's journal file is damaged, or cannot be read.
        """
        reading = asyncio.create_task(self._read(worker, earlier, self._rounds + 1))
        self._reading.add(reading)
        reading.add_done_callback(self._has_read)
        # whoever waits may be cancelled; the thread that reads cannot be, and reads alone
        await asyncio.shield(reading)

    def _has_read(self, reading: asyncio.Task[None]) -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            reading.exception()  # nobody may wait any more; the next one meets the same

    async def _read(self, worker: str | None, earlier: bool, wanted: int) -> None:
        async with self._turn:
            if self._resting or (worker is None and self._rounds >= wanted):
                return  # somebody began to read all after we asked
            self._rounds += worker is None
            fresh = Fresh()
            try:
                await asyncio.to_thread(self._ledger.refresh, fresh, earlier, worker)
            finally:
                self._progress.count_all(fresh.done, fresh.failed, fresh.spent.counts())

    async def rest(self, *, earlier: bool = False) -> None:
        """Read a last time: what workers record from now on counts for nothing.

        Args:
            earlier: Whether those of earlier lives may still write.

        Raises:
            LedgerError: A worker's journal file is damaged, or cannot be read.
        """
        await self.refresh(earlier=earlier)
        self._resting = True
