"""The item graph: prepare → infer → validate, and infer again to repair."""

from __future__ import annotations

from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig

from ...nodes.context import ItemContext
from ...nodes.item.graph_part import build_item
from ...nodes.item.steps import DELEGATED_STEPS, ITEM_STEPS
from ...nodes.state import ItemState
from .items import ItemEngine

_STEPS: Final = 6
"""Supersteps of an item without repairs: the input, three nodes, and LangGraph's look at the end;
one to spare. A repair takes two more."""


def item_engine(delegated: bool) -> ItemEngine:
    """Return a function that runs one item by LangGraph's engine, without a saver.

    Its steps are bounded by the repairs alone, whatever limit the invocation around it has.

    Args:
        delegated: Whether a user's ``task.graph`` takes the place of the model call.
    """
    graph = build_item(DELEGATED_STEPS if delegated else ITEM_STEPS).compile(checkpointer=False)

    async def run(state: ItemState, context: ItemContext) -> ItemState:
        config = RunnableConfig(recursion_limit=_STEPS + 2 * context.repairs)
        final: Any = await graph.ainvoke(state, config, context=context)
        return cast(ItemState, final)

    return run
