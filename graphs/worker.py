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
from ..backends.budget.tokens import make_prompt_counter, open_token_counter
from ..backends.core.aio import SharedResource
from ..backends.core.errors import BackendError, FanfoldError
from ..backends.core.messages import ShardResult, ShardTask, own_version
from ..backends.core.money import TokenPrices
from ..backends.core.protocols import PromptCounter
from ..backends.core.types import Item, Json, Shard
from ..backends.discovery.connect import (
    ReadyEndpoints,
    find_ready_endpoints,
    open_cache,
    open_endpoint_set,
    open_fleet,
)
from ..backends.discovery.node_local import node_endpoints
from ..backends.fleet.endpoint import EndpointSpec
from ..backends.fleet.fleet import Fleet, StatsReporter
from ..backends.storage.journal import JournalWriter
from ..backends.storage.run_folder import RESPONSES_FOLDER
from ..backends.storage.worker_journal import (
    ResultJournal,
    TaskJournal,
    WorkerJournal,
    make_worker_path,
)
from ..configs.loader import LoadedConfig, load_config
from ..configs.reduce import to_aggregator_spec
from ..nodes.aggregators import build_aggregators
from ..nodes.context import RunTools, no_account
from ..nodes.shard.gate import Gate
from ..nodes.shard.local import finish_items
from ..nodes.shard.progress import Progress
from .remote.heartbeat import STOPPED, TIME_OVER, StopSignal, heartbeat
from .remote.tasks import expiry_reason, is_lease_exhausted, open_lease, spent_of_lease
from .run.items import make_item_runner
from .run.prepare import compute_question_digest

FSYNC_S: Final = 1.0
"""Workers flush their journal once a second: what a node's loss may cost."""
IDLE_S: Final = 60.0
"""A worker without orders closes connections and journal after so many seconds."""


@dataclass(frozen=True, slots=True)
class TaskResources:
    """What orders of one run have in common: settings, fleet, journal file, tokenizer."""

    loaded: LoadedConfig
    fleet: Fleet
    model: str
    writer: JournalWriter | None
    stats_reporter: StatsReporter
    count_tokens: PromptCounter | None = None


class WorkerResources:
    """Opens parts, and keeps those last used open for the next order.

    Args:
        idle_s: Seconds without an order after which they are closed.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._shared = SharedResource[TaskResources]()
        self._kept: tuple[str, AsyncExitStack] | None = None
        self._keeping = asyncio.Lock()
        self._idle_s = idle_s
        self._idle: asyncio.Task[None] | None = None
        self._orders = 0

    @asynccontextmanager
    async def use(self, order: ShardTask, worker: str) -> AsyncIterator[TaskResources]:
        """Use the parts that an order needs."""
        key = _key(order)
        self._orders += 1
        try:
            async with self._shared.use(key, lambda: open_task_resources(order, worker)) as parts:
                await self._keep_open(key, order, worker)
                yield parts
        finally:
            self._orders -= 1
            if self._idle is None:
                self._idle = asyncio.create_task(self._close_when_idle())

    async def _keep_open(self, key: str, order: ShardTask, worker: str) -> None:
        async with self._keeping:
            if self._kept is not None and self._kept[0] == key:
                return
            await self._close_kept()
            stack = AsyncExitStack()
            use = self._shared.use(key, lambda: open_task_resources(order, worker))
            await stack.enter_async_context(use)
            self._kept = key, stack

    async def _close_kept(self) -> None:
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
            await self._close_kept()

    async def aclose(self) -> None:
        """Close what is kept."""
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.wait({self._idle})
            self._idle = None
        async with self._keeping:
            await self._close_kept()


def _key(order: ShardTask) -> str:
    same = [order.run, order.settings, order.urls, order.journal]
    data = orjson.dumps(same, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@asynccontextmanager
async def open_task_resources(order: ShardTask, worker: str) -> AsyncIterator[TaskResources]:
    """Open settings, fleet and journal for a run's orders.

    Raises:
        ConfigurationError: The settings do not fit here, e.g. a variable is not set.
        BackendError: The shared folder cannot be reached from here.
    """
    loaded = await asyncio.to_thread(load_config, order.settings)
    model = order.run["model"]
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(_open_endpoints(order, loaded))
        own = Path(order.journal).parent / RESPONSES_FOLDER if order.journal is not None else None
        reuse = await stack.enter_async_context(open_cache(loaded.config, here.simulated, own))
        fleet = await stack.enter_async_context(open_fleet(loaded.config, here, reuse))
        writer = None
        if order.journal is not None:
            writer = await _open_journal(Path(order.journal), order, worker)
            stack.push_async_callback(writer.close)
        count = None
        if order.lease is not None:
            count = make_prompt_counter(await stack.enter_async_context(open_token_counter(here)))
        yield TaskResources(
            loaded, fleet, model, writer, StatsReporter(lambda: fleet.endpoints), count
        )


@asynccontextmanager
async def _open_endpoints(order: ShardTask, loaded: LoadedConfig) -> AsyncIterator[ReadyEndpoints]:
    """Return whom this worker asks."""
    config, written = loaded.config, loaded.plain["endpoints"]
    model, simulated = order.run["model"], order.run["simulated"]
    if order.urls is not None:
        key = config.endpoints.api_key.get_secret_value()
        yield ReadyEndpoints(tuple(EndpointSpec(url, key) for url in order.urls), model, simulated)
    elif config.backend.node_endpoints:
        async with node_endpoints(
            config, written, model, simulated, _make_stop_check(order)
        ) as here:
            yield here
    else:
        async with open_endpoint_set(config, written) as place:
            if config.endpoints.needs_probe:
                yield await find_ready_endpoints(place, model, config.endpoints.models)
            else:
                yield ReadyEndpoints(place.specs, model, simulated, endpoint_set=place)


def _make_stop_check(order: ShardTask) -> Callable[[], str | None]:
    """Return what tells why a worker gets ready no longer, as far as it can see that."""

    def over() -> str | None:
        if order.stop_file is not None and Path(order.stop_file).exists():
            return STOPPED
        late = order.ends_at is not None and time.time() > order.ends_at
        return TIME_OVER if late else None

    return over


async def _open_journal(folder: Path, order: ShardTask, worker: str) -> JournalWriter:
    if not await asyncio.to_thread(folder.is_dir):
        msg = (
            f"the run folder's journal {folder} cannot be reached from here; put the run folder "
            "on a shared file system, or set backend.shared_folder: false"
        )
        raise BackendError(msg)
    path = await asyncio.to_thread(make_worker_path, folder, order.run["session"], worker)
    return JournalWriter(path, {"run": order.run["id"], "session": worker}, FSYNC_S)


class TaskItems:
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
class TaskContext:
    """An order in work: the tools for it, what ends it early, and what it may spend."""

    tools: RunTools
    journal: TaskJournal
    stop: StopSignal
    budget: Budget | None = None

    def stop_reason(self) -> str | None:
        """Tell why no further item shall begin, or None."""
        return self.journal.full_reason or self.stop.stop_reason()


def make_task_context(
    order: ShardTask, parts: TaskResources, stop: StopSignal, budget: Budget | None
) -> TaskContext:
    """Return what one order needs, over parts that are open."""
    items, loaded = order.unpack_items(), parts.loaded
    stop.check_walltime(loaded.config.limits, os.environ)
    if parts.writer is None:
        ledger: TaskJournal = ResultJournal(order.carry, order.streams)
    else:
        ledger = WorkerJournal(parts.writer)
    if budget is not None:
        budget.count_prompt = parts.count_tokens
    reduce = [to_aggregator_spec(s, loaded.config.task.answer_schema) for s in loaded.config.reduce]
    tools = RunTools(
        store=TaskItems(items),
        item_journal=ledger,
        aggregators=build_aggregators(reduce),
        run_item=make_item_runner(loaded, parts.fleet, parts.model, engine=None, quiet=True),
        gate=Gate(order.streams, loaded.config.limits.drain_s),
        progress=Progress(total=len(items)),
        fingerprint=bytes.fromhex(order.run["fingerprint"]),
        question_digest=compute_question_digest(loaded.config, parts.model),
        keep_raw=loaded.config.keep.raw == "all",
        simulated=order.run["simulated"],
        token_prices=TokenPrices(**order.tariff),
        open_account=no_account if budget is None else budget.open_account,
        budget=budget,
    )
    return TaskContext(tools, ledger, stop, budget)


T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0


def work_shard(order: dict[str, Json]) -> dict[str, Json]:
    """Work on one order and return its summary; for executors.

    It never raises for an item, and says as data what kept it from its work.
    """
    worker = get_worker()
    return worker.run(run_task(order, worker.resources))


class Worker:
    """An event loop in a thread of its own, and what orders have in common."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.resources = WorkerResources()
        threading.Thread(target=self._loop.run_forever, name="fanfold", daemon=True).start()
        # Before the interpreter ends its thread pools, which closing needs; ``atexit`` is too late.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]  # noqa: SLF001

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the worker's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Close what is kept between orders, unless the loop hangs."""
        closing = asyncio.run_coroutine_threadsafe(self.resources.aclose(), self._loop)
        try:
            closing.result(_CLOSE_S)
        except TimeoutError:
            logger.warning(
                "%s: the event loop hangs; its connections are not closed", worker_name()
            )


@lru_cache(maxsize=1)
def get_worker() -> Worker:
    """Return this process's worker: the one thing that a process keeps."""
    return Worker()


async def run_task(order: Mapping[str, Json], bag: WorkerResources) -> dict[str, Json]:
    """Work on one order in the running loop; the door for workers that are async themselves."""
    try:
        read = ShardTask.from_json(order)
        _check_version(read)
        return (await _run_task(read, bag)).to_json()
    except FanfoldError as error:
        return _make_error_result(order, error).to_json()


def _check_version(order: ShardTask) -> None:
    if order.fanfold != own_version():
        msg = (
            f"this worker runs fanfold {own_version()}, its coordinator {order.fanfold}; "
            "install the same version on both"
        )
        raise BackendError(msg)


async def _run_task(order: ShardTask, bag: WorkerResources) -> ShardResult:
    began = time.monotonic()
    async with (
        heartbeat(order) as stop,
        bag.use(order, worker_name()) as parts,
        open_lease(order, parts.loaded.config) as budget,
    ):
        job, late = make_task_context(order, parts, stop, budget), expiry_reason(order)
        drain = (lambda: late) if late else job.stop_reason
        part = await finish_items(Shard(0, len(order.items)), job.tools, drain)
        gate, used = job.tools.gate, spent_of_lease(budget)
        summary = ShardResult(
            shard=order.shard,
            attempt=order.attempt,
            fanfold=own_version(),
            worker=worker_name(),
            tally=part.tally,
            stopped=gate.reason,
            parts=None if job.journal.altered else part.state(),
            records=job.journal.records_to_send,
            error=None
            if gate.error is None or is_lease_exhausted(gate.error)
            else make_task_error(gate.error),
            seconds=time.monotonic() - began,
            endpoints=parts.stats_reporter.delta(),
            lease=None if order.lease is None else order.lease["name"],
            used=None if used is None else used.to_json(),
            short=gate.error is not None and is_lease_exhausted(gate.error),
        )
        return await asyncio.to_thread(_fit_message, summary, order.carry)


def _fit_message(summary: ShardResult, carry: int) -> ShardResult:
    """Leave out the part of the aggregate if it is too large; it can be folded from the records."""
    if summary.parts is None or len(orjson.dumps(summary.parts)) < carry:
        return summary
    return replace(summary, parts=None)


def _make_error_result(order: Any, error: FanfoldError) -> ShardResult:
    said = order if isinstance(order, Mapping) else {}
    return ShardResult(
        shard=str(said.get("shard")),
        attempt=int(said.get("attempt") or 0),
        fanfold=own_version(),
        worker=worker_name(),
        error=make_task_error(error),
    )


def make_task_error(error: Exception) -> dict[str, str]:
    """Return an error's class and text."""
    return {"class": type(error).__name__, "text": str(error)}


def worker_name() -> str:
    """Return host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"
