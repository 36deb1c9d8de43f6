"""The coordinator's side of work elsewhere: orders out, summaries and journal lines home."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..backends.accounts.folder import RunFolder
from ..backends.accounts.ledger import Ledger
from ..backends.build import Serving
from ..backends.contract.errors import ConfigurationError
from ..backends.contract.types import Item
from ..backends.contract.wire import Order, Summary, own_version
from ..backends.places import shard_pool, shares_folder, workers
from ..backends.sites.executor import WorkShard
from ..backends.sites.pool import ShardPool
from ..configs.backend import BackendConfig
from ..configs.load import Loaded
from ..configs.plain import MASKED
from ..nodes.progress import Progress

_TAIL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What all orders of a life have in common.

    Attributes:
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint`` and ``life``.
        settings: Its plain settings.
        urls: Endpoints for the workers, in place of the settings' own; or None.
        journal: The run's journal folder if workers share it, else None.
        streams: Most items in flight in one worker.
        deadline_s: Seconds that a worker may take for one order.
    """

    run: dict[str, Any]
    settings: dict[str, Any]
    urls: list[str] | None
    journal: Path | None
    streams: int
    deadline_s: float


class WorkCrew:
    """Has shards worked on by a pool of places.

    Args:
        pool: The places.
        terms: What all orders have in common.
        ledger: The run's journal.
        progress: The run's counts.
    """

    def __init__(self, pool: ShardPool, terms: Terms, ledger: Ledger, progress: Progress) -> None:
        self._pool, self._terms = pool, terms
        self._ledger, self._progress = ledger, progress
        self._reading = asyncio.Lock()

    async def work(
        self, shard: str, remaining: Callable[[], list[Item]]
    ) -> tuple[Order, Summary] | None:
        """Have the remaining items of a shard worked on; see the nodes' protocol.

        Raises:
            RunStoppedError: The shard was lost too often.
        """

        async def make(attempt: int) -> Order | None:
            await self.refresh()  # a lost worker's last lines
            items = remaining()
            return self._order(shard, attempt, items) if items else None

        return await self._pool.run(make, lambda attempt: self._beat(shard, attempt))

    def _order(self, shard: str, attempt: int, items: list[Item]) -> Order:
        terms = self._terms
        return Order(
            shard=shard,
            attempt=attempt,
            fanfold=own_version(),
            run=terms.run,
            settings=terms.settings,
            items=[(i.index, i.id, i.row, i.problem) for i in items],
            urls=terms.urls,
            journal=str(terms.journal) if terms.journal else None,
            streams=terms.streams,
            deadline_s=terms.deadline_s,
            stop_file=str(stop_file(terms.journal, terms.run)) if terms.journal else None,
        )

    def _beat(self, shard: str, attempt: int) -> Callable[[], float | None]:
        """Return what tells a worker's last sign of life, by the file that it touches.

        Without a shared folder there is no sign but the summary; then only the deadline counts.
        """
        journal = self._terms.journal
        if journal is None:
            return time.monotonic
        file, seen = beat_file(journal, shard, attempt), _Seen()
        return lambda: seen.at(file)

    async def refresh(self) -> None:
        """Read what workers have recorded since the last time, and count it.

        Raises:
            LedgerError: A worker's journal file is damaged.
        """
        async with self._reading:
            for record in await asyncio.to_thread(self._ledger.refresh):
                self._progress.count(record)

    async def stop(self) -> None:
        """Let no worker begin a further item, as far as they share a folder with us."""
        if self._terms.journal is not None:
            await asyncio.to_thread(stop_file(self._terms.journal, self._terms.run).touch)

    @asynccontextmanager
    async def tailing(self) -> AsyncIterator[None]:
        """Follow the workers' journal files while the block runs."""
        task = asyncio.create_task(self._tail())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _tail(self) -> None:
        while True:
            await asyncio.sleep(_TAIL_S)
            await self.refresh()


class _Seen:
    """When a file was last seen to change, by this machine's clock."""

    def __init__(self) -> None:
        self._stamp: int | None = None
        self._when: float | None = None

    def at(self, file: Path) -> float | None:
        with suppress(FileNotFoundError):
            stamp = file.stat().st_mtime_ns
            if stamp != self._stamp:
                self._stamp, self._when = stamp, time.monotonic()
        return self._when


def stop_file(journal: Path, run: dict[str, Any]) -> Path:
    """Return the file that stops the workers of one life of a run."""
    return journal / f"stop-{run['life']:04}"


def beat_file(journal: Path, shard: str, attempt: int) -> Path:
    """Return the file that a worker touches while it works on an order."""
    return journal / f"beat-{shard}-{attempt}"


def crew_terms(
    folder: RunFolder, loaded: Loaded, up: Serving, about: dict[str, Any], life: int
) -> Terms:
    """Return what the orders of one life of a run have in common.

    Raises:
        ConfigurationError: The endpoints' key stands in the settings in clear text; it would
            have to travel, and does not.
    """
    config = loaded.config
    if loaded.plain["endpoints"]["api_key"] == MASKED:
        msg = (
            "endpoints.api_key is written out, and keys do not travel to workers; write it as "
            "${VAR} and set the variable where the workers run"
        )
        raise ConfigurationError(msg)
    run = {key: about[key] for key in ("model", "simulated", "fingerprint")}
    return Terms(
        run=run | {"id": about["run"], "life": life},
        settings=loaded.plain,
        urls=[spec.url for spec in up.specs] if config.endpoints.simulated is not None else None,
        journal=folder.journal.resolve() if shares_folder(config.backend) else None,
        streams=max(1, -(-config.limits.streams // workers(config.backend))),
        deadline_s=config.backend.deadline_s,
    )


@asynccontextmanager
async def open_crew(
    config: BackendConfig, work: WorkShard, terms: Terms, ledger: Ledger, progress: Progress
) -> AsyncIterator[WorkCrew]:
    """Open the places and follow what their workers record."""
    pool = shard_pool(config, work)
    crew = WorkCrew(pool, terms, ledger, progress)
    try:
        await pool.start()
        async with crew.tailing():
            yield crew
    finally:
        await pool.close()
        await crew.refresh()
        if terms.journal is not None:
            await asyncio.to_thread(_clean, terms.journal)


def _clean(journal: Path) -> None:
    for file in journal.glob("beat-*"):
        file.unlink(missing_ok=True)
