"""Run items through the item graph, and choose the shard sizes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import GraphBubbleUp, GraphInterrupt, GraphRecursionError, ParentCommand
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langsmith import tracing_context
from langsmith.utils import tracing_is_enabled

from ...backends.core.errors import (
    ConfigurationError,
    EndpointError,
    ItemGraphError,
    ItemTimeoutError,
    TooManyStepsError,
)
from ...backends.core.fields import FieldPath
from ...backends.core.types import Item
from ...backends.discovery.connect import make_chat_client, make_chat_fleet, make_model_params
from ...backends.fleet.fleet import Fleet, FleetClient
from ...backends.workers.registry import import_object
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...nodes.context import Delegate, ImageSource, ItemContext, PreparedRun
from ...nodes.item.answer import AnswerCheck
from ...nodes.item.prepare import make_item_error
from ...nodes.item.steps import (
    DELEGATED_STEPS,
    ITEM_STEPS,
    REQUEST_STEPS,
    ItemStep,
    build_item_graph,
    walk_steps,
)
from ...nodes.shard.local import inherit_config
from ...nodes.state import ItemState, RunKey

logger = logging.getLogger(__name__)

_INTERRUPTED: Final = (
    "task.graph paused at interrupt(), but an item of a batch cannot wait for an answer; return "
    "the question as the item's output"
)
_NO_PARENT: Final = (
    "task.graph sent Command(graph=Command.PARENT), but an item's graph has no parent; go to a "
    "node of task.graph"
)

SHOWN_ITEMS: Final = 200
"""With more items, traces and streams are per shard."""

RunItem = Callable[[Item], Awaitable[ItemState]]
ItemEngine = Callable[[ItemState, ItemContext], Awaitable[ItemState]]


def is_small_batch(total: int) -> bool:
    """Return True if a batch is small enough to show each item."""
    return total <= SHOWN_ITEMS


def is_run_by_engine(config: RunConfig, *, trace: bool, embedded: bool, total: int) -> bool:
    """Return True if LangGraph's engine runs the items, so that traces and Studio show them.

    This holds for one-item shards, for every item with ``trace``, and for small batches that are
    traced or belong to an embedded graph, which may be streamed.

    Args:
        config: The settings.
        trace: Show every item.
        embedded: The graph was called by another program.
        total: Items of the run.
    """
    watched = embedded or tracing_is_enabled() is True
    return trace or config.shard.items == 1 or (watched and is_small_batch(total))


def make_item_runner(  # noqa: PLR0913 - what is open for a run
    loaded: LoadedConfig,
    fleet: Fleet,
    model: str,
    engine: ItemEngine | None,
    quiet: bool,
    *,
    images: ImageSource | None,
) -> RunItem:
    """Return a function that runs one item through the item graph.

    Args:
        loaded: The settings.
        fleet: The fleet that serves the model.
        model: The model's name.
        engine: Runs the item with LangGraph's engine; None walks its steps directly, which takes
            microseconds instead of milliseconds.
        quiet: Keep items out of traces.
        images: Reads the images of items; None if they have none.
    """
    context = make_item_context(loaded, fleet, model, traced=engine is not None, images=images)
    run = engine or _make_walker(choose_steps(loaded.config))
    if (most := loaded.config.limits.item_timeout_s) is not None:
        run = _with_timeout(run, most)
    silence = quiet and tracing_is_enabled() is True

    async def run_item(item: Item) -> ItemState:
        state = ItemState(id=item.id, row=item.row, problem=item.problem)
        if silence:
            with tracing_context(enabled=False):
                return await run(state, context)
        return await run(state, context)

    return run_item


def choose_steps(config: RunConfig) -> Mapping[str, ItemStep]:
    """Return the steps of an item."""
    if config.input.is_batch:
        return REQUEST_STEPS
    return DELEGATED_STEPS if config.task.graph else ITEM_STEPS


def _make_walker(steps: Mapping[str, ItemStep]) -> ItemEngine:
    async def walk(state: ItemState, context: ItemContext) -> ItemState:
        return await walk_steps(steps, state, Runtime(context=context))

    return walk


def _with_timeout(run: ItemEngine, seconds: float) -> ItemEngine:
    async def timed(state: ItemState, context: ItemContext) -> ItemState:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await run(state, context)
        except TimeoutError:
            if not limit.expired():
                raise
            msg = f"the item took longer than limits.item_timeout_s ({seconds:g} s)"
            return state | ItemState(error=make_item_error(ItemTimeoutError(msg)))

    return timed


def make_item_context(
    loaded: LoadedConfig, fleet: Fleet, model: str, *, traced: bool, images: ImageSource | None
) -> ItemContext:
    """Return the context of the item graph."""
    config = loaded.config
    params, field = make_model_params(config, model), config.task.certainty
    delegate = None
    if config.task.graph is not None:
        graph = load_item_graph(config.task.graph)(make_chat_fleet(fleet, params))
        delegate = _make_delegate(graph, config.limits.steps_per_item)
    return ItemContext(
        prompt=config.parse_prompt(),
        model=make_chat_client(fleet, params, traced),
        answer_check=AnswerCheck(config.task.answer_schema, config.model.max_tokens),
        repairs=config.task.repairs,
        delegate=delegate,
        completions=FleetClient(fleet, params) if config.input.is_batch else None,
        images=images,
        certainty=None if field is None else FieldPath.parse(field).keys,
    )


def _make_delegate(graph: Runnable[Any, Any], steps: int | None) -> Delegate:
    """Return a function that calls the user's graph with a step limit."""
    config: RunnableConfig | None = None if steps is None else {"recursion_limit": steps}
    store = getattr(graph, "store", None)
    own_store = store if isinstance(store, BaseStore) else None

    async def delegate(given: dict[str, Any]) -> Any:
        try:
            with _isolate_graph(own_store):
                result = await graph.ainvoke(given, config)
        except GraphRecursionError as error:
            where = "its own" if steps is None else f"limits.steps_per_item ({steps})"
            msg = f"task.graph came to no end within {where} steps"
            raise TooManyStepsError(msg) from error
        except GraphInterrupt as error:  # raised inside another graph, returned outside one
            raise ItemGraphError(_INTERRUPTED) from error
        except ParentCommand as error:
            raise ItemGraphError(_NO_PARENT) from error
        except GraphBubbleUp as error:
            raise ItemGraphError(f"task.graph stopped before its end: {error}") from error
        except Exception as error:
            if isinstance(error.__cause__, EndpointError):  # behind ChatFleet's stock error
                raise error.__cause__ from error
            raise
        if isinstance(result, Mapping) and result.get("__interrupt__"):
            raise ItemGraphError(_INTERRUPTED)
        return result

    return delegate


@contextmanager
def _isolate_graph(store: BaseStore | None) -> Iterator[None]:
    """Keep a graph from inheriting settings that change its behavior, in the block."""
    outer = var_child_runnable_config.get()
    token = var_child_runnable_config.set(None if outer is None else inherit_config(outer, store))
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def load_item_graph(name: str) -> Callable[[Any], Runnable[Any, Any]]:
    """Return the factory that ``task.graph`` names; wrap a ready graph in one.

    Raises:
        ConfigurationError: It cannot be imported, or is neither a function nor a graph.
    """
    found = import_object(name, "task.graph")
    if isinstance(found, Runnable):
        return lambda _: found
    if not callable(found):
        msg = f"task.graph: {name} is no function; it must take the model and return a graph"
        raise ConfigurationError(msg)

    def factory(model: Any) -> Runnable[Any, Any]:
        graph = found(model)
        if not isinstance(graph, Runnable):
            msg = (
                f"task.graph: {name} returned {type(graph).__name__}, no graph or other Runnable "
                "(a StateGraph must be compiled)"
            )
            raise ConfigurationError(msg)
        return graph

    return factory


def check_item_graph(config: RunConfig) -> None:
    """Check that ``task.graph`` can be imported, if it is set.

    A ready graph calls its own model, which fanfold cannot count or limit.

    Raises:
        ConfigurationError: It cannot be imported, is neither a function nor a graph, or is a ready
            graph although a budget is set.
    """
    name, budget = config.task.graph, config.budget
    if name is None:
        return
    load_item_graph(name)
    if not isinstance(import_object(name, "task.graph"), Runnable):
        return
    caps = {key: getattr(budget, key) for key in ("usd", "tokens", "requests")}
    if any(cap is not None for cap in caps.values()):
        msg = (
            f"task.graph: {name} is a ready graph, whose model fanfold cannot hold to the budget; "
            "name a function that is given the model and returns the graph"
        )
        raise ConfigurationError(msg)
    logger.warning("task.graph: %s uses its own model; fanfold does not count its calls", name)


_STEPS: Final = 6
"""Supersteps of an item without repairs: the input, three nodes, LangGraph's final check, and one
spare. A repair takes two more."""


def make_item_engine(steps: Mapping[str, ItemStep]) -> ItemEngine:
    """Return a function that runs one item with LangGraph's engine, without a saver.

    Only the number of repairs bounds its steps, not the limit of the outer invocation.

    Args:
        steps: The steps of the item.
    """
    graph = build_item_graph(steps).compile(checkpointer=False)

    async def run(state: ItemState, context: ItemContext) -> ItemState:
        config = RunnableConfig(recursion_limit=_STEPS + 2 * context.repairs)
        final: Any = await graph.ainvoke(state, config, context=context)
        return cast(ItemState, final)

    return run


_LEAST, _MOST = 256, 4096
_SHARDS: Final = 64
_WINDOW: Final = 256
_ROUNDS: Final = 4
"""Items per stream in a worker's smallest shard, because streams idle at the end of a shard."""
_FEWEST: Final = 16

UNBOUNDED_STEPS: Final = 2**31 - 1
"""A recursion limit that no run reaches; runs end because each window is sent once."""


def plan_shards(run: RunKey, config: RunConfig, total: int, *, singly: bool = False) -> PreparedRun:
    """Return a run with its shard plan.

    Args:
        run: Key of the run.
        config: Its settings.
        total: Number of its items.
        singly: Make each row of a small batch a separate shard.

    A shard has all samples of its rows.
    """
    is_local = config.shard.items is None and not config.backend.is_remote
    size = 1 if singly and is_local and is_small_batch(total) else choose_shard_items(config, total)
    size = -(-size // config.task.samples) * config.task.samples
    return PreparedRun(run, total, size, choose_window(config, size), make_sizing(config))


def choose_shard_items(config: RunConfig, total: int) -> int:
    """Return the items per shard: as configured, or for about 64 shards.

    Few large shards hide the barrier of a superstep better than many small ones. Below 256 items
    the engine's cost per Send is noticeable, above 4,096 the loss of a killed shard. On workers
    it is the size of the first shards, whose measurements determine the size of the others.
    """
    if config.shard.items is not None:
        return config.shard.items
    if config.backend.is_remote:
        workers = config.backend.concurrent_shards
        least = max(_LEAST, _ROUNDS * config.limits.streams // workers)
        return max(_FEWEST, min(least, -(-total // (2 * workers))))
    return min(_MOST, max(_LEAST, config.limits.streams // 4, -(-total // _SHARDS)))


def make_sizing(config: RunConfig) -> dict[str, Any] | None:
    """Return the parameters for sizing shards by the time per item; None keeps one size."""
    backend = config.backend
    if config.shard.items is not None or not backend.is_remote:
        return None
    return {
        "samples": config.task.samples,
        "workers": backend.concurrent_shards,
        "least_s": backend.shard_least_s,
        "most_s": backend.shard_most_s,
    }


def choose_window(config: RunConfig, size: int) -> int:
    """Return the shards per superstep: 256, or more to keep all streams or workers busy."""
    if config.backend.is_remote:
        return max(_WINDOW, 8 * config.backend.concurrent_shards)
    return max(_WINDOW, min(_MOST, 16 * config.limits.streams // size))
