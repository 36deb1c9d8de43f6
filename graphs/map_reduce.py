"""The map-reduce graph: load → dispatch → shards → gather → (approve | dispatch | reduce)."""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime

from ..nodes.batch.approve import approve, route_after_approve
from ..nodes.batch.dispatch import dispatch, fan_out, gather, route_after_gather
from ..nodes.batch.load import check_run_input, load, route_after_load, send_input
from ..nodes.batch.reduce import reduce
from ..nodes.batch.shard import shard
from ..nodes.context import Context
from ..nodes.item.item_graph import NO_PAYLOAD, build_item_graph, make_untraced, node_metadata
from ..nodes.state import LoadState, RunInput, RunOutput, RunState, ShardState
from .bound_graph import BoundGraph, BoundSettings
from .caller_policy import CallerPolicy
from .context import RunContext
from .run.shard_plan import UNBOUNDED_STEPS

_ITEM_GRAPH: Final = build_item_graph().compile()
MapReduce = CompiledStateGraph[RunState, RunContext, RunInput, RunOutput]


def build_bound_graph(
    context: RunContext | None = None, *, trust_context: bool = False, fixed: bool = False
) -> BoundGraph[RunState, RunInput, RunOutput]:
    """Build the map-reduce graph with bound settings; None binds the defaults.

    Args:
        context: The settings.
        trust_context: Let the context and input of an invocation change any setting.
        fixed: Use only the bound settings and ignore the context of an invocation.
    """
    policy = None if trust_context or fixed else CallerPolicy.from_environment()
    bound = BoundSettings(context or RunContext(), policy, fixed=fixed)
    graph: BoundGraph[RunState, RunInput, RunOutput] = BoundGraph(
        RunState, bound, check_run_input, input_schema=RunInput, output_schema=RunOutput
    )
    inputs: dict[Any, Any] = {load: LoadState, shard: ShardState}
    inside: dict[Any, Any] = {shard: _ITEM_GRAPH}
    for node in (load, dispatch, shard, gather, approve, reduce, stages):
        graph.add_node(
            node.__name__,
            bound.bind_node(node, inside.get(node)),
            input_schema=inputs.get(node),
            metadata=node_metadata(node),
            trace_policy=NO_PAYLOAD,
        )
    graph.add_conditional_edges(START, make_untraced(send_input), ["load"])
    graph.add_conditional_edges("load", make_untraced(route_after_load), ["dispatch", "stages"])
    graph.add_conditional_edges("stages", make_untraced(route_after_stage), ["stages", END])
    graph.add_conditional_edges("dispatch", make_untraced(fan_out), ["shard"])
    graph.add_edge("shard", "gather")
    after_gather = ["dispatch", "approve", "reduce"]
    graph.add_conditional_edges("gather", make_untraced(route_after_gather), after_gather)
    graph.add_conditional_edges(
        "approve", make_untraced(route_after_approve), ["dispatch", "approve"]
    )
    graph.add_edge("reduce", END)
    return graph


def get_run_graph(checkpointer: BaseCheckpointSaver[Any] | bool) -> MapReduce:
    """Return the graph for a run whose context each invocation gives.

    To build and compile the graph takes some milliseconds, which count for the many small levels of
    an operator; so a process does it once.

    Args:
        checkpointer: LangGraph's saver; False: the run is a subgraph without checkpoints.
    """
    graph = copy(_compile_run_graph())
    graph.checkpointer = checkpointer
    return graph


@cache
def _compile_run_graph() -> MapReduce:
    return build_bound_graph(trust_context=True).compile()


async def stages(state: RunState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Run the next stage of a pipeline: this graph, once or for each level."""
    context = runtime.context
    assert isinstance(context, RunContext), "the graph is bound to a RunContext"
    name, *left = state["stages"]
    end = await context.run_stage(state["run"], name, invoke_run)
    return {**end, "stages": left}


def route_after_stage(state: RunState) -> str:
    """Return the node after a stage: the next stage, or the end."""
    return "stages" if state.get("stages") else END


async def invoke_run(context: RunContext) -> dict[str, Any]:
    """Run one run of a stage as a subgraph of the node.

    Its checkpoints are those of the node: after an interrupt it begins again and folds what the
    journal has.
    """
    inner = get_run_graph(checkpointer=False)
    config = RunnableConfig(recursion_limit=UNBOUNDED_STEPS)
    end: dict[str, Any] = await inner.ainvoke({}, config, context=context)
    return end


graph = build_bound_graph().compile()
"""The graph ``map_reduce`` of ``langgraph.json``."""
