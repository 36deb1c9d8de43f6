"""How one item is run: its steps, its context, a user's own graph."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from langgraph.runtime import Runtime
from langsmith import tracing_context
from langsmith.utils import tracing_is_enabled

from ..backends.build import chat_door, chat_fleet, model_params
from ..backends.contract.errors import ConfigurationError
from ..backends.contract.template import Template
from ..backends.contract.types import Item
from ..backends.fleet.fleet import Fleet
from ..backends.places import imported
from ..configs.load import Loaded
from ..configs.models import RunConfig
from ..nodes.answer import AnswerCheck
from ..nodes.context import ItemContext
from ..nodes.state import ItemState
from ..nodes.steps import DELEGATED_STEPS, ITEM_STEPS, walk

TRACED_ITEMS: Final = 200
"""Above so many items, traces are per shard."""

RunItem = Callable[[Item], Awaitable[ItemState]]
ItemEngine = Callable[[ItemState, ItemContext], Awaitable[ItemState]]


def is_seen(config: RunConfig, trace: bool, total: int) -> bool:
    """Say whether items are run by LangGraph's engine, where traces and Studio see them.

    So are one-item shards, every item on ``trace``, and small batches that are traced anyway.
    """
    few_traced = total <= TRACED_ITEMS and tracing_is_enabled() is True
    return trace or few_traced or config.shard.items == 1


def item_runner(
    loaded: Loaded, fleet: Fleet, model: str, engine: ItemEngine | None, quiet: bool
) -> RunItem:
    """Return what takes one item through the item graph.

    Args:
        loaded: The settings.
        fleet: Whom to ask.
        model: The model's name.
        engine: Runs the item by LangGraph's engine; None walks its steps directly, which costs
            microseconds in place of milliseconds.
        quiet: Whether to keep what items do out of traces.
    """
    context = item_context(loaded, fleet, model, traced=engine is not None)
    run = engine or _walker(loaded.config.task.graph)
    silence = quiet and tracing_is_enabled() is True

    async def run_item(item: Item) -> ItemState:
        state = ItemState(id=item.id, row=item.row, problem=item.problem)
        if silence:
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
    factory = imported(name, "task.graph")
    if not callable(factory):
        msg = f"task.graph: {name} is no function; it must take the model and return a graph"
        raise ConfigurationError(msg)
    found: Callable[[Any], Any] = factory
    return found
