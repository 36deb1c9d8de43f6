"""The worker: work_shard(task) -> result, and the resources kept between tasks."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from ..backends.budget.budget import Budget
from ..backends.budget.tokens import exact_count, token_counter
from ..backends.core.aio import Shared
from ..backends.core.errors import FanfoldError, SiteError
from ..backends.core.messages import Order, Summary, own_version
from ..backends.core.money import Tariff
from ..backends.core.protocols import Count
from ..backends.core.types import Item, Json, Shard
from ..backends.discovery.connect import Serving, located, open_fleet, reusing, survey
from ..backends.discovery.node_local import served_here
from ..backends.fleet.endpoint import EndpointSpec
from ..backends.fleet.fleet import Fleet, Teller
from ..backends.storage.journal import JournalWriter
from ..backends.storage.run_folder import ANSWERS
from ..backends.storage.worker_journal import FiledLedger, SentLedger, WorkerLedger, worker_file
from ..configs.loader import Loaded, load
from ..configs.reduce import with_bounds
from ..nodes.aggregators import build
from ..nodes.context import RunTools, unlimited
from ..nodes.shard.gate import Gate
from ..nodes.shard.local import finish_some
from ..nodes.shard.progress import Progress
from .remote.heartbeat import STOPPED, TIME_OVER, StopSign, attending
from .remote.tasks import leased, out_of_lease, too_late, used_of
from .run.items import item_runner
from .run.prepare import asked_by_all

FSYNC_S: Final = 1.0
"""Workers flush their journal once a second: what a node's loss may cost."""
IDLE_S: Final = 60.0
"""A worker without orders closes connections and journal after so many seconds."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What orders of one run have in common: settings, fleet, journal file, tokenizer."""

    loaded: Loaded
    fleet: Fleet
    model: str
    writer: JournalWriter | None
    teller: Teller
    count: Count | None = None


class Bag:
    """Opens parts, and keeps those last used open for the next order.

    Args:
        idle_s: Seconds without an order after which they are closed.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._shared = Shared[Parts]()
        self._kept: tuple[str, AsyncExitStack] | None = None
        self._keeping = asyncio.Lock()
        self._idle_s = idle_s
        self._idle: asyncio.Task[None] | None = None
        self._orders = 0

    @asynccontextmanager
    async def parts(self, order: Order, worker: str) -> AsyncIterator[Parts]:
        """Use the parts that an order needs."""
        key = _key(order)
        self._orders += 1
        try:
            async with self._shared.use(key, lambda: open_parts(order, worker)) as parts:
                await self._keep(key, order, worker)
                yield parts
        finally:
            self._orders -= 1
            if self._idle is None:
                self._idle = asyncio.create_task(self._close_when_idle())

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

    async def _close_when_idle(self) -> None:
        quiet = 0.0
        while quiet < self._idle_s:
            await asyncio.sleep(self._idle_s / 4)
            quiet = 0.0 if self._orders else quiet + self._idle_s / 4
        self._idle = None
        async with self._keeping:
            await self._let_go()

    async def aclose(self) -> None:
        """Close what is kept."""
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.wait({self._idle})
            self._idle = None
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
    model = order.run["model"]
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(_served(order, loaded))
        own = Path(order.journal).parent / ANSWERS if order.journal is not None else None
        reuse = await stack.enter_async_context(reusing(loaded.config, here.simulated, own))
        fleet = await stack.enter_async_context(open_fleet(loaded.config, here, reuse))
        writer = None
        if order.journal is not None:
            writer = await _open_journal(Path(order.journal), order, worker)
            stack.push_async_callback(writer.close)
        count = None
        if order.lease is not None:
            count = exact_count(await stack.enter_async_context(token_counter(here)))
        yield Parts(loaded, fleet, model, writer, Teller(lambda: fleet.endpoints), count)


@asynccontextmanager
async def _served(order: Order, loaded: Loaded) -> AsyncIterator[Serving]:
    """Return whom this worker asks."""
    config, written = loaded.config, loaded.plain["endpoints"]
    model, simulated = order.run["model"], order.run["simulated"]
    if order.urls is not None:
        key = config.endpoints.api_key.get_secret_value()
        yield Serving(tuple(EndpointSpec(url, key) for url in order.urls), model, simulated)
    elif config.backend.node_endpoints:
        async with served_here(config, written, model, simulated, _over(order)) as here:
            yield here
    else:
        async with located(config, written) as place:
            if config.endpoints.must_be_asked:
                yield await survey(place, model, config.endpoints.models)
            else:
                yield Serving(place.specs, model, simulated, place=place)


def _over(order: Order) -> Callable[[], str | None]:
    """Return what tells why a worker gets ready no longer, as far as it can see that."""

    def over() -> str | None:
        if order.stop_file is not None and Path(order.stop_file).exists():
            return STOPPED
        late = order.ends_at is not None and time.time() > order.ends_at
        return TIME_OVER if late else None

    return over


async def _open_journal(folder: Path, order: Order, worker: str) -> JournalWriter:
    if not await asyncio.to_thread(folder.is_dir):
        msg = (
            f"the run folder's journal {folder} cannot be reached from here; put the run folder "
            "on a shared file system, or set backend.shared_folder: false"
        )
        raise SiteError(msg)
    path = await asyncio.to_thread(worker_file, folder, order.run["life"], worker)
    return JournalWriter(path, {"run": order.run["id"], "life": worker}, FSYNC_S)


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
    """An order in work: the tools for it, what ends it early, and what it may spend."""

    tools: RunTools
    ledger: WorkerLedger
    stop: StopSign
    budget: Budget | None = None

    def drain(self) -> str | None:
        """Tell why no further item shall begin, or None."""
        return self.ledger.full or self.stop.reason()


def errand(order: Order, parts: Parts, stop: StopSign, budget: Budget | None) -> Errand:
    """Return what one order needs, over parts that are open."""
    items, loaded = order.unpacked(), parts.loaded
    stop.heed(loaded.config.limits, os.environ)
    if parts.writer is None:
        ledger: WorkerLedger = SentLedger(order.carry, order.streams)
    else:
        ledger = FiledLedger(parts.writer)
    if budget is not None:
        budget.count = parts.count
    reduce = [with_bounds(s, loaded.config.task.answer_schema) for s in loaded.config.reduce]
    tools = RunTools(
        store=OrderStore(items),
        ledger=ledger,
        aggregate=build(reduce),
        run_item=item_runner(loaded, parts.fleet, parts.model, engine=None, quiet=True),
        gate=Gate(order.streams, loaded.config.limits.drain_s),
        progress=Progress(total=len(items)),
        fingerprint=bytes.fromhex(order.run["fingerprint"]),
        asked=asked_by_all(loaded.config, parts.model),
        keep_raw=loaded.config.keep.raw == "all",
        simulated=order.run["simulated"],
        tariff=Tariff(**order.tariff),
        account=unlimited if budget is None else budget.account,
        budget=budget,
    )
    return Errand(tools, ledger, stop, budget)


T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0


def work_shard(order: dict[str, Json]) -> dict[str, Json]:
    """Work on one order and return its summary; for executors.

    It never raises for an item, and says as data what kept it from its work.
    """
    worker = the_worker()
    return worker.run(answer(order, worker.bag))


class Worker:
    """An event loop in a thread of its own, and what orders have in common."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.bag = Bag()
        threading.Thread(target=self._loop.run_forever, name="fanfold", daemon=True).start()
        # Before the interpreter ends its thread pools, which closing needs; ``atexit`` is too late.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]  # noqa: SLF001

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the worker's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Close what is kept between orders, unless the loop hangs."""
        closing = asyncio.run_coroutine_threadsafe(self.bag.aclose(), self._loop)
        try:
            closing.result(_CLOSE_S)
        except TimeoutError:
            logger.warning("%s: the event loop hangs; its connections are not closed", whoami())


@lru_cache(maxsize=1)
def the_worker() -> Worker:
    """Return this process's worker: the one thing that a process keeps."""
    return Worker()


async def answer(order: Mapping[str, Json], bag: Bag) -> dict[str, Json]:
    """Work on one order in the running loop; the door for workers that are async themselves."""
    try:
        read = Order.from_json(order)
        _check_version(read)
        return (await _work(read, bag)).to_json()
    except FanfoldError as error:
        return _refused(order, error).to_json()


def _check_version(order: Order) -> None:
    if order.fanfold != own_version():
        msg = (
            f"this worker runs fanfold {own_version()}, its coordinator {order.fanfold}; "
            "install the same version on both"
        )
        raise SiteError(msg)


async def _work(order: Order, bag: Bag) -> Summary:
    began = time.monotonic()
    async with (
        attending(order) as stop,
        bag.parts(order, whoami()) as parts,
        leased(order, parts.loaded.config) as budget,
    ):
        job, late = errand(order, parts, stop, budget), too_late(order)
        drain = (lambda: late) if late else job.drain
        part = await finish_some(Shard(0, len(order.items)), job.tools, drain)
        gate, used = job.tools.gate, used_of(budget)
        summary = Summary(
            shard=order.shard,
            attempt=order.attempt,
            fanfold=own_version(),
            worker=whoami(),
            tally=part.tally,
            stopped=gate.reason,
            parts=None if job.ledger.altered else part.state(),
            records=job.ledger.sent,
            error=None if gate.error is None or out_of_lease(gate.error) else as_data(gate.error),
            seconds=time.monotonic() - began,
            endpoints=parts.teller.news(),
            lease=None if order.lease is None else order.lease["name"],
            used=None if used is None else used.to_json(),
            short=gate.error is not None and out_of_lease(gate.error),
        )
        return await asyncio.to_thread(_carried, summary, order.carry)


def _carried(summary: Summary, carry: int) -> Summary:
    """Leave out the part of the aggregate if it is too large; it can be folded from the records."""
    if summary.parts is None or len(orjson.dumps(summary.parts)) < carry:
        return summary
    return replace(summary, parts=None)


def _refused(order: Any, error: FanfoldError) -> Summary:
    said = order if isinstance(order, Mapping) else {}
    return Summary(
        shard=str(said.get("shard")),
        attempt=int(said.get("attempt") or 0),
        fanfold=own_version(),
        worker=whoami(),
        error=as_data(error),
    )


def as_data(error: Exception) -> dict[str, str]:
    """Return an error's class and text."""
    return {"class": type(error).__name__, "text": str(error)}


def whoami() -> str:
    """Return host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"
