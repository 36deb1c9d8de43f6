"""Open what a session needs: journal, items, budget, fleet or coordinator."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...backends.budget.budget import RunBudget, open_budget
from ...backends.budget.pricing import find_model_price as price_of
from ...backends.budget.pricing import find_token_prices
from ...backends.budget.spend_log import SpendLogs
from ...backends.budget.tokens import make_prompt_counter, open_token_counter
from ...backends.cluster.walltime import Walltime
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import NO_PRICES, NodeTime
from ...backends.core.types import Item
from ...backends.discovery.connect import open_cache, open_fleet
from ...backends.discovery.node_local import ready_endpoints
from ...backends.fleet.fleet import Fleet
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal_index import Journal
from ...backends.storage.results import make_rows, replace_file, write_jsonl, write_parquet
from ...backends.storage.run_folder import RunFolder, get_run_ids, write_json
from ...backends.workers.executor import WorkShard
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.reduce import to_aggregator_spec
from ...nodes.aggregators import build_aggregators
from ...nodes.context import RunTools, no_account
from ...nodes.shard.gate import Gate
from ...nodes.shard.progress import Progress, ProgressStream
from ...nodes.state import ItemState
from ..remote.coordinator import STOP_GRACE_S, Coordinator, open_coordinator
from ..remote.heartbeat import stop_earlier_workers
from ..remote.tasks import make_task_template
from .items import ItemEngine, RunItem, is_run_by_engine, is_small_batch, make_item_runner
from .monitor import serve_metrics
from .open_run import OpenedRun, charge_node_time, make_reporter, write_reports_at_end
from .prepare import compute_fingerprint, compute_question_digest, ensure_run_identity
from .shutdown import close_at_deadline


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a run's items are run.

    Attributes:
        trace: Run and trace every item by LangGraph's engine, however many there are.
        embedded: Whether the graph was called by somebody else's program.
        retry_before: By run folder, the life before which failed items are asked again; a run's
            first opening notes its own. An embedded run is opened by each superstep, and what
            failed in an earlier one of the same invocation has been asked again already. None
            leaves failed items alone.
        progress_streams: By run folder, what tells how it goes on; kept from one opening to the
            next.
        make_engine: Runs one item by LangGraph's engine; the flag tells whether through
            ``task.graph``.
        work_shard: What workers elsewhere run.
        deadline: When the life must end, or None.
    """

    trace: bool
    embedded: bool
    retry_before: dict[Path, int] | None
    progress_streams: dict[Path, ProgressStream]
    make_engine: Callable[[bool], ItemEngine]
    work_shard: WorkShard
    deadline: Walltime | None = None


@asynccontextmanager
async def open_run(
    folder: RunFolder, loaded: LoadedConfig, mode: OpenOptions
) -> AsyncIterator[RunTools]:
    """Open a run for work, which the caller has locked; the fleet only if items are open.

    Raises:
        ConfigurationError: The settings do not fit the run.
        JournalError: The journal is damaged.
    """
    config = loaded.config
    async with AsyncExitStack() as stack:
        books = await asyncio.to_thread(_open_run_files, folder, loaded)
        stack.push_async_callback(asyncio.to_thread, books.files.close)
        ledger, total = books.journal, len(books.store)
        price = (
            await asyncio.to_thread(find_token_prices, config, books.model, books.simulated)
            or NO_PRICES
        )
        stack.push_async_callback(ledger.aclose)
        who = f"{socket.gethostname()} pid {os.getpid()}"
        ledger.start_session(who, config.journal.fsync_s, books.next_session)
        if mode.retry_before is not None:
            ledger.reopen_failed(mode.retry_before.setdefault(folder.path, ledger.session_number))
        progress = _progress(ledger, total, books.node_time)
        run_item: RunItem = _refuse_item
        fleet: Fleet | None = None
        crew: Coordinator | None = None
        spends: RunBudget | None = None
        if ledger.count_items().open:
            spends = await stack.enter_async_context(
                open_budget(folder, config, price, ledger, get_run_ids(books.provenance))
            )
            up = await stack.enter_async_context(
                ready_endpoints(config, loaded.plain["endpoints"], books.model)
            )
            books = await asyncio.to_thread(_settle_simulated, folder, loaded, books, up.simulated)
            if spends is not None:
                counter = await stack.enter_async_context(open_token_counter(up))
                spends.budget.count_prompt = make_prompt_counter(counter)
            if config.backend.is_remote:
                _check_trace(mode)
                about = {**books.provenance, "session": ledger.session_number}
                terms = make_task_template(folder, loaded, up, about, price)
                if mode.deadline is not None:
                    terms = replace(terms, ends_at=mode.deadline.workers_stop_at)
                crew = await stack.enter_async_context(
                    open_coordinator(mode.work_shard, terms, ledger, progress, spends)
                )
                told = crew.stats_collector.reports
                await stack.enter_async_context(
                    write_reports_at_end(told, folder, ledger.session_number, price)
                )
            else:
                reuse = await stack.enter_async_context(
                    open_cache(config, up.simulated, folder.responses)
                )
                fleet = await stack.enter_async_context(open_fleet(config, up, reuse))
                told = make_reporter(fleet)
                await stack.enter_async_context(
                    write_reports_at_end(told, folder, ledger.session_number, price)
                )
                seen = is_run_by_engine(
                    config, trace=mode.trace, embedded=mode.embedded, total=total
                )
                engine = mode.make_engine(config.task.graph is not None) if seen else None
                quiet = not is_small_batch(total) and not mode.trace
                run_item = make_item_runner(loaded, fleet, up.model, engine, quiet)
        tools = OpenedRun(
            store=books.store,
            item_journal=ledger,
            aggregators=build_aggregators(
                [to_aggregator_spec(s, config.task.answer_schema) for s in config.reduce]
            ),
            run_item=run_item,
            gate=_gate(config, crew is not None),
            progress=progress,
            fingerprint=bytes.fromhex(books.fingerprint),
            question_digest=compute_question_digest(config, books.model),
            keep_raw=config.keep.raw == "all",
            simulated=books.simulated,
            token_prices=price,
            open_account=no_account if spends is None else spends.budget.open_account,
            budget=None if spends is None else spends.budget,
            coordinator=crew,
            progress_stream=mode.progress_streams.setdefault(folder.path, ProgressStream()),
            fleet=fleet,
            journal=ledger,
        )
        if ledger.count_items().open:
            shelf = SpendLogs(folder.budget, get_run_ids(books.provenance))
            await stack.enter_async_context(
                charge_node_time(tools, spends, shelf, ledger.session_number)
            )
        await stack.enter_async_context(serve_metrics(tools, config.metrics.port))
        stack.enter_context(close_at_deadline(tools.gate, mode.deadline))
        yield tools


def _check_trace(mode: OpenOptions) -> None:
    if mode.trace:
        msg = (
            "--trace runs every item by LangGraph's engine in this process, and the settings send "
            "the shards elsewhere; add --set backend.kind=local"
        )
        raise ConfigurationError(msg)


def _gate(config: RunConfig, elsewhere: bool) -> Gate:
    """Return the bound on items in flight; of shards elsewhere, the places bound the number."""
    if elsewhere:
        return Gate(sys.maxsize, config.limits.drain_s + STOP_GRACE_S, "shards")
    return Gate(config.limits.streams, config.limits.drain_s)


@dataclass(frozen=True, slots=True)
class _RunFiles:
    """What is on disk of a run, opened."""

    files: ExitStack
    store: ItemStore
    journal: Journal
    provenance: dict[str, Any]
    next_session: int
    node_time: NodeTime

    @property
    def run(self) -> tuple[str, ...]:
        return get_run_ids(self.provenance)

    @property
    def model(self) -> str:
        return str(self.provenance["model"])

    @property
    def simulated(self) -> bool:
        return bool(self.provenance["simulated"])

    @property
    def fingerprint(self) -> str:
        return str(self.provenance["fingerprint"])


def _open_run_files(folder: RunFolder, loaded: LoadedConfig) -> _RunFiles:
    about = folder.read_provenance()
    if (
        compute_fingerprint(loaded.config, about["model"], about["simulated"])
        != about["fingerprint"]
    ):
        msg = (
            f"{folder.path}: this run asks for something else than the settings given with it "
            "(task or model); start a new run in another folder"
        )
        raise ConfigurationError(msg)
    with ExitStack() as stack:
        about = ensure_run_identity(folder)
        stop_earlier_workers(folder.journal)  # before the journal is read: they still write to it
        store = stack.enter_context(ItemStore(folder.items))
        ledger = Journal(folder.journal, get_run_ids(about), len(store))
        shelf = SpendLogs(folder.budget, get_run_ids(about))
        return _RunFiles(
            stack.pop_all(), store, ledger, about, shelf.next_session(), shelf.total_node_time()
        )


def _progress(ledger: Journal, total: int, held: NodeTime) -> Progress:
    counts, spent = ledger.count_items(), ledger.total_usage()
    return Progress(
        total=total,
        done=counts.done,
        failed=counts.failed,
        ended_before=counts.done + counts.failed,
        requests=spent.requests,
        prompt_tokens=spent.prompt_tokens,
        cached_tokens=spent.cached_tokens,
        completion_tokens=spent.completion_tokens,
        lost_tokens=spent.lost_tokens,
        useful_tokens=spent.useful_tokens,
        nano_usd=spent.nano_usd,
        reused=spent.reused,
        useful_nano_usd=spent.useful_nano_usd,
        node_time=held,
    )


def _settle_simulated(
    folder: RunFolder, loaded: LoadedConfig, books: _RunFiles, now: bool
) -> _RunFiles:
    """Return the run's books, in which it is settled whether the endpoints are simulated.

    A run whose endpoints nobody could ask when it was prepared learns it here, once.

    Raises:
        ConfigurationError: They are not what they were.
    """
    if books.provenance["simulated"] is None:
        settled = compute_fingerprint(loaded.config, books.model, now)
        cost = price_of(loaded.config, books.model, now)
        kept = {"price": None if cost is None else cost.to_json()}
        about = books.provenance | kept | {"simulated": now, "fingerprint": settled}
        folder.write_provenance(about)
        return replace(books, provenance=about)
    _check_simulated(now, books.simulated)
    return books


def _check_simulated(now: bool, before: bool) -> None:
    if now != before:
        kinds = ("real", "simulated")
        msg = (
            f"this run's answers are {kinds[before]} and these endpoints are {kinds[now]}; the two "
            "never mix: start a new run in another folder"
        )
        raise ConfigurationError(msg)


async def _refuse_item(item: Item) -> ItemState:
    raise ConfigurationError(f"item {item.id!r} is open, though the journal says that none is")


def write_results(
    folder: RunFolder,
    loaded: LoadedConfig,
    tools: RunTools,
    aggregate: list[dict[str, Any]],
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Write results, failures and aggregate; return references to them.

    Raises:
        JournalError: A file could not be written.
    """
    extents = tools.item_journal.extents()
    schema, priced = loaded.config.task.answer_schema, tools.is_priced
    write_parquet(
        make_rows(tools.item_journal.read_records(), priced=priced), folder.results, schema
    )
    with replace_file(folder.failures) as file:
        write_jsonl(make_rows(tools.item_journal.read_records("failed"), priced=priced), file)
    about = folder.read_provenance()
    content = {"v": 1, "run": about["run"], "simulated": tools.simulated}
    write_json(
        folder.aggregate,
        {**content, "progress": progress, "aggregate": aggregate, "journal": extents},
    )
    return {
        "folder": str(folder.path),
        "table": str(folder.results),
        "failures": str(folder.failures),
        "simulated": tools.simulated,
    }
