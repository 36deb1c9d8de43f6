"""The coordinator's side of work elsewhere: orders out, summaries and journal lines home."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from ..backends.accounts.folder import RunFolder
from ..backends.accounts.ledger import Ledger
from ..backends.build import Serving
from ..backends.contract.errors import ConfigurationError
from ..backends.contract.types import Item, Shard
from ..backends.contract.wire import Order, own_version
from ..backends.places import carried, shard_pool, shares_folder
from ..backends.sites.executor import WorkShard
from ..backends.sites.pool import ShardPool
from ..backends.sites.watch import Beat
from ..configs.load import Loaded
from ..configs.models import RunConfig
from ..configs.plain import MASKED
from ..nodes.context import Answered
from ..nodes.progress import Progress
from .shares import worker_settings, worker_streams
from .signs import Signs, beat_file, stop_file

logger = logging.getLogger(__name__)

_TAIL_S: Final = 1.0
_SHARE: Final = 10.0
STOP_S: Final = 10.0
"""So much longer than workers wait for items in flight does the coordinator wait for workers."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What all orders of a life have in common.

    Attributes:
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint``, ``life`` and the life's
            ``token``.
        settings: Its plain settings.
        urls: Endpoints for the workers, in place of the settings' own; or None.
        journal: The run's journal folder if workers share it, else None.
        streams: Most items in flight in one worker.
        deadline_s: Seconds that a worker may take for one order.
        carry: Most bytes of an order, and of a summary.
        nodewise: Whether each worker has endpoints of its own.
        folder: The run's folder.
    """

    run: dict[str, Any]
    settings: dict[str, Any]
    urls: list[str] | None
    journal: Path | None
    streams: int
    deadline_s: float
    carry: int
    nodewise: bool
    folder: Path


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
        self._signs = Signs(terms.journal, str(terms.run["token"]))
        self._orders = Counter[str]()
        self._reading, self._rounds = asyncio.Lock(), 0
        self._resting = False

    @property
    def nodewise(self) -> bool:
        """Say whether each worker has endpoints of its own."""
        return self._terms.nodewise

    @property
    def out(self) -> int:
        """Return how many shards are out."""
        return self._pool.out

    async def work(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> Answered | None:
        """Have the remaining items of a shard worked on; see the nodes' protocol."""
        for name in self._pool.left:
            if _overlap(name, shard) and (summary := await self._pool.take_over(name)):
                return None, summary
        name = f"{shard.lo}-{shard.hi}"

        async def make(_: int) -> Order | None:
            await self.refresh()  # a lost worker's last lines
            items = await remaining()
            if not items:
                return None
            order = self._order(name, self._orders[name], items)
            self._orders[name] += 1
            return await asyncio.to_thread(_trimmed, order)

        # an attempt's number is that of its order: a shard may need several that are answered
        first = self._orders[name]
        return await self._pool.run(make, lambda attempt: self._beat(name, first + attempt))

    def _order(self, shard: str, attempt: int, items: list[Item]) -> Order:
        terms = self._terms
        stop = stop_file(terms.journal, terms.run["token"]) if terms.journal else None
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
            stop_file=str(stop) if stop else None,
            carry=terms.carry,
        )

    def _beat(self, shard: str, attempt: int) -> Beat | None:
        """Return what tells a worker's last sign of life: the file that it touches, if shared."""
        journal = self._terms.journal
        if journal is None:
            return None
        return self._signs.of(beat_file(journal, self._terms.run["token"], shard, attempt))

    async def refresh(self) -> None:
        """Read what workers have recorded since the last time, and count it.

        Raises:
            LedgerError: A worker's journal file is damaged.
        """
        wanted = self._rounds + 1
        async with self._reading:
            if self._rounds < wanted and not self._resting:  # else somebody began after we asked
                self._rounds += 1
                for record in await asyncio.to_thread(self._read):
                    self._progress.count(record)

    def _read(self) -> list[dict[str, Any]]:
        self._signs.look()
        return self._ledger.refresh()

    async def stop(self) -> None:
        """Let no worker begin a further item, as far as they share a folder or can be told."""
        await asyncio.to_thread(self._signs.stop)
        await self._pool.stop()

    async def rest(self) -> None:
        """Read the journal a last time: what workers record from now on counts for nothing."""
        await self.refresh()
        self._resting = True

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the places and follow the workers' journal files while the block runs."""
        await asyncio.to_thread(self._signs.begin)
        tail: asyncio.Task[None] | None = None
        try:
            await self._pool.start()
            tail = asyncio.create_task(self._tail())
            yield
        finally:
            if tail is not None:
                tail.cancel()
                with suppress(asyncio.CancelledError):
                    await tail
            still_out = self._pool.out
            await self._pool.close()
            await self.refresh()
            await asyncio.to_thread(self._signs.end, still_out > 0)

    async def _tail(self) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(_TAIL_S, _SHARE * took))  # thousands of files take a while
            began = time.monotonic()
            await self.refresh()
            took = time.monotonic() - began


def _overlap(name: str, shard: Shard) -> bool:
    """Say whether a shard that an earlier life named ``lo-hi`` has items of this one."""
    lo, _, hi = name.partition("-")
    return lo.isdigit() and hi.isdigit() and int(lo) < shard.hi and shard.lo < int(hi)


def _trimmed(order: Order) -> Order:
    """Leave out the last items of an order that is too large; they come with the next one.

    Raises:
        ConfigurationError: The first item alone is too large.
    """
    left = order.carry
    for count, item in enumerate(order.items):
        left -= len(orjson.dumps(item))
        if left < 0:
            if count == 0:
                msg = (
                    f"item {item[1]!r} takes more than the {order.carry:,} bytes that are sent to "
                    "a worker at a time; cut it, or run it with backend.kind: local"
                )
                raise ConfigurationError(msg)
            order.items[count:] = []
            break
    return order


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
        run=run | {"id": about["run"], "life": life, "token": secrets.token_hex(4)},
        settings=worker_settings(loaded),
        urls=_started(up, config),
        journal=folder.journal.resolve() if shares_folder(config.backend) else None,
        streams=worker_streams(loaded),
        deadline_s=config.backend.deadline_s,
        carry=carried(config.backend),
        nodewise=config.backend.node_endpoints,
        folder=folder.path,
    )


def _started(up: Serving, config: RunConfig) -> list[str] | None:
    """Return the URLs of a simulated fleet that was started here."""
    if config.endpoints.simulated is None or config.backend.node_endpoints:
        return None
    return [spec.url for spec in up.specs]


@asynccontextmanager
async def open_crew(
    loaded: Loaded, work: WorkShard, terms: Terms, ledger: Ledger, progress: Progress
) -> AsyncIterator[WorkCrew]:
    """Open the places and follow what their workers record."""
    drain_s = loaded.config.limits.drain_s + loaded.config.limits.request_timeout_s
    pool = shard_pool(loaded.config.backend, work, drain_s, terms.folder)
    crew = WorkCrew(pool, terms, ledger, progress)
    async with crew.opened():
        yield crew
