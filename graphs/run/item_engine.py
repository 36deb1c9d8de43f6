"""What LangGraph runs of an item: the item graph with its engine, and the graph of a user."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import replace
from typing import Any, Final, cast

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import (
    EmptyInputError,
    GraphBubbleUp,
    GraphInterrupt,
    GraphRecursionError,
    InvalidUpdateError,
    NodeCancelledError,
    NodeTimeoutError,
    ParentCommand,
)
from langgraph.runtime import RunControl, Runtime
from langgraph.store.base import BaseStore
from langsmith import tracing_context
from langsmith.utils import tracing_is_enabled

from ...backends.core.errors import (
    ConfigurationError,
    EndpointError,
    ItemGraphError,
    RunStoppedError,
    TooManyStepsError,
)
from ...backends.workers.registry import import_object
from ...configs.models import RunConfig
from ...nodes.context import Delegate, ItemContext
from ...nodes.item.item_graph import build_item_graph
from ...nodes.item.item_state import ItemState
from ...nodes.item.steps import ItemEngine, ItemStep
from .shard_plan import is_small_batch

logger = logging.getLogger(__name__)

_INTERRUPTED: Final = (
    "task.graph paused at interrupt(), but an item of a batch cannot wait for an answer; return "
    "the question as the item's output"
)
_NO_PARENT: Final = (
    "task.graph sent Command(graph=Command.PARENT), but an item's graph has no parent; go to a "
    "node of task.graph"
)

_NAMING: Final = ("checkpoint_ns", "__pregel_task_id", "__pregel_stream")
"""Keys of LangGraph's configuration by which streams name graphs that run inside a node."""

_RUNTIME: Final = "__pregel_runtime"
_SCRATCHPAD: Final = "__pregel_scratchpad"

_ENGINE_ERRORS: Final = (
    GraphBubbleUp,
    GraphRecursionError,
    InvalidUpdateError,
    EmptyInputError,
    NodeTimeoutError,
    NodeCancelledError,
)
"""LangGraph's errors. Those of a user's graph end its item before they get here."""


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


def without_tracing(run: ItemEngine) -> ItemEngine:
    """Return a function that runs an item, kept out of traces if anything is traced."""
    if tracing_is_enabled() is not True:
        return run

    async def untraced(state: ItemState, context: ItemContext) -> ItemState:
        with tracing_context(enabled=False):
            return await run(state, context)

    return untraced


_STEPS: Final = 7
"""Supersteps of an item without repairs: the input, four nodes, LangGraph's final check, and one
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

    return stop_at_engine_errors(run)


def stop_at_engine_errors(run: ItemEngine) -> ItemEngine:
    """Return a function that runs an item, and stops the run if LangGraph stops the item."""

    async def guarded(state: ItemState, context: ItemContext) -> ItemState:
        try:
            return await run(state, context)
        except _ENGINE_ERRORS as error:
            msg = f"item {state['id']!r}: LangGraph stopped it ({type(error).__name__}: {error})"
            msg += "; the item is not recorded, resume the run"
            raise RunStoppedError(msg) from error

    return guarded


def make_item_variables() -> Context:
    """Return the context variables of items' tasks, with what :func:`inherit_config` keeps."""
    context = copy_context()
    config = var_child_runnable_config.get()
    if config is not None:
        context.run(var_child_runnable_config.set, inherit_config(config))
    return context


def inherit_config(outer: RunnableConfig, store: BaseStore | None = None) -> RunnableConfig:
    """Return the part of the surrounding configuration that an item inherits.

    Callbacks, metadata and the position in the stream stay. LangGraph would also pass on the
    recursion limit, concurrency, durability, tags, thread, saver, cache, store, context, the
    request to drain and the answers to interrupts. None of them may change the result of an item,
    and an item that runs in another process has none of them.

    Args:
        outer: The configuration of the node around the item.
        store: The store of the graph that runs.
    """
    given = outer.get("configurable", {})
    kept: dict[str, Any] = {key: given[key] for key in _NAMING if key in given}
    if isinstance(runtime := given.get(_RUNTIME), Runtime):
        kept[_RUNTIME] = Runtime(
            store=store,
            stream_writer=runtime.stream_writer,
            heartbeat=runtime.heartbeat,
            server_info=runtime.server_info,
            control=RunControl(),
        )
    if (scratchpad := given.get(_SCRATCHPAD)) is not None:
        # It numbers graphs that run inside the node, and contains the answers to its interrupts.
        kept[_SCRATCHPAD] = replace(scratchpad, resume=[], get_null_resume=lambda _=False: None)
    config = RunnableConfig(configurable=kept)
    if outer.get("callbacks") is not None:
        config["callbacks"] = outer["callbacks"]
    if outer.get("metadata"):
        config["metadata"] = outer["metadata"]
    return config


def make_delegate(graph: Runnable[Any, Any], steps: int | None) -> Delegate:
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
                f"task.graph: {name} returned {type(graph).__name__}, not a graph or other "
                "Runnable (a StateGraph must be compiled)"
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
