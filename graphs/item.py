"""The standalone item graph, for LangGraph Studio and ``langgraph dev``."""

from __future__ import annotations

from typing import Any

from langgraph.runtime import Runtime

from ..nodes.item.item_graph import add_steps
from ..nodes.item.item_state import ItemInput, ItemOutput, ItemState
from ..nodes.item.steps import ITEM_STEPS, ItemNode, StepRuntime
from .bound_graph import BoundGraph, BoundSettings, check_item_input
from .caller_policy import CallerPolicy
from .context import RunContext

ItemGraphAlone = BoundGraph[ItemState, ItemInput, ItemOutput]


def build_item_alone(
    context: RunContext | None = None, *, trust_context: bool = False
) -> ItemGraphAlone:
    """Build the standalone item graph, which opens its resources from the settings.

    Its input is one item: ``{"id": "aspirin", "row": {"smiles": "CC(=O)Oc1ccccc1C(=O)O"}}``.

    Args:
        context: The settings.
        trust_context: Let the context of an invocation change any setting.
    """
    policy = None if trust_context else CallerPolicy.from_environment()
    bound = BoundSettings(context or RunContext(), policy)
    graph: ItemGraphAlone = BoundGraph(
        ItemState, bound, check_item_input, input_schema=ItemInput, output_schema=ItemOutput
    )
    add_steps(graph, ITEM_STEPS, {name: _make_node(s.run, bound) for name, s in ITEM_STEPS.items()})
    return graph


def _make_node(run: ItemNode, bound: BoundSettings) -> Any:
    async def node(state: ItemState, runtime: Runtime[RunContext]) -> ItemState:
        async with bound.resolve(runtime.context).open_item_context() as context:
            return await run(state, StepRuntime(context))

    node.__doc__ = run.__doc__
    return node


item = build_item_alone().compile()
"""The graph ``item`` of ``langgraph.json``."""
