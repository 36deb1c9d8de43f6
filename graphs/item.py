"""The item graph by itself, for LangGraph Studio and ``langgraph dev``."""

from __future__ import annotations

from typing import Any

from langgraph.runtime import Runtime

from ..nodes.item.steps import ITEM_STEPS, ItemNode, assemble
from ..nodes.state import ItemInput, ItemOutput, ItemState
from .context import Bound, BoundGraph, RunContext, check_item
from .requests import RequestPolicy

AloneGraph = BoundGraph[ItemState, ItemInput, ItemOutput]


def build_item_alone(
    context: RunContext | None = None, *, trust_context: bool = False
) -> AloneGraph:
    """Make the item graph that runs by itself: settings in place of open parts.

    Its input is one item: ``{"id": "aspirin", "row": {"smiles": "CC(=O)Oc1ccccc1C(=O)O"}}``.

    Args:
        context: The settings.
        trust_context: Whether what arrives with an invocation may set everything.
    """
    policy = None if trust_context else RequestPolicy.from_environment()
    bound = Bound(context or RunContext(), policy)
    graph: AloneGraph = BoundGraph(
        ItemState, bound, check_item, input_schema=ItemInput, output_schema=ItemOutput
    )
    assemble(graph, ITEM_STEPS, {name: _alone(s.run, bound) for name, s in ITEM_STEPS.items()})
    return graph


def _alone(run: ItemNode, bound: Bound) -> Any:
    async def node(state: ItemState, runtime: Runtime[RunContext]) -> ItemState:
        async with bound.resolve(runtime.context).item_context() as context:
            return await run(state, Runtime(context=context))

    node.__doc__ = run.__doc__
    return node


item = build_item_alone().compile()
"""What ``langgraph.json`` names ``item``."""
