"""What a worker opens for its orders, and keeps from one to the next."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from ..backends.accounts.errand import FiledLedger, SentLedger, WorkerLedger, worker_file
from ..backends.accounts.journal import JournalWriter
from ..backends.build import Serving, endpoint_specs, open_fleet
from ..backends.contract.errors import SiteError
from ..backends.contract.types import Item
from ..backends.contract.wire import Order
from ..backends.fleet.address import EndpointSpec
from ..backends.fleet.fleet import Fleet
from ..configs.load import Loaded, load
from ..configs.reduce import with_bounds
from ..nodes.aggregators import build
from ..nodes.context import RunTools
from ..nodes.gate import Gate
from ..nodes.progress import Progress
from .crew import beat_file
from .items import item_runner
from .shared import Shared

_STOP_S: Final = 1.0
BEAT_S: Final = 2.0
"""Seconds between a worker's signs of life."""
FSYNC_S: Final = 1.0
"""Workers flush their journal once a second: what a node's loss may cost."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What orders of one run have in common: settings, fleet and journal file."""

    loaded: Loaded
    fleet: Fleet
    model: str
    writer: JournalWriter | None


class Bag:
    """Opens parts, and keeps those last used open for the next order."""

    def __init__(self) -> None:
        self._shared = Shared[Parts]()
        self._kept: tuple[str, AsyncExitStack] | None = None
        self._keeping = asyncio.Lock()

    @asynccontextmanager
    async def parts(self, order: Order, worker: str) -> AsyncIterator[Parts]:
        """Use the parts that an order needs."""
        key = _key(order)
        async with self._shared.use(key, lambda: open_parts(order, worker)) as parts:
            await self._keep(key, order, worker)
            yield parts

    async def _keep(self, key: str, order: Order, worker: str) -> None:
        async with self._keeping:
            if self._kept is not None and self._kept[0] == key:
                return
            await self._let_go()
            stack = AsyncExitStack()
            use = self._shared.use(key, lambda: open_parts(order, worker))
            await stack.enter_async_context(use)
            self._kept = key, stack

    async def _let_go(self) -> None:
        if self._kept is not None:
            stack, self._kept = self._kept[1], None
            await stack.aclose()

    async def aclose(self) -> None:
        """Close what is kept."""
        async with self._keeping:
            await self._let_go()


def _key(order: Order) -> str:
    same = [order.run, order.settings, order.urls, order.journal]
    data = orjson.dumps(same, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@asynccontextmanager
async def open_parts(order: Order, worker: str) -> AsyncIterator[Parts]:
    """Open settings, fleet and journal for a run's orders.

    Raises:
        ConfigurationError: The settings do not fit here, e.g. a variable is not set.
        SiteError: The shared folder cannot be reached from here.
    """
    loaded = await asyncio.to_thread(load, order.settings)
    key = loaded.config.endpoints.api_key.get_secret_value()
    if order.urls is None:
        specs = endpoint_specs(loaded.config.endpoints, loaded.plain["endpoints"])
    else:
        specs = [EndpointSpec(url, key) for url in order.urls]
    model, simulated = order.run["model"], order.run["simulated"]
    async with AsyncExitStack() as stack:
        serving = Serving(tuple(specs), model, simulated)
        fleet = await stack.enter_async_context(open_fleet(loaded.config, serving))
        writer = None
        if order.journal is not None:
            writer = await _open_journal(Path(order.journal), order, worker)
            stack.push_async_callback(writer.close)
        yield Parts(loaded, fleet, model, writer)


async def _open_journal(folder: Path, order: Order, worker: str) -> JournalWriter:
    if not await asyncio.to_thread(folder.is_dir):
        msg = (
            f"the run folder's journal {folder} cannot be reached from here; put the run folder "
            "on a shared file system, or set backend.shared_folder: false"
        )
        raise SiteError(msg)
    path = await asyncio.to_thread(worker_file, folder, order.run["life"], worker)
    return JournalWriter(path, {"run": order.run["id"], "life": worker}, FSYNC_S)


@asynccontextmanager
async def beating(order: Order) -> AsyncIterator[None]:
    """Touch the order's file in the shared folder while the block runs.

    The event loop does it: a worker whose loop hangs gives no sign of life.
    """
    if order.journal is None:
        yield
        return
    file = beat_file(Path(order.journal), order.shard, order.attempt)
    task = asyncio.create_task(_beat(file))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _beat(file: Path) -> None:
    while True:
        await asyncio.to_thread(file.touch)
        await asyncio.sleep(BEAT_S)


class OrderStore:
    """An order's items, in the place of a run's item store."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._items)

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return a slice of them."""
        return self._items[lo:hi]


@dataclass(frozen=True, slots=True)
class Errand:
    """An order in work: the tools for it, and what ends it early."""

    tools: RunTools
    ledger: WorkerLedger
    stop: StopSign

    def drain(self) -> str | None:
        """Tell why no further item shall begin, or None."""
        return self.ledger.full or self.stop.reason()


class StopSign:
    """An order's deadline, and the file by which its coordinator stops all workers."""

    def __init__(self, deadline_s: float, file: str | None) -> None:
        self._end = time.monotonic() + deadline_s
        self._file = Path(file) if file else None
        self._looked, self._there = 0.0, False

    def reason(self) -> str | None:
        """Tell why no further item shall begin, or None; looks at the file once a second."""
        now = time.monotonic()
        if now > self._end:
            return "the order's deadline"
        if self._file is not None and now - self._looked > _STOP_S:
            self._looked, self._there = now, self._file.exists()
        return "the coordinator stopped the run" if self._there else None


def errand(order: Order, parts: Parts) -> Errand:
    """Return what one order needs, over parts that are open."""
    items, loaded = order.unpacked(), parts.loaded
    ledger = SentLedger() if parts.writer is None else FiledLedger(parts.writer)
    reduce = [with_bounds(s, loaded.config.task.answer_schema) for s in loaded.config.reduce]
    tools = RunTools(
        store=OrderStore(items),
        ledger=ledger,
        aggregate=build(reduce),
        run_item=item_runner(loaded, parts.fleet, parts.model, engine=None, quiet=True),
        gate=Gate(order.streams, loaded.config.limits.drain_s),
        progress=Progress(total=len(items)),
        fingerprint=bytes.fromhex(order.run["fingerprint"]),
        simulated=order.run["simulated"],
    )
    return Errand(tools, ledger, StopSign(order.deadline_s, order.stop_file))
