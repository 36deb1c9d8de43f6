"""The graph of a pipeline for embedding: load, then one node for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from langgraph.graph import END, START
from langgraph.runtime import Runtime

from ..backends.core.errors import ConfigurationError, InputError
from ..backends.core.types import RunKey
from ..nodes.batch.load import check_run_input, send_input
from ..nodes.context import Context
from ..nodes.item.item_graph import NO_PAYLOAD, make_untraced, node_metadata
from ..nodes.state import LoadState, RunInput, RunOutput
from .bound_graph import BoundGraph, BoundSettings
from .caller_policy import CallerPolicy
from .context import RunContext
from .map_reduce import invoke_run

LOAD: Final = "load"
"""The first node, whose name no stage of such a graph may have."""


class StageGraphState(RunInput, RunOutput, total=False):
    """State of the graph of stages; everything else is in the folder of the pipeline.

    Keys:
        run: The key of the pipeline.
        stage: Name of the last stage that has ended.
    """

    run: RunKey
    stage: str


def build_bound_stage_graph(
    context: RunContext, names: Sequence[str], *, trust_context: bool = False
) -> BoundGraph[StageGraphState, RunInput, RunOutput]:
    """Build the graph of a pipeline with bound settings.

    Args:
        context: The settings.
        names: Names of its stages, in order.
        trust_context: Let the context and input of an invocation change any setting.

    Raises:
        ConfigurationError: A stage has the name of the first node.
    """
    if LOAD in names:
        raise ConfigurationError(f"stages: {LOAD!r} is the first node of the graph; rename it")
    policy = None if trust_context else CallerPolicy.from_environment()
    bound = BoundSettings(context, policy)
    graph: BoundGraph[StageGraphState, RunInput, RunOutput] = BoundGraph(
        StageGraphState, bound, check_run_input, input_schema=RunInput, output_schema=RunOutput
    )
    load = _make_load(names)
    graph.add_node(
        LOAD,
        bound.bind_node(load),
        input_schema=LoadState,
        metadata=node_metadata(load),
        trace_policy=NO_PAYLOAD,
    )
    graph.add_conditional_edges(START, make_untraced(send_input), [LOAD])
    before = LOAD
    for name in names:
        stage = _make_stage(name)
        graph.add_node(
            name,
            bound.bind_node(stage),
            metadata=node_metadata(stage),
            trace_policy=NO_PAYLOAD,
        )
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


def _make_load(names: Sequence[str]) -> Any:
    async def load(state: LoadState, runtime: Runtime[Context]) -> dict[str, Any]:
        """Read and check the batch, and create the folder of the pipeline."""
        given, items = state["given"], state.get("items")
        if given["pasted"] and items is None:
            msg = "the run ended before its items were written; start it again with the items"
            raise InputError(msg)
        context = _get_context(runtime)
        key = await context.prepare_stages(given["path"], items, given.get("preset"), names)
        return {"run": key, "stage": ""}

    return load


def _make_stage(name: str) -> Any:
    async def stage(state: StageGraphState, runtime: Runtime[Context]) -> dict[str, Any]:
        end = await _get_context(runtime).run_stage(state["run"], name, invoke_run)
        return {**end, "stage": name}

    stage.__doc__ = f"Run the stage {name}: the map-reduce graph, once or for each level."
    return stage


def _get_context(runtime: Runtime[Context]) -> RunContext:
    assert isinstance(runtime.context, RunContext), "the graph of stages is bound to a RunContext"
    return runtime.context
