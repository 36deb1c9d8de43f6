"""The worker: ``work_shard(task) -> result``, and the resources kept between tasks."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from ..backends.budget.budget import Budget
from ..backends.budget.leases import (
    expiry_reason,
    is_lease_exhausted,
    open_lease,
    open_worker_logs,
    spent_of_lease,
)
from ..backends.budget.spend_log import read_lease_clock
from ..backends.core.aio import LoopThread, SharedResource
from ..backends.core.errors import BackendError, FanfoldError
from ..backends.core.messages import ShardResult, ShardTask, own_version
from ..backends.core.money import TokenPrices
from ..backends.core.protocols import CallLog, PromptCounter
from ..backends.core.terminal import count_nouns
from ..backends.core.types import Item, Json, Shard
from ..backends.core.values import STATUSES, json_size
from ..backends.discovery.connect import (
    ReadyEndpoints,
    find_ready_endpoints,
    open_cache,
    open_endpoint_set,
    open_fleet,
    unpack_deployments,
)
from ..backends.fleet.endpoint import EndpointSpec
from ..backends.fleet.fleet import Fleet, StatsReporter
from ..backends.fleet.memory import FleetMemory
from ..backends.fleet.timeline import TimelineRecorder, open_recorder
from ..backends.inputs.images import CarriedImages, open_images
from ..backends.storage.journal_file import make_worker_path
from ..backends.storage.journal_writer import JournalWriter
from ..backends.storage.run_folder import RESPONSES_FOLDER
from ..backends.storage.worker_journal import (
    ResultJournal,
    TaskJournal,
    WorkerJournal,
)
from ..configs.loader import LoadedConfig, load_config
from ..nodes.aggregators import build_aggregators
from ..nodes.context import RunTools, no_account
from ..nodes.shard.gate import Gate
from ..nodes.shard.local import finish_items
from ..nodes.shard.progress import Progress
from .remote.deployments import share_watches
from .remote.heartbeat import STOPPED, TIME_OVER, StopSignal, heartbeat
from .remote.rate_leases import follow_share
from .run.fingerprint import compute_question_digest
from .run.items import make_item_runner
from .run.open_calls import record_worker_calls

_MOST_CARRIES: Final = 2
"""Largest result, as a multiple of its task's `carry`."""
_BIN_MS: Final = 1_000
_MOST_REPORT: Final = 256_000
"""Bytes that a result's report for the timeline aims at."""
FSYNC_S: Final = 1.0
"""Seconds between flushes of a worker's journal: the most work that the loss of a node costs."""
IDLE_S: Final = 60.0
"""Seconds without a task after which a worker closes its connections and journal."""


@dataclass(frozen=True, slots=True)
class TaskResources:
    """Resources that the tasks of one run share: settings, fleet, statistics, journal file."""

    loaded: LoadedConfig
    fleet: Fleet
    model: str
    writer: JournalWriter | None
    stats_reporter: StatsReporter
    recorder: TimelineRecorder
    open_calls: dict[int, CallLog]
    record_open_calls: Callable[[], Awaitable[None]] | None
    count_tokens: PromptCounter | None = None


class WorkerResources:
    """Opens task resources, and keeps those last used open for the next task.

    Args:
        idle_s: Seconds without a task after which they are closed.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._shared = SharedResource[TaskResources]()
        self._kept: tuple[str, AsyncExitStack] | None = None
        self._keeping = asyncio.Lock()
        self._memory = FleetMemory()
        self._idle_s = idle_s
        self._idle: asyncio.Task[None] | None = None
        self._active_tasks = 0

    @asynccontextmanager
    async def use(self, task: ShardTask, worker: str) -> AsyncIterator[TaskResources]:
        """Provide the resources of a task, opening them if needed."""
        key = _key(task)
        self._active_tasks += 1
        try:
            async with self._shared.use(
                key, lambda: open_task_resources(task, worker, self._memory)
            ) as resources:
                await self._keep_open(key, task, worker)
                yield resources
        finally:
            self._active_tasks -= 1
            if self._idle is None:
                self._idle = asyncio.create_task(self._close_when_idle())

    async def _keep_open(self, key: str, task: ShardTask, worker: str) -> None:
        async with self._keeping:
            if self._kept is not None and self._kept[0] == key:
                return
            await self._close_kept()
            stack = AsyncExitStack()
            use = self._shared.use(key, lambda: open_task_resources(task, worker, self._memory))
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
            quiet = 0.0 if self._active_tasks else quiet + self._idle_s / 4
        self._idle = None
        async with self._keeping:
            await self._close_kept()
            if not self._active_tasks:  # else a new task uses the connections
                await self._memory.aclose()

    async def aclose(self) -> None:
        """Close the resources that are kept open."""
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.wait({self._idle})
            self._idle = None
        async with self._keeping:
            await self._close_kept()
            await self._memory.aclose()


def _key(task: ShardTask) -> str:
    same = [task.run, task.settings, task.urls, task.journal]
    data = orjson.dumps(same, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@asynccontextmanager
async def open_task_resources(
    task: ShardTask, worker: str, memory: FleetMemory | None = None
) -> AsyncIterator[TaskResources]:
    """Open settings, fleet and journal for the tasks of a run.

    Args:
        task: The first of them.
        worker: This worker's name.
        memory: What fleets of this process have learned, e.g. those of an earlier stage.

    Raises:
        ConfigurationError: The settings do not fit this node, e.g. a variable is not set.
        BackendError: The shared folder is not reachable from this node.
    """
    loaded = await asyncio.to_thread(load_config, task.settings)
    model = task.run["model"]
    async with AsyncExitStack() as stack:
        ready = await stack.enter_async_context(_open_endpoints(task, loaded))
        responses = (
            Path(task.journal).parent / RESPONSES_FOLDER if task.journal is not None else None
        )
        cache = await stack.enter_async_context(
            open_cache(loaded.config, ready.simulated, responses)
        )
        fleet = await stack.enter_async_context(
            open_fleet(
                loaded.config,
                ready,
                cache,
                task.run["id"],
                prefix=task.run.get("prefix"),
                memory=memory,
            )
        )
        recorder = await stack.enter_async_context(open_recorder(lambda: fleet.endpoints, _BIN_MS))
        writer, open_calls, record_now = None, dict[int, CallLog](), None
        if task.journal is not None:
            writer = await _open_journal(Path(task.journal), task, worker)
            stack.push_async_callback(writer.close)
            logs = await asyncio.to_thread(open_worker_logs, task)
            prices, session = TokenPrices(**task.tariff), task.run["session"]
            record_now = await stack.enter_async_context(
                record_worker_calls(open_calls, prices, logs, session, worker)
            )
        count = None
        if task.lease is not None:
            from ..backends.budget.tokens import (  # noqa: PLC0415 - for runs with a budget
                make_prompt_counter,
                open_token_counter,
            )

            count = make_prompt_counter(await stack.enter_async_context(open_token_counter(ready)))
        yield TaskResources(
            loaded=loaded,
            fleet=fleet,
            model=model,
            writer=writer,
            stats_reporter=StatsReporter(lambda: fleet.endpoints),
            recorder=recorder,
            open_calls=open_calls,
            record_open_calls=record_now,
            count_tokens=count,
        )


@asynccontextmanager
async def _open_endpoints(task: ShardTask, loaded: LoadedConfig) -> AsyncIterator[ReadyEndpoints]:
    """Open the endpoints that this worker uses."""
    config, written = loaded.config, loaded.plain["endpoints"]
    model, simulated = task.run["model"], task.run["simulated"]
    if task.urls is not None:
        key = config.endpoints.api_key.get_secret_value()
        yield ReadyEndpoints(tuple(EndpointSpec(url, key) for url in task.urls), model, simulated)
    elif task.deployments is not None:
        ready = unpack_deployments(config, task.deployments, model)
        if task.journal is not None:
            ready = await share_watches(ready, Path(task.journal), task.run["token"])
        yield ready
    elif config.backend.node_endpoints:
        from ..backends.discovery.node_local import (  # noqa: PLC0415 - for servers of nodes
            node_endpoints,
        )

        async with node_endpoints(
            config, written, model, simulated, _make_stop_check(task)
        ) as ready:
            yield ready
    else:
        async with open_endpoint_set(config, written) as endpoint_set:
            if config.endpoints.needs_probe:
                yield await find_ready_endpoints(endpoint_set, model, config.endpoints.models)
            else:
                names = config.endpoints.models
                specs = tuple(
                    spec
                    for spec in endpoint_set.specs
                    if spec.model in {None, model} or names.get(spec.model) == model
                )
                yield ReadyEndpoints(specs, model, simulated, endpoint_set=endpoint_set)


def _make_stop_check(task: ShardTask) -> Callable[[], str | None]:
    """Return a function that returns why a worker must stop its start-up, or None."""

    def over() -> str | None:
        if task.stop_file is not None and Path(task.stop_file).exists():
            return STOPPED
        late = task.ends_at is not None and time.time() > task.ends_at
        return TIME_OVER if late else None

    return over


async def _open_journal(folder: Path, task: ShardTask, worker: str) -> JournalWriter:
    if not await asyncio.to_thread(folder.is_dir):
        msg = (
            f"the run folder's journal {folder} is not reachable from this worker; put the run "
            "folder on a shared file system, or set backend.shared_folder: false"
        )
        raise BackendError(msg)
    path = await asyncio.to_thread(make_worker_path, folder, task.run["session"], worker)
    return JournalWriter(path, {"run": task.run["id"], "session": worker}, FSYNC_S)


class TaskItems:
    """The items of a task, with the interface of a run's item store."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._items)

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items from ``lo`` up to, not including, ``hi``."""
        return self._items[lo:hi]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """A task being processed: its tools, its stop signal and its budget."""

    tools: RunTools
    journal: TaskJournal
    stop: StopSignal
    budget: Budget | None = None

    def stop_reason(self) -> str | None:
        """Return why no further item may start, or None."""
        return self.journal.full_reason or self.stop.stop_reason()


def make_task_context(
    task: ShardTask, resources: TaskResources, stop: StopSignal, budget: Budget | None
) -> TaskContext:
    """Return the context of one task, based on open resources."""
    loaded = resources.loaded
    items = task.unpack_items(loaded.config.task.samples)
    stop.check_walltime(loaded.config.limits, os.environ)
    if resources.writer is None:
        journal: TaskJournal = ResultJournal(task.carry, task.streams)
    else:
        journal = WorkerJournal(resources.writer)
    if budget is not None:
        budget.count_prompt = resources.count_tokens
    tools = RunTools(
        store=TaskItems(items),
        item_journal=journal,
        aggregators=build_aggregators(loaded.config.list_aggregators()),
        run_item=make_item_runner(
            loaded,
            resources.fleet,
            resources.model,
            engine=None,
            quiet=True,
            images=open_images(loaded.config)
            if task.images is None
            else CarriedImages.from_json(task.images),
        ),
        gate=Gate(task.streams, loaded.config.limits.drain_s),
        progress=Progress(total=len(items)),
        fingerprint=bytes.fromhex(task.run["fingerprint"]),
        question_digest=compute_question_digest(loaded.config, resources.model),
        constant_messages=loaded.config.parse_prompt().constants,
        fold=loaded.config.make_fold(),
        keep_raw=loaded.config.keep.raw == "all",
        simulated=task.run["simulated"],
        token_prices=TokenPrices(**task.tariff),
        open_account=no_account if budget is None else budget.open_account,
        budget=budget,
        open_calls=resources.open_calls,
        stage=task.run.get("stage", ""),
    )
    return TaskContext(tools, journal, stop, budget)


T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0


def work_shard(task: dict[str, Json]) -> dict[str, Json]:
    """Process one task and return its result; the entry point for executors.

    Never raises for an item, and returns an error that prevents its work as data.
    """
    worker = get_worker()
    return worker.run(run_task(task, worker.resources))


class Worker:
    """An event loop in a separate thread, and the resources shared between tasks."""

    def __init__(self) -> None:
        self._loop = LoopThread("fanfold").loop
        self.resources = WorkerResources()
        # Closing needs the thread pools, which the interpreter stops before it runs ``atexit``.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]  # noqa: SLF001

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the worker's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Close the shared resources, unless the loop hangs."""
        closing = asyncio.run_coroutine_threadsafe(self.resources.aclose(), self._loop)
        try:
            closing.result(_CLOSE_S)
        except TimeoutError:
            logger.warning(
                "worker %s: the event loop does not respond; its connections stay open",
                worker_name(),
            )


@lru_cache(maxsize=1)
def get_worker() -> Worker:
    """Return the worker of this process, creating it on first use."""
    return Worker()


async def run_task(task: Mapping[str, Json], shared: WorkerResources) -> dict[str, Json]:
    """Process one task in the running loop; the entry point for async workers."""
    try:
        read = ShardTask.from_json(task)
        _check_version(read)
        return (await _run_task(read, shared)).to_json()
    except FanfoldError as error:
        return _make_error_result(task, error).to_json()


def _check_version(task: ShardTask) -> None:
    if task.fanfold != own_version():
        msg = (
            f"this worker runs fanfold {own_version()}, its coordinator {task.fanfold}; "
            "install the same version on both"
        )
        raise BackendError(msg)


async def _run_task(task: ShardTask, shared: WorkerResources) -> ShardResult:
    began, received = time.monotonic(), read_lease_clock()
    async with (
        heartbeat(task, worker_name()) as stop,
        shared.use(task, worker_name()) as resources,
        follow_share(task, resources.fleet.limiter, worker_name()),
        open_lease(task, resources.loaded.config, received) as budget,
        AsyncExitStack() as stack,
    ):
        if budget is not None:
            stack.enter_context(resources.fleet.count_probes(budget.charge_probe))
        stop.recorder = resources.recorder
        context, late = make_task_context(task, resources, stop, budget), expiry_reason(task)
        drain = (lambda: late) if late else context.stop_reason
        part = await finish_items(Shard(0, len(task.items)), context.tools, drain)
        if resources.record_open_calls is not None:  # engines may kill an idle worker at any time
            await resources.record_open_calls()
        gate, used = context.tools.gate, spent_of_lease(budget)
        result = ShardResult(
            shard=task.shard,
            attempt=task.attempt,
            fanfold=own_version(),
            worker=worker_name(),
            tally=part.tally,
            stopped=gate.reason,
            parts=None if context.journal.altered or part.has_open_rows else part.state(),
            records=context.journal.records_to_send,
            error=None
            if gate.error is None or is_lease_exhausted(gate.error)
            else make_task_error(gate.error),
            seconds=time.monotonic() - began,
            endpoints=resources.stats_reporter.delta(),
            timeline=_make_report(resources.recorder, task.carry),
            lease=None if task.lease is None else task.lease["name"],
            used=None if used is None else used.to_json(),
            short=gate.error is not None and is_lease_exhausted(gate.error),
        )
        return await asyncio.to_thread(_fit_message, result, task.carry)


def _make_report(recorder: TimelineRecorder, carry: int) -> dict[str, Json] | None:
    """Return what heartbeats have not reported for the timeline, if there is anything."""
    delta = recorder.take()
    return delta.to_json(min(_MOST_REPORT, carry // 8)) if delta else None


def _fit_message(result: ShardResult, carry: int) -> ShardResult:
    """Drop what does not fit: the partial aggregate and the timeline, then the last records.

    The coordinator can fold the records itself. It sends items without a record again.
    """
    most = _MOST_CARRIES * carry
    if result.parts is not None and json_size(result.parts) > carry:
        result = replace(result, parts=None)
    size = json_size(result.to_json())
    if size <= most or result.records is None:
        return result
    result = replace(result, parts=None, timeline=None)
    records, dropped = list(result.records or ()), 0
    size = json_size(result.to_json())
    if size > most:  # the message about what was dropped needs room as well
        said = replace(result, dropped=len(records), stopped=_describe_dropped(len(records)))
        size = max(size, json_size(said.to_json()))
    while size > most and len(records) > 1:
        size -= json_size(records.pop()) + len(", ")
        dropped += 1
    if not dropped:
        return result
    return replace(
        result,
        records=records,
        dropped=dropped,
        tally={status: sum(r["status"] == status for r in records) for status in STATUSES},
        stopped=_describe_dropped(dropped),
    )


def _describe_dropped(count: int) -> str:
    return f"{count_nouns(count, 'record')} did not fit in the result"


def _make_error_result(task: Any, error: FanfoldError) -> ShardResult:
    data = task if isinstance(task, Mapping) else {}
    return ShardResult(
        shard=str(data.get("shard")),
        attempt=int(data.get("attempt") or 0),
        fanfold=own_version(),
        worker=worker_name(),
        error=make_task_error(error),
    )


def make_task_error(error: Exception) -> dict[str, str]:
    """Return the class and text of an error."""
    return {"class": type(error).__name__, "text": str(error)}


def worker_name() -> str:
    """Return this worker's name, ``host:process``."""
    return f"{socket.gethostname()}:{os.getpid()}"
