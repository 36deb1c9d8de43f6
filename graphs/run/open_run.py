"""Open the resources of a session: journal, items, budget, fleet or coordinator."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...backends.batch.files import BatchFolder, describe_open_batches
from ...backends.batch.transport import BatchRun, BatchTransport, open_batches
from ...backends.budget.budget import RunBudget, open_budget
from ...backends.budget.pricing import find_model_price as price_of
from ...backends.budget.pricing import find_token_prices
from ...backends.budget.spend_log import open_spend_logs
from ...backends.budget.tokens import make_prompt_counter, open_token_counter
from ...backends.cluster.walltime import Walltime
from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.money import NO_PRICES, NodeTime, TokenPrices
from ...backends.core.silence import SilenceWatch
from ...backends.core.types import CHAT_URL, Item
from ...backends.discovery.connect import (
    ReadyEndpoints,
    open_cache,
    open_deployments,
    open_fleet,
)
from ...backends.discovery.node_local import ready_endpoints
from ...backends.fleet.cache import RequestCache
from ...backends.fleet.fleet import Fleet
from ...backends.fleet.memory import FleetMemory
from ...backends.inputs.images import open_images
from ...backends.inputs.item_order import OrderedItems
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal import (
    Journal,
    describe_lost_files,
    list_lost_files,
    write_extents,
)
from ...backends.storage.results import replace_file, write_jsonl, write_parquet
from ...backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    read_prefix,
    remove_evaluation,
    write_evaluation,
    write_json,
)
from ...backends.workers.executor import WorkShard
from ...configs.backend import BackendConfig
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...nodes.aggregators import build_aggregators
from ...nodes.context import no_account
from ...nodes.item.item_state import ItemState
from ...nodes.shard.gate import Gate
from ...nodes.shard.progress import ItemTimes, Progress, ProgressStream
from ..remote.coordinator import STOP_GRACE_S, Coordinator, open_coordinator
from ..remote.deployments import follow_deployments
from ..remote.heartbeat import stop_earlier_workers
from ..remote.task_template import TaskTemplate, make_task_template
from .accounting import OpenRun, charge_node_time, make_reporter, write_reports_at_end
from .batch_output import write_batch_output
from .fingerprint import compute_fingerprint, compute_question_digest
from .input_check import check_requests
from .item_engine import is_run_by_engine, make_item_engine, make_item_variables
from .items import RunItem, choose_steps, make_item_runner
from .monitor import serve_metrics
from .noted_counts import note_counts
from .pipeline_resources import PipelineResources
from .prepare import ensure_run_identity
from .result_rows import ResultSource, make_result_layout
from .shard_plan import is_small_batch
from .shutdown import close_at_deadline
from .timeline import record_timeline, write_timeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening a run.

    Attributes:
        trace: Run and trace every item with LangGraph's engine, for any number of items.
        embedded: The graph was called by another program.
        retry_before: By run folder, the session before which failed items are retried; the first
            opening of a run sets its own number. Each superstep opens an embedded run, and items
            that failed in an earlier superstep of the invocation have already been retried. None
            does not retry failed items.
        progress_streams: By run folder, its progress stream; kept between openings.
        work_shard: The function that workers run.
        deadline: End of the session, or None.
        resources: What the run shares with other runs of its pipeline, or None.
        is_new: Whether this session has created the run, so that no other one has worked on it.
    """

    trace: bool
    embedded: bool
    retry_before: dict[Path, int] | None
    progress_streams: dict[Path, ProgressStream]
    work_shard: WorkShard
    deadline: Walltime | None = None
    resources: PipelineResources | None = None
    is_new: bool = False


@asynccontextmanager
async def open_run(
    folder: RunFolder,
    loaded: LoadedConfig,
    options: OpenOptions,
    ready: ReadyEndpoints | None = None,
) -> AsyncIterator[OpenRun]:
    """Open a run that the caller has locked; open the fleet only if items are open.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        options: How it is opened.
        ready: Its endpoints if they were just probed; None probes them.

    Raises:
        ConfigurationError: The settings do not fit the run.
        JournalError: The journal is damaged.
    """
    config = loaded.config
    async with AsyncExitStack() as stack:
        files = await asyncio.to_thread(_open_run_files, folder, loaded, options.is_new)
        stack.push_async_callback(asyncio.to_thread, files.files.close)
        journal, total, price = files.journal, len(files.store), files.price
        stack.push_async_callback(_close_journal, journal, folder, config)
        owner = f"{socket.gethostname()} pid {os.getpid()}"
        journal.start_session(owner, config.journal.fsync_s, files.next_session)
        if options.retry_before is not None:
            journal.reopen_failed(
                options.retry_before.setdefault(folder.path, journal.session_number)
            )
        progress = _progress(journal, total, files.node_time)
        run_item: RunItem = _refuse_item
        fleet: Fleet | None = None
        coordinator: Coordinator | None = None
        batches: BatchTransport | None = None
        budget: RunBudget | None = None
        gate, silence = _gate(config), SilenceWatch()
        if journal.count_items().open:
            budget = await stack.enter_async_context(
                open_budget(folder, config, price, journal, get_run_ids(files.provenance))
            )
            if ready is None:
                ready = await stack.enter_async_context(
                    ready_endpoints(config, loaded.plain["endpoints"], files.model)
                )
            files = await asyncio.to_thread(_settle_endpoints, folder, loaded, files, ready)
            if budget is not None:
                counter = await stack.enter_async_context(open_token_counter(ready))
                budget.budget.count_prompt = make_prompt_counter(counter)
            if config.backend.is_remote:
                _check_trace(options)
                about = {
                    **files.provenance,
                    "session": journal.session_number,
                    "stage": files.stage,
                }
                template = await stack.enter_async_context(
                    _open_template(folder, loaded, ready, about, price, budget, files.store)
                )
                if options.deadline is not None:
                    template = replace(template, ends_at=options.deadline.workers_stop_at)
                coordinator = await stack.enter_async_context(
                    open_coordinator(
                        options.work_shard,
                        template,
                        journal,
                        progress,
                        budget,
                        None if options.resources is None else options.resources.workers,
                    )
                )
                await stack.enter_async_context(
                    _record_workers(coordinator, files, folder, silence)
                )
            else:
                cache = await stack.enter_async_context(
                    open_cache(config, ready.simulated, folder.responses)
                )
                fleet = await stack.enter_async_context(
                    _open_charged_fleet(
                        config,
                        ready,
                        cache,
                        files.provenance["run"],
                        budget,
                        files.prefix,
                        None if options.resources is None else options.resources.fleets,
                    )
                )
                await stack.enter_async_context(_record_fleet(fleet, files, folder, silence))
                run_item = _make_item_runner(loaded, options, fleet, ready.model, total)
                batches = await stack.enter_async_context(
                    _open_batches(
                        config.backend,
                        BatchRun(
                            runs=files.run,
                            session=journal.session_number,
                            model=ready.specs[0].model or ready.model,
                            folder=folder.batches,
                            items=journal,
                            prices=price,
                            budget=budget,
                            is_stopping=lambda: gate.is_closed,
                            body_bytes=config.limits.body_bytes,
                            attempts=config.limits.attempts,
                        ),
                        ready,
                        fleet,
                        files.open_batches,
                    )
                )
        tools = OpenRun(
            store=files.store,
            order=_open_order(folder, files.store),
            item_journal=journal,
            aggregators=build_aggregators(config.list_aggregators()),
            run_item=run_item,
            gate=gate,
            progress=progress,
            fingerprint=bytes.fromhex(files.fingerprint),
            question_digest=compute_question_digest(config, files.model),
            constant_messages=config.parse_prompt().constants,
            fold=config.make_fold(),
            keep_raw=config.keep.raw == "all",
            simulated=files.simulated,
            token_prices=price,
            open_account=no_account if budget is None else budget.budget.open_account,
            budget=None if budget is None else budget.budget,
            coordinator=coordinator,
            progress_stream=options.progress_streams.setdefault(folder.path, ProgressStream()),
            fleet=fleet,
            silence=silence,
            batches=batches,
            stage=files.stage,
            make_item_variables=make_item_variables,
            is_level=files.is_level,
        )
        if journal.count_items().open:
            logs = open_spend_logs(folder, get_run_ids(files.provenance))
            await stack.enter_async_context(
                charge_node_time(tools, budget, logs, journal.session_number)
            )
        await stack.enter_async_context(write_batch_output(folder, config.batch, tools))
        await stack.enter_async_context(serve_metrics(tools, config.metrics.port))
        # most levels are short, and the end of each is in its provenance
        await stack.enter_async_context(note_counts(folder, tools, at_end=not tools.is_level))
        stack.enter_context(
            close_at_deadline(
                tools.gate,
                options.deadline,
                await _learn_from_records(tools, journal, budget),
            )
        )
        yield tools


@asynccontextmanager
async def _open_template(  # noqa: PLR0913, PLR0917 - what a session has, handed on once
    folder: RunFolder,
    loaded: LoadedConfig,
    ready: ReadyEndpoints,
    about: dict[str, Any],
    price: TokenPrices,
    budget: RunBudget | None,
    store: ItemStore,
) -> AsyncIterator[TaskTemplate]:
    """Yield the template of all tasks; follow the deployments of a gateway for the workers."""
    charge = None if budget is None else budget.budget.charge_probe
    url = CHAT_URL
    if loaded.config.input.is_batch:
        (first,) = await asyncio.to_thread(store.read, 0, 1)
        url = first.row["url"]
    async with open_deployments(loaded.config, ready, about["run"], charge, url) as (
        running,
        fleet,
    ):
        template = make_task_template(folder, loaded, running, about, price)
        async with follow_deployments(fleet, template.journal, template.token):
            yield template


@asynccontextmanager
async def _open_charged_fleet(  # noqa: PLR0913, PLR0917 - what a session has, handed on once
    config: RunConfig,
    ready: ReadyEndpoints,
    cache: RequestCache | None,
    run: str,
    budget: RunBudget | None,
    prefix: int | None,
    memory: FleetMemory | None,
) -> AsyncIterator[Fleet]:
    """Open the fleet of this process; the budget is charged for its probes."""
    async with open_fleet(config, ready, cache, run, prefix=prefix, memory=memory) as fleet:
        if budget is None:
            yield fleet
            return
        with fleet.count_probes(budget.budget.charge_probe):
            yield fleet


@asynccontextmanager
async def _record_fleet(
    fleet: Fleet, files: _RunFiles, folder: RunFolder, silence: SilenceWatch
) -> AsyncIterator[None]:
    """Write the timeline and the endpoints table of a fleet of this process."""
    session = files.journal.session_number
    async with (
        write_reports_at_end(make_reporter(fleet), folder, session, files.price),
        record_timeline(folder, fleet, silence, may_lack=files.is_new_level),
    ):
        yield


@asynccontextmanager
async def _record_workers(
    coordinator: Coordinator, files: _RunFiles, folder: RunFolder, silence: SilenceWatch
) -> AsyncIterator[None]:
    """Write the timeline and the endpoints table from what workers report."""
    reports, session = coordinator.stats_collector.reports, files.journal.session_number
    async with (
        write_reports_at_end(reports, folder, session, files.price),
        write_timeline(
            folder, lambda _: coordinator.take_timeline(), silence, may_lack=files.is_new_level
        ),
    ):
        yield


def _make_item_runner(
    loaded: LoadedConfig, options: OpenOptions, fleet: Fleet, model: str, total: int
) -> RunItem:
    """Return the function that runs an item of this process, by LangGraph's engine if watched."""
    config, trace = loaded.config, options.trace
    by_engine = is_run_by_engine(config, trace=trace, embedded=options.embedded, total=total)
    engine = make_item_engine(choose_steps(config)) if by_engine else None
    quiet = not is_small_batch(total) and not trace
    images = open_images(config)
    return make_item_runner(loaded, fleet, model, engine, quiet, images=images)


def _check_trace(options: OpenOptions) -> None:
    if options.trace:
        msg = (
            "--trace runs every item with LangGraph's engine in this process, but the settings run "
            "the shards on workers; add --set backend.kind=local"
        )
        raise ConfigurationError(msg)


async def _learn_from_records(
    tools: OpenRun, journal: Journal, budget: RunBudget | None
) -> ItemTimes | None:
    """Learn from earlier sessions how long items and answers of this process are.

    Returns:
        The times; None if workers or batches do the work, which goes on elsewhere, or if no item
        is open.
    """
    if tools.coordinator is not None or tools.batches is not None:
        return None
    counts = journal.count_items()
    if not counts.open:
        return None
    if counts.done or counts.failed:
        await asyncio.to_thread(_add_records, tools, journal, budget)
    return tools.progress.times


def _add_records(tools: OpenRun, journal: Journal, budget: RunBudget | None) -> None:
    total, times = tools.progress.total, tools.progress.times
    for index in random.Random(0).sample(range(total), min(total, _SAMPLED_RECORDS)):
        if journal.is_finished(index):
            record = journal.read_record(index)
            times.add(record, is_earlier=True)
            if budget is not None and record["requests"] == 1 and record["completion_tokens"]:
                budget.budget.lengths.add(record["completion_tokens"])


def _gate(config: RunConfig) -> Gate:
    """Return the gate for items in flight; shards on workers are bounded by their backends."""
    backend, drain_s = config.backend, config.limits.drain_s
    if backend.is_remote:
        return Gate(sys.maxsize, drain_s + STOP_GRACE_S, "shard")
    if backend.is_batch:
        return Gate(backend.lines * backend.active, drain_s, left=_BATCHES_LEFT)
    return Gate(config.limits.streams, drain_s)


_SAMPLED_RECORDS: Final = 512
"""Records of earlier sessions that are looked at."""
_BATCHES_LEFT: Final = "batches at the service go on and cannot be recalled"


@asynccontextmanager
async def _open_batches(
    config: BackendConfig,
    about: BatchRun,
    ready: ReadyEndpoints,
    fleet: Fleet,
    left: Sequence[str],
) -> AsyncIterator[BatchTransport | None]:
    """Open the transport of batches if the settings ask for it; yield None if they do not.

    Args:
        config: The backend.
        about: The run.
        ready: The endpoints.
        fleet: The fleet.
        left: A line for each batch of an earlier session that is still open.

    Raises:
        ConfigurationError: The deployment or the folder does not fit.
        JournalError: A record of an earlier session is damaged.
        RunStoppedError: The answers of an earlier session are gone.
    """
    if config.is_batch:
        async with open_batches(config, about, ready, fleet) as batches:
            yield batches
        return
    for line in left:
        logger.warning("%s with backend.kind: batch; this session sends the requests again", line)
    yield None


@dataclass(frozen=True, slots=True)
class _RunFiles:
    """The open files of a run."""

    files: ExitStack
    store: ItemStore
    journal: Journal
    provenance: dict[str, Any]
    next_session: int
    node_time: NodeTime
    price: TokenPrices
    open_batches: tuple[str, ...] = ()
    stage: str = ""

    @property
    def prefix(self) -> int | None:
        """Return the characters that are equal at the beginning of a group's prompts, or None."""
        return read_prefix(self.provenance)

    @property
    def run(self) -> tuple[str, ...]:
        return get_run_ids(self.provenance)

    @property
    def is_level(self) -> bool:
        return self.provenance.get("level") is not None

    @property
    def is_new_level(self) -> bool:
        """Return True in the first session of a level of an operator, which is mostly short."""
        return self.is_level and self.journal.session_number == 1

    @property
    def model(self) -> str:
        return str(self.provenance["model"])

    @property
    def simulated(self) -> bool:
        return bool(self.provenance["simulated"])

    @property
    def fingerprint(self) -> str:
        return str(self.provenance["fingerprint"])


def _open_run_files(folder: RunFolder, loaded: LoadedConfig, is_new: bool) -> _RunFiles:
    about = folder.read_provenance()
    if (
        compute_fingerprint(loaded.config, about["model"], about["simulated"])
        != about["fingerprint"]
    ):
        msg = (
            f"{folder.path}: the task or model settings differ from those of this run; use a new "
            "run folder"
        )
        raise ConfigurationError(msg)
    with ExitStack() as stack:
        about = ensure_run_identity(folder)
        stop_earlier_workers(
            folder.journal
        )  # before reading the journal: they may still write to it
        store = stack.enter_context(ItemStore(folder.items))
        lost = list_lost_files(folder.journal)
        journal = Journal(folder.journal, get_run_ids(about), len(store))
        stack.callback(_record_extents, folder, journal)
        if lost:
            logger.warning("%s", describe_lost_files(lost, journal))
        if extents := journal.extents():
            write_extents(folder.journal, extents)
        _save_snapshot(journal)
        logs = open_spend_logs(folder, get_run_ids(about))
        place = folder.read_place()
        return _RunFiles(
            stack.pop_all(),
            store,
            journal,
            about,
            logs.next_session(),
            NodeTime() if is_new else logs.total_node_time(),
            find_token_prices(loaded.config, about["model"], bool(about["simulated"])) or NO_PRICES,
            tuple(describe_open_batches(BatchFolder(folder.batches).read())),
            "" if place is None else place.stage,
        )


def _open_order(folder: RunFolder, store: ItemStore) -> OrderedItems | None:
    """Return the items in the order of work; None for the order of the input."""
    path = folder.order
    return OrderedItems(store, path, store.samples) if path.exists() else None


def _record_extents(folder: RunFolder, journal: Journal) -> None:
    try:
        write_extents(folder.journal, journal.extents())
    except JournalError as error:
        logger.warning("%s", error.message)  # only the notice of a missing file depends on it
    _save_snapshot(journal)


def _save_snapshot(journal: Journal) -> None:
    try:
        journal.save_snapshot()
    except JournalError as error:
        logger.warning("%s; the next session reads the whole journal", error.message)


def _progress(journal: Journal, total: int, held: NodeTime) -> Progress:
    counts = journal.count_items()
    return Progress(
        total=total,
        done=counts.done,
        failed=counts.failed,
        ended_before=counts.done + counts.failed,
        usage=journal.total_usage(),
        node_time=held,
    )


def _settle_endpoints(
    folder: RunFolder, loaded: LoadedConfig, files: _RunFiles, ready: ReadyEndpoints
) -> _RunFiles:
    """Return the run's files, after recording whether the endpoints are simulated.

    A run that was prepared before its endpoints existed records this here, once.

    Raises:
        ConfigurationError: The endpoints changed from real to simulated, or back, or refuse a
            request of the input.
    """
    check_requests(loaded.config, ready, files.store, files.journal.is_finished)
    now = ready.simulated
    if files.provenance["simulated"] is None:
        settled = compute_fingerprint(loaded.config, files.model, now)
        cost = price_of(loaded.config, files.model, now)
        kept = {"price": None if cost is None else cost.to_json()}
        about = files.provenance | kept | {"simulated": now, "fingerprint": settled}
        folder.write_provenance(about)
        return replace(files, provenance=about)
    _check_simulated(now, files.simulated)
    return files


def _check_simulated(now: bool, before: bool) -> None:
    if now != before:
        kinds = ("real", "simulated")
        msg = (
            f"this run's answers are {kinds[before]} and these endpoints are {kinds[now]}; a run "
            "cannot mix them: use a new run folder"
        )
        raise ConfigurationError(msg)


async def _refuse_item(item: Item) -> ItemState:
    raise ConfigurationError(f"item {item.id!r} is open, but the journal has no open items")


async def _close_journal(journal: Journal, folder: RunFolder, config: RunConfig) -> None:
    """Close the journal; remove the stored answers about pieces of parts if no item needs them.

    A failed item may: a session that retries it does not pay again for its other pieces.
    """
    await journal.aclose()
    counts = journal.count_items()
    if config.cache == "off" and not counts.open and not counts.failed:
        with suppress(OSError):  # on NFS, while a worker has a file open: it stays, unused
            await asyncio.to_thread(shutil.rmtree, folder.responses)


def write_results(folder: RunFolder, loaded: LoadedConfig, tools: OpenRun) -> ResultSource:
    """Write results and failures; return what they were read from.

    Raises:
        JournalError: A file cannot be written.
    """
    schema, fold = loaded.config.task.answer_schema, tools.fold
    certain = loaded.config.task.certainty is not None
    layout = make_result_layout(schema, tools.store, fold=fold, certain=certain)
    source = ResultSource(tools.item_journal, tools.store, layout, tools.is_priced, fold=fold)
    _write_results_and_evaluation(folder, loaded.config, source, tools.simulated)
    layout = make_result_layout(
        schema, tools.store, certain=certain
    )  # each failed sample has a row
    samples = replace(source, layout=layout, fold=None)
    with replace_file(folder.failures) as file:
        write_jsonl(samples.iter_rows("failed"), file, layout)
    return source


def write_aggregate(
    folder: RunFolder,
    tools: OpenRun,
    aggregate: list[dict[str, Any]],
    progress: dict[str, Any],
    extents: Mapping[str, int],
) -> None:
    """Write the aggregate.

    Args:
        folder: The run's folder.
        tools: The open run.
        aggregate: The results of all entries of ``reduce``.
        progress: The counts of the run.
        extents: How far the journal was read for them.

    Raises:
        JournalError: The file cannot be written.
    """
    about = folder.read_provenance()
    content = {"v": 1, "run": about["run"], "simulated": tools.simulated}
    write_json(
        folder.aggregate,
        {**content, "progress": progress, "aggregate": aggregate, "journal": extents},
    )


def refer_to_results(folder: RunFolder, simulated: bool) -> dict[str, Any]:
    """Return references to all results of a run."""
    return {
        "folder": str(folder.path),
        "table": str(folder.results),
        "failures": str(folder.failures),
        "simulated": simulated,
    }


def _write_results_and_evaluation(
    folder: RunFolder, config: RunConfig, source: ResultSource, simulated: bool
) -> None:
    if not config.evaluate or simulated:
        write_parquet(source.iter_rows(), folder.results, source.layout)
        if config.evaluate:
            write_evaluation(folder, (), simulated)
        else:
            remove_evaluation(folder)
        return
    from .evaluation import make_evaluator  # noqa: PLC0415 - numpy is slow to import

    evaluator = make_evaluator(config, source.store)
    write_parquet(evaluator.watch(source.iter_rows()), folder.results, source.layout)
    write_evaluation(folder, evaluator.to_json(), simulated)
