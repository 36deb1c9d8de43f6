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

from ...backends.budget.budget import Spending, spending
from ...backends.budget.pricing import price as price_of
from ...backends.budget.pricing import tariff
from ...backends.budget.spend_log import Shelf
from ...backends.budget.tokens import exact_count, token_counter
from ...backends.cluster.walltime import Walltime
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import FREE, Held
from ...backends.core.types import Item
from ...backends.discovery.connect import open_fleet, reusing
from ...backends.discovery.node_local import served
from ...backends.fleet.fleet import Fleet
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal_index import Ledger
from ...backends.storage.results import replacing, rows, write_jsonl, write_parquet
from ...backends.storage.run_folder import RunFolder, run_ids, write_json
from ...backends.workers.executor import WorkShard
from ...configs.loader import Loaded
from ...configs.models import RunConfig
from ...configs.reduce import with_bounds
from ...nodes.aggregators import build
from ...nodes.context import RunTools, unlimited
from ...nodes.shard.gate import Gate
from ...nodes.shard.progress import Meter, Progress
from ...nodes.state import ItemState
from ..remote.coordinator import STOP_S, WorkCrew, open_crew
from ..remote.heartbeat import end_earlier
from ..remote.tasks import crew_terms
from .items import ItemEngine, RunItem, is_seen, is_small, item_runner
from .monitor import exposed
from .open_run import OpenedRun, accounted, reported, reports_of
from .prepare import asked_by_all, fingerprint, settle_identity
from .shutdown import closing


@dataclass(frozen=True, slots=True)
class Mode:
    """How a run's items are run.

    Attributes:
        trace: Run and trace every item by LangGraph's engine, however many there are.
        embedded: Whether the graph was called by somebody else's program.
        retried: By run folder, the life before which failed items are asked again; a run's first
            opening notes its own. An embedded run is opened by each superstep, and what failed
            in an earlier one of the same invocation has been asked again already. None leaves
            failed items alone.
        meters: By run folder, what tells how it goes on; kept from one opening to the next.
        engine: Runs one item by LangGraph's engine; the flag tells whether through ``task.graph``.
        work_shard: What workers elsewhere run.
        end: When the life must end, or None.
    """

    trace: bool
    embedded: bool
    retried: dict[Path, int] | None
    meters: dict[Path, Meter]
    engine: Callable[[bool], ItemEngine]
    work_shard: WorkShard
    end: Walltime | None = None


@asynccontextmanager
async def open_run(folder: RunFolder, loaded: Loaded, mode: Mode) -> AsyncIterator[RunTools]:
    """Open a run for work, which the caller has locked; the fleet only if items are open.

    Raises:
        ConfigurationError: The settings do not fit the run.
        LedgerError: The journal is damaged.
    """
    config = loaded.config
    async with AsyncExitStack() as stack:
        books = await asyncio.to_thread(_open_books, folder, loaded)
        stack.push_async_callback(asyncio.to_thread, books.files.close)
        ledger, total = books.ledger, len(books.store)
        price = await asyncio.to_thread(tariff, config, books.model, books.simulated) or FREE
        stack.push_async_callback(ledger.aclose)
        who = f"{socket.gethostname()} pid {os.getpid()}"
        ledger.begin(who, config.ledger.fsync_s, books.next_life)
        if mode.retried is not None:
            ledger.reopen_failed(mode.retried.setdefault(folder.path, ledger.life))
        progress = _progress(ledger, total, books.held)
        run_item: RunItem = _nothing_to_ask
        fleet: Fleet | None = None
        crew: WorkCrew | None = None
        spends: Spending | None = None
        if ledger.counts().open:
            spends = await stack.enter_async_context(
                spending(folder, config, price, ledger, run_ids(books.about))
            )
            up = await stack.enter_async_context(
                served(config, loaded.plain["endpoints"], books.model)
            )
            books = await asyncio.to_thread(_kind_settled, folder, loaded, books, up.simulated)
            if spends is not None:
                counter = await stack.enter_async_context(token_counter(up))
                spends.budget.count = exact_count(counter)
            if config.backend.is_remote:
                _check_mode(mode)
                about = {**books.about, "life": ledger.life}
                terms = crew_terms(folder, loaded, up, about, price)
                if mode.end is not None:
                    terms = replace(terms, ends_at=mode.end.workers_at)
                crew = await stack.enter_async_context(
                    open_crew(mode.work_shard, terms, ledger, progress, spends)
                )
                told = crew.gathered.reports
                await stack.enter_async_context(reported(told, folder, ledger.life, price))
            else:
                reuse = await stack.enter_async_context(
                    reusing(config, up.simulated, folder.answers)
                )
                fleet = await stack.enter_async_context(open_fleet(config, up, reuse))
                told = reports_of(fleet)
                await stack.enter_async_context(reported(told, folder, ledger.life, price))
                seen = is_seen(config, trace=mode.trace, embedded=mode.embedded, total=total)
                engine = mode.engine(config.task.graph is not None) if seen else None
                quiet = not is_small(total) and not mode.trace
                run_item = item_runner(loaded, fleet, up.model, engine, quiet)
        tools = OpenedRun(
            store=books.store,
            ledger=ledger,
            aggregate=build([with_bounds(s, config.task.answer_schema) for s in config.reduce]),
            run_item=run_item,
            gate=_gate(config, crew is not None),
            progress=progress,
            fingerprint=bytes.fromhex(books.fingerprint),
            asked=asked_by_all(config, books.model),
            keep_raw=config.keep.raw == "all",
            simulated=books.simulated,
            tariff=price,
            account=unlimited if spends is None else spends.budget.account,
            budget=None if spends is None else spends.budget,
            crew=crew,
            meter=mode.meters.setdefault(folder.path, Meter()),
            fleet=fleet,
            journal=ledger,
        )
        if ledger.counts().open:
            shelf = Shelf(folder.budget, run_ids(books.about))
            await stack.enter_async_context(accounted(tools, spends, shelf, ledger.life))
        await stack.enter_async_context(exposed(tools, config.metrics.port))
        stack.enter_context(closing(tools.gate, mode.end))
        yield tools


def _check_mode(mode: Mode) -> None:
    if mode.trace:
        msg = (
            "--trace runs every item by LangGraph's engine in this process, and the settings send "
            "the shards elsewhere; add --set backend.kind=local"
        )
        raise ConfigurationError(msg)


def _gate(config: RunConfig, elsewhere: bool) -> Gate:
    """Return the bound on items in flight; of shards elsewhere, the places bound the number."""
    if elsewhere:
        return Gate(sys.maxsize, config.limits.drain_s + STOP_S, "shards")
    return Gate(config.limits.streams, config.limits.drain_s)


@dataclass(frozen=True, slots=True)
class _Books:
    """What is on disk of a run, opened."""

    files: ExitStack
    store: ItemStore
    ledger: Ledger
    about: dict[str, Any]
    next_life: int
    held: Held

    @property
    def run(self) -> tuple[str, ...]:
        return run_ids(self.about)

    @property
    def model(self) -> str:
        return str(self.about["model"])

    @property
    def simulated(self) -> bool:
        return bool(self.about["simulated"])

    @property
    def fingerprint(self) -> str:
        return str(self.about["fingerprint"])


def _open_books(folder: RunFolder, loaded: Loaded) -> _Books:
    about = folder.read_provenance()
    if fingerprint(loaded.config, about["model"], about["simulated"]) != about["fingerprint"]:
        msg = (
            f"{folder.path}: this run asks for something else than the settings given with it "
            "(task or model); start a new run in another folder"
        )
        raise ConfigurationError(msg)
    with ExitStack() as stack:
        about = settle_identity(folder)
        end_earlier(folder.journal)  # before the journal is read: they still write to it
        store = stack.enter_context(ItemStore(folder.items))
        ledger = Ledger(folder.journal, run_ids(about), len(store))
        shelf = Shelf(folder.budget, run_ids(about))
        return _Books(stack.pop_all(), store, ledger, about, shelf.next_life(), shelf.held())


def _progress(ledger: Ledger, total: int, held: Held) -> Progress:
    counts, spent = ledger.counts(), ledger.total()
    return Progress(
        total=total,
        done=counts.done,
        failed=counts.failed,
        before=counts.done + counts.failed,
        requests=spent.requests,
        prompt_tokens=spent.prompt_tokens,
        cached_tokens=spent.cached_tokens,
        completion_tokens=spent.completion_tokens,
        lost_tokens=spent.lost_tokens,
        useful_tokens=spent.useful_tokens,
        nano_usd=spent.nano_usd,
        reused=spent.reused,
        useful_nano_usd=spent.useful_nano_usd,
        held=held,
    )


def _kind_settled(folder: RunFolder, loaded: Loaded, books: _Books, now: bool) -> _Books:
    """Return the run's books, in which it is settled whether the endpoints are simulated.

    A run whose endpoints nobody could ask when it was prepared learns it here, once.

    Raises:
        ConfigurationError: They are not what they were.
    """
    if books.about["simulated"] is None:
        settled = fingerprint(loaded.config, books.model, now)
        cost = price_of(loaded.config, books.model, now)
        kept = {"price": None if cost is None else cost.to_json()}
        about = books.about | kept | {"simulated": now, "fingerprint": settled}
        folder.write_provenance(about)
        return replace(books, about=about)
    _check_kind(now, books.simulated)
    return books


def _check_kind(now: bool, before: bool) -> None:
    if now != before:
        kinds = ("real", "simulated")
        msg = (
            f"this run's answers are {kinds[before]} and these endpoints are {kinds[now]}; the two "
            "never mix: start a new run in another folder"
        )
        raise ConfigurationError(msg)


async def _nothing_to_ask(item: Item) -> ItemState:
    raise ConfigurationError(f"item {item.id!r} is open, though the journal says that none is")


def write_results(
    folder: RunFolder,
    loaded: Loaded,
    tools: RunTools,
    aggregate: list[dict[str, Any]],
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Write results, failures and aggregate; return references to them.

    Raises:
        LedgerError: A file could not be written.
    """
    extents = tools.ledger.extents()
    schema, priced = loaded.config.task.answer_schema, tools.priced
    write_parquet(rows(tools.ledger.records(), priced=priced), folder.results, schema)
    with replacing(folder.failures) as file:
        write_jsonl(rows(tools.ledger.records("failed"), priced=priced), file)
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
