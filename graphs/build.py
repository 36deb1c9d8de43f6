"""``build_graph``: the compiled graph of settings, of one run or with one node for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph

from ..nodes.state import RunInput, RunOutput
from .context import RunContext
from .map_reduce import build_bound_graph
from .stage_graph import build_bound_stage_graph

AnyGraph = CompiledStateGraph[Any, RunContext, RunInput, RunOutput]


def build_graph(
    spec: str | Path | Mapping[str, Any] | RunContext | None = None,
    *,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    cache: BaseCache[Any] | None = None,
    trust_context: bool = False,
) -> AnyGraph:
    """Return the compiled map-reduce graph with bound settings, for embedding.

    Settings with stages make a graph with one node for each stage.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`;
            None runs the quickstart preset on the simulated fleet.
        checkpointer: LangGraph saver; None if the graph is used as a subgraph.
        cache: LangGraph cache.
        trust_context: Trust the context, input and answers of every invocation. By default they
            can set only what docs/embedding.md lists, and nothing that starts a command, reads a
            file, chooses an endpoint or raises a bound limit.

    Returns:
        A graph whose input is ``{"path": …}``, ``{"items": [{…}, …]}`` or ``{}`` for the
        configured input, and whose output has ``aggregate``, ``progress`` and ``results``; those of
        the last stage.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    if isinstance(spec, RunContext):
        context = spec
    else:
        config = dict(spec) if isinstance(spec, Mapping) else str(spec) if spec else None
        context = RunContext(config=config)
    stages = None
    if spec is not None:
        _ = context.out_path  # report wrong settings here, not in the first run
        stages = context.loaded.config.stages
    if stages is not None:
        names = [stage.name for stage in stages]
        staged = build_bound_stage_graph(context, names, trust_context=trust_context)
        return staged.compile(checkpointer=checkpointer, cache=cache)
    graph = build_bound_graph(context, trust_context=trust_context)
    return graph.compile(checkpointer=checkpointer, cache=cache)
