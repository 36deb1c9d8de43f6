"""An open run: its items, journal, fleet and item graph, for as long as somebody uses them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from langgraph.runtime import Runtime
from langsmith import tracing_context
from langsmith.utils import tracing_is_enabled

from ..backends.accounts.folder import RunFolder
from ..backends.accounts.ledger import Ledger
from ..backends.build import chat_door, chat_fleet, model_params, open_fleet, serving
from ..backends.contract.errors import ConfigurationError
from ..backends.contract.template import Template
from ..backends.contract.types import Item
from ..backends.fleet.fleet import Fleet
from ..backends.inputs.store import ItemStore
from ..configs.load import Loaded
from ..configs.reduce import with_bounds
from ..nodes.aggregators import build
from ..nodes.answer import AnswerCheck
from ..nodes.context import ItemContext, RunTools
from ..nodes.gate import Gate
from ..nodes.progress import Progress
from ..nodes.state import ItemState
from ..nodes.steps import DELEGATED_STEPS, ITEM_STEPS, walk
from .identity import fingerprint

TRACED_ITEMS: Final = 200
"""Above so many items, traces are per shard."""

RunItem = Callable[[Item], Awaitable[ItemState]]
ItemEngine = Callable[[ItemState, ItemContext], Awaitable[ItemState]]


@dataclass(frozen=True, slots=True)
class Mode:
    """How a run's items are run.

    Attributes:
        trace: Run and trace every item by LangGraph's engine, however many there are.
        retry_failed: Ask failed items again.
        engine: Runs one item by LangGraph's engine; the flag tells whether through ``task.graph``.
    """

    trace: bool
    retry_failed: bool
    engine: Callable[[bool], ItemEngine]


@asynccontextmanager
async def open_run(folder: RunFolder, loaded: Loaded, mode: Mode) -> AsyncIterator[RunTools]:
    """Open a run for work; the fleet only if items are open.

    Raises:
        ConfigurationError: The settings do not fit the run, or another process works on it.
        LedgerError: The journal is damaged.
    """
    config = loaded.config
    async with AsyncExitStack() as stack:
        books = await asyncio.to_thread(_open_books, folder, loaded)
        stack.push_async_callback(asyncio.to_thread, books.files.close)
        ledger, total = books.ledger, len(books.store)
        stack.push_async_callback(ledger.aclose)
        if mode.retry_failed:
            ledger.reopen_failed()
        ledger.begin(f"{socket.gethostname()} pid {os.getpid()}", config.ledger.fsync_s)
        run_item: RunItem = _nothing_to_ask
        if ledger.counts().open:
            up = await stack.enter_async_context(
                serving(config, loaded.plain["endpoints"], books.model)
            )
            _check_kind(up.simulated, books.simulated)
            fleet = await stack.enter_async_context(open_fleet(config, up))
            run_item = item_runner(loaded, fleet, up.model, mode, total)
        yield RunTools(
            store=books.store,
            ledger=ledger,
            aggregate=build([with_bounds(s, config.task.answer_schema) for s in config.reduce]),
            run_item=run_item,
            gate=Gate(config.limits.streams, config.limits.drain_s),
            progress=_progress(ledger, total),
            fingerprint=bytes.fromhex(books.fingerprint),
            simulated=books.simulated,
        )


@dataclass(frozen=True, slots=True)
class _Books:
    """What is on disk of a run, opened."""

    files: ExitStack
    store: ItemStore
    ledger: Ledger
    model: str
    simulated: bool
    fingerprint: str


def _open_books(folder: RunFolder, loaded: Loaded) -> _Books:
    about = folder.read_provenance()
    if fingerprint(loaded.config, about["model"], about["simulated"]) != about["fingerprint"]:
        msg = (
            f"{folder.path}: this run asks for something else than the settings given with it "
            "(task or model); start a new run in another folder"
        )
        raise ConfigurationError(msg)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        store = stack.enter_context(ItemStore(folder.items))
        ledger = Ledger(folder.journal, about["run"], len(store))
        return _Books(
            stack.pop_all(), store, ledger, about["model"], about["simulated"], about["fingerprint"]
        )


def _progress(ledger: Ledger, total: int) -> Progress:
    counts, spent = ledger.counts(), ledger.spent
    return Progress(
        total=total,
        done=counts.done,
        failed=counts.failed,
        before=counts.done + counts.failed,
        requests=spent.requests,
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
    )


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


def item_runner(loaded: Loaded, fleet: Fleet, model: str, mode: Mode, total: int) -> RunItem:
    """Return what takes one item through the item graph.

    The steps are walked directly, which costs microseconds; LangGraph's engine runs them, so
    that they can be seen, for one-item shards, on ``trace``, and for small traced batches.
    """
    config = loaded.config
    few_traced = total <= TRACED_ITEMS and tracing_is_enabled() is True
    seen = mode.trace or few_traced or config.shard.items == 1
    quiet = total > TRACED_ITEMS and not mode.trace and tracing_is_enabled() is True
    context = item_context(loaded, fleet, model, traced=seen)
    run = mode.engine(config.task.graph is not None) if seen else _walker(config.task.graph)

    async def run_item(item: Item) -> ItemState:
        state = ItemState(id=item.id, row=item.row, problem=item.problem)
        if quiet:
            with tracing_context(enabled=False):
                return await run(state, context)
        return await run(state, context)

    return run_item


def _walker(graph: str | None) -> ItemEngine:
    steps = DELEGATED_STEPS if graph else ITEM_STEPS

    async def walked(state: ItemState, context: ItemContext) -> ItemState:
        return await walk(steps, state, Runtime(context=context))

    return walked


def item_context(loaded: Loaded, fleet: Fleet, model: str, *, traced: bool) -> ItemContext:
    """Return what the item graph may use."""
    config = loaded.config
    params = model_params(config, model)
    delegate = None
    if config.task.graph is not None:
        delegate = load_graph(config.task.graph)(chat_fleet(fleet, params)).ainvoke
    return ItemContext(
        system=config.task.system,
        prompt=Template.parse(config.task.prompt),
        model=chat_door(fleet, params, traced),
        answer=AnswerCheck(config.task.answer_schema, config.model.max_tokens),
        repairs=config.task.repairs,
        delegate=delegate,
    )


def load_graph(name: str) -> Callable[[Any], Any]:
    """Return the factory that ``task.graph`` names.

    Raises:
        ConfigurationError: It cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        factory: Any = import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        msg = f"task.graph: {name} cannot be imported: {error} (PYTHONPATH names more folders)"
        raise ConfigurationError(msg) from error
    if not callable(factory):
        msg = f"task.graph: {name} is no function; it must take the model and return a graph"
        raise ConfigurationError(msg)
    found: Callable[[Any], Any] = factory
    return found
