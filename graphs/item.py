"""The item graph: prepare → infer → validate, and infer again to repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph

from ..nodes.context import ItemContext
from ..nodes.item.steps import DELEGATED_STEPS, FIRST, ITEM_STEPS, Step
from ..nodes.state import ItemState
from .items import ItemEngine

_STEPS: Final = 6
"""Supersteps of an item without repairs: the input, three nodes, and LangGraph's look at the end;
one to spare. A repair takes two more."""

ItemGraph = StateGraph[ItemState, ItemContext, ItemState, ItemState]


def build_item(steps: Mapping[str, Step] = ITEM_STEPS) -> ItemGraph:
    """Make a StateGraph of an item's steps; its context is an :class:`ItemContext`."""
    graph: ItemGraph = StateGraph(ItemState, ItemContext)
    assemble(graph, steps, {name: step.run for name, step in steps.items()})
    return graph


def assemble(graph: Any, steps: Mapping[str, Step], nodes: Mapping[str, Any]) -> None:
    """Add the steps' nodes and edges to a graph."""
    for name, step in steps.items():
        graph.add_node(name, nodes[name], metadata=described(step.run))
        graph.add_conditional_edges(name, step.then, list(step.targets))
    graph.add_edge(START, FIRST)


def described(node: Callable[..., Any]) -> dict[str, Any]:
    """Return a node's metadata: what it does, for whoever draws the graph."""
    return {"description": (node.__doc__ or "").partition("\n")[0].replace("``", "")}


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
