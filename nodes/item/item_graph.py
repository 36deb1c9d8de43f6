"""The item graph as LangGraph's StateGraph, built from the steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from langgraph._internal._runnable import RunnableCallable
from langgraph.graph import START, StateGraph
from langgraph.types import TracePolicy, omit_payload

from ..context import ItemContext
from .item_state import ItemState
from .steps import FIRST_STEP, ITEM_STEPS, ItemStep

ItemGraph = StateGraph[ItemState, ItemContext, ItemState, ItemState]


def build_item_graph(steps: Mapping[str, ItemStep] = ITEM_STEPS) -> ItemGraph:
    """Build a StateGraph from the steps; its context is an :class:`ItemContext`."""
    graph: ItemGraph = StateGraph(ItemState, ItemContext)
    add_steps(graph, steps, {name: step.run for name, step in steps.items()})
    return graph


def add_steps(graph: Any, steps: Mapping[str, ItemStep], nodes: Mapping[str, Any]) -> None:
    """Add the steps' nodes and edges to a graph."""
    for name, step in steps.items():
        graph.add_node(name, nodes[name], metadata=node_metadata(step.run), trace_policy=NO_PAYLOAD)
        graph.add_conditional_edges(name, make_untraced(step.next_step), list(step.targets))
    graph.add_edge(START, FIRST_STEP)


NO_PAYLOAD: Final = TracePolicy(process_inputs=omit_payload, process_outputs=omit_payload)
"""Traces show that a node ran and how long it took. The state would repeat the pasted items in each
node, and the prompt in each step of an item; the run of the model call has prompt and answer."""


def make_untraced(
    run: Callable[..., Any], run_async: Callable[..., Awaitable[Any]] | None = None
) -> RunnableCallable:
    """Return a function as a part of a graph without a run of its own in traces.

    LangGraph traces routing functions, and nodes that are runnables, with the whole state, which
    no policy of a node changes. This class is the one that LangGraph's own nodes use.

    Args:
        run: The function.
        run_async: The same for asynchronous invocations.
    """
    return RunnableCallable(run, run_async, trace=False)


def node_metadata(node: Callable[..., Any]) -> dict[str, Any]:
    """Return a node's metadata: its docstring's first line, shown in drawings of the graph."""
    return {"description": (node.__doc__ or "").partition("\n")[0].replace("``", "")}
