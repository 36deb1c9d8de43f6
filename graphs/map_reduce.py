"""The map-reduce graph: load → dispatch → shards → gather → (approve | dispatch | reduce)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START
from langgraph.graph.state import CompiledStateGraph

from ..nodes.batch.approve import approve, route_after_approve
from ..nodes.batch.dispatch import dispatch, fan_out, gather, route_after_gather
from ..nodes.batch.load import check_run_input, load, send_input
from ..nodes.batch.reduce import reduce
from ..nodes.batch.shard import shard
from ..nodes.item.steps import NO_PAYLOAD, build_item_graph, make_untraced, node_metadata
from ..nodes.state import LoadState, RunInput, RunOutput, RunState, ShardState
from .bound_graph import BoundGraph, BoundSettings
from .caller_policy import CallerPolicy
from .context import RunContext

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
    inside: dict[Any, Any] = {shard: build_item_graph().compile()}
    for node in (load, dispatch, shard, gather, approve, reduce):
        graph.add_node(
            node.__name__,
            bound.bind_node(node, inside.get(node)),
            input_schema=inputs.get(node),
            metadata=node_metadata(node),
            trace_policy=NO_PAYLOAD,
        )
    graph.add_conditional_edges(START, make_untraced(send_input), ["load"])
    graph.add_edge("load", "dispatch")
    graph.add_conditional_edges("dispatch", make_untraced(fan_out), ["shard"])
    graph.add_edge("shard", "gather")
    after_gather = ["dispatch", "approve", "reduce"]
    graph.add_conditional_edges("gather", make_untraced(route_after_gather), after_gather)
    graph.add_conditional_edges(
        "approve", make_untraced(route_after_approve), ["dispatch", "approve"]
    )
    graph.add_edge("reduce", END)
    return graph


def build_graph(
    spec: str | Path | Mapping[str, Any] | RunContext | None = None,
    *,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    cache: BaseCache[Any] | None = None,
    trust_context: bool = False,
) -> MapReduce:
    """Return the compiled map-reduce graph with bound settings, for embedding.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`;
            None runs the molecular_screening preset on the simulated fleet.
        checkpointer: LangGraph saver; None if the graph is used as a subgraph.
        cache: LangGraph cache.
        trust_context: Trust the context, input and answers of every invocation. By default they
            can set only what docs/embedding.md lists, and nothing that starts a command, reads a
            file, chooses an endpoint or raises a bound limit.

    Returns:
        A graph whose input is ``{"path": …}``, ``{"items": [{…}, …]}`` or ``{}`` for the
        configured input, and whose output has ``aggregate``, ``progress`` and ``results``.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    if isinstance(spec, RunContext):
        context = spec
    else:
        config = dict(spec) if isinstance(spec, Mapping) else str(spec) if spec else None
        context = RunContext(config=config)
    if spec is not None:
        _ = context.loaded, context.out_path  # report wrong settings here, not in the first run
    graph = build_bound_graph(context, trust_context=trust_context)
    return graph.compile(checkpointer=checkpointer, cache=cache)


graph = build_bound_graph().compile()
"""The graph ``map_reduce`` of ``langgraph.json``."""
