"""The item graph as data: its steps, their order, and the StateGraph built from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from langgraph._internal._runnable import RunnableCallable
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import TracePolicy, omit_payload

from ..context import ItemContext
from ..state import ItemState
from .delegate import delegate
from .infer import infer
from .prepare import prepare
from .request import request
from .validate import validate

ItemNode = Callable[[ItemState, Runtime[ItemContext]], Awaitable[ItemState]]


@dataclass(frozen=True, slots=True)
class ItemStep:
    """One step of an item.

    Attributes:
        run: The node.
        next_step: Names the next step from the state, or END.
        targets: Every name that ``next_step`` can return.
    """

    run: ItemNode
    next_step: Callable[[ItemState], str]
    targets: tuple[str, ...]


def next_unless_failed(target: str) -> Callable[[ItemState], str]:
    """Return a routing function: go to ``target``, or end an item that failed."""

    def then(state: ItemState) -> str:
        return END if "error" in state else target

    return then


def repair_until_done(state: ItemState) -> str:
    """Return to the model while the item has neither output nor error."""
    return END if "output" in state or "error" in state else "infer"


def end_item(state: ItemState) -> str:  # noqa: ARG001 - a routing function takes the state
    """End the item."""
    return END


FIRST_STEP: Final = "prepare"

ITEM_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("infer"), ("infer", END)),
    "infer": ItemStep(infer, next_unless_failed("validate"), ("validate", END)),
    "validate": ItemStep(validate, repair_until_done, ("infer", END)),
}
"""The default item graph: prepare, infer, validate, and infer again to repair."""

DELEGATED_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("delegate"), ("delegate", END)),
    "delegate": ItemStep(delegate, end_item, (END,)),
}
"""The item graph that calls a user's ``task.graph``."""

REQUEST_STEPS: Final[Mapping[str, ItemStep]] = {
    "prepare": ItemStep(prepare, next_unless_failed("request"), ("request", END)),
    "request": ItemStep(request, end_item, (END,)),
}
"""The item graph for items that are requests themselves."""


async def walk_steps(
    steps: Mapping[str, ItemStep], state: ItemState, runtime: Runtime[ItemContext]
) -> ItemState:
    """Run the steps for one item and return its final state."""
    name = FIRST_STEP
    while name != END:
        step = steps[name]
        state |= await step.run(state, runtime)
        name = step.next_step(state)
    return state


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
