"""The item graph: prepare → infer → validate, and infer again to repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from langgraph.graph import START, StateGraph

from ..context import ItemContext
from ..state import ItemState
from .steps import FIRST, ITEM_STEPS, Step

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
