"""Run items through the item graph."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ...backends.core.errors import ItemTimeoutError
from ...backends.core.fields import FieldPath
from ...backends.core.types import Item
from ...backends.discovery.connect import make_chat_client, make_chat_fleet, make_model_params
from ...backends.fleet.fleet import Fleet, FleetClient
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...nodes.context import ImageSource, ItemContext
from ...nodes.item.answer import AnswerCheck
from ...nodes.item.item_state import ItemState
from ...nodes.item.part import PartSplit
from ...nodes.item.prepare import make_item_error
from ...nodes.item.steps import (
    DELEGATED_STEPS,
    ITEM_STEPS,
    REQUEST_STEPS,
    ItemEngine,
    ItemStep,
    walk_steps,
)

RunItem = Callable[[Item], Awaitable[ItemState]]


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
    if quiet and (engine is not None or loaded.config.task.graph is not None):
        from .item_engine import without_tracing  # noqa: PLC0415 - imports LangGraph

        run = without_tracing(run)

    async def run_item(item: Item) -> ItemState:
        return await run(ItemState(id=item.id, row=item.row, problem=item.problem), context)

    return run_item


def choose_steps(config: RunConfig) -> Mapping[str, ItemStep]:
    """Return the steps of an item."""
    if config.input.is_batch:
        return REQUEST_STEPS
    return DELEGATED_STEPS if config.task.graph else ITEM_STEPS


def _make_walker(steps: Mapping[str, ItemStep]) -> ItemEngine:
    async def walk(state: ItemState, context: ItemContext) -> ItemState:
        return await walk_steps(steps, state, context)

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
        from .item_engine import (  # noqa: PLC0415 - imports LangGraph
            load_item_graph,
            make_delegate,
        )

        graph = load_item_graph(config.task.graph)(make_chat_fleet(fleet, params))
        delegate = make_delegate(graph, config.limits.steps_per_item)
    return ItemContext(
        prompt=config.parse_prompt(),
        model=make_chat_client(fleet, params, traced),
        answer_check=AnswerCheck(config.task.answer_schema, config.model.max_tokens),
        repairs=config.task.repairs,
        delegate=delegate,
        completions=FleetClient(fleet, params) if config.input.is_batch else None,
        images=images,
        certainty=None if field is None else FieldPath.parse(field).keys,
        split=_make_split(config),
        asks_pieces_together=config.backend.is_batch,
    )


def _make_split(config: RunConfig) -> PartSplit | None:
    """Return how parts that are too long are asked in pieces; None if the prompt lacks the text."""
    split = config.input.split
    if split is None or split.column not in config.parse_prompt().columns:
        return None
    return PartSplit(split.column, split.overlap, config.task.answer_schema)
