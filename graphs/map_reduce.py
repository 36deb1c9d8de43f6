"""The map-reduce graph: load → dispatch → shards → gather → (approve | dispatch | reduce)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from ..nodes.approve import approve
from ..nodes.dispatch import dispatch, fan_out, gather, more
from ..nodes.load import enter, load
from ..nodes.reduce import reduce
from ..nodes.shard import shard
from ..nodes.state import LoadState, RunInput, RunOutput, RunState, ShardState
from .binding import Bound
from .context import RunContext
from .invocation import Invocation, claims, is_forced
from .item import build_item, described


class MapReduce(CompiledStateGraph[RunState, RunContext, RunInput, RunOutput]):
    """The compiled map-reduce; it knows of each call when it ends, however it ends."""

    async def astream(
        self,
        input: Any,  # noqa: A002 - its name in LangGraph
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> AsyncIterator[Any]:
        """Do what LangGraph's own does; at the end nothing of the run is left open."""
        invocation = Invocation(config)
        if (thread := self._thread(config)) is not None:
            await claims().take_thread(*thread, invocation)
        parts = super().astream(input, config, **options)
        try:
            while True:
                with invocation.reading():
                    try:
                        part = await anext(parts)
                    except StopAsyncIteration:
                        return
                yield part
        except asyncio.CancelledError as error:
            if is_forced(error):
                invocation.hurry()
            raise
        finally:
            try:
                await parts.aclose()  # type: ignore[attr-defined]  # it is a generator
            finally:
                await invocation.end()

    def stream(
        self,
        input: Any,  # noqa: A002 - its name in LangGraph
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Do the same in plain code."""
        invocation = Invocation(config)
        if (thread := self._thread(config)) is not None:
            claims().take_thread_plainly(*thread, invocation)
        parts = super().stream(input, config, **options)
        try:
            while True:
                with invocation.reading():
                    try:
                        part = next(parts)
                    except StopIteration:
                        return
                yield part
        finally:
            try:
                parts.close()  # type: ignore[attr-defined]  # it is a generator
            finally:
                invocation.end_plainly()

    def _thread(self, config: RunnableConfig | None) -> tuple[Hashable, str] | None:
        """Return the thread of the graph's own saver that a call works on, and its name."""
        if not isinstance(self.checkpointer, BaseCheckpointSaver):
            return None
        given = merge_configs(self.config, config).get("configurable", {})
        name = given.get("thread_id")
        if name is None:
            return None
        return (id(self.checkpointer), str(name)), f"thread {name}"


class Builder(StateGraph[RunState, RunContext, RunInput, RunOutput]):
    """The map-reduce before it is compiled."""

    def compile(self, *args: Any, **options: Any) -> MapReduce:
        """Compile it as LangGraph does, to a graph that knows of its calls."""
        compiled = super().compile(*args, **options)
        made = MapReduce.__new__(MapReduce)
        made.__dict__ |= compiled.__dict__
        return made


def build(context: RunContext | None = None) -> Builder:
    """Make the map-reduce with settings bound to it; None binds the defaults."""
    bound = Bound(context or RunContext())
    graph = Builder(RunState, RunContext, input_schema=RunInput, output_schema=RunOutput)
    graph.add_node("load", bound.node(load), input_schema=LoadState, metadata=described(load))
    graph.add_node("dispatch", bound.node(dispatch), metadata=described(dispatch))
    view = bound.node(shard, build_item().compile())
    graph.add_node("shard", view, input_schema=ShardState, metadata=described(shard))
    graph.add_node("gather", bound.node(gather), metadata=described(gather))
    graph.add_node("approve", bound.node(approve), metadata=described(approve))
    graph.add_node("reduce", bound.node(reduce), metadata=described(reduce))
    graph.add_conditional_edges(START, enter, ["load"])
    graph.add_edge("load", "dispatch")
    graph.add_conditional_edges("dispatch", fan_out, ["shard"])
    graph.add_edge("shard", "gather")
    graph.add_conditional_edges("gather", more, ["dispatch", "approve", "reduce"])
    graph.add_edge("approve", "dispatch")
    graph.add_edge("reduce", END)
    return graph


def build_graph(
    spec: str | Path | Mapping[str, Any] | RunContext | None = None,
    *,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    cache: BaseCache[Any] | None = None,
) -> MapReduce:
    """Return the compiled map-reduce with its settings bound, for embedding.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`;
            None runs the molecular_screening preset on the simulated fleet.
        checkpointer: LangGraph's saver; as a subgraph leave it None.
        cache: LangGraph's cache.

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
        _ = context.loaded  # what is wrong shall show here, not in the first run
    return build(context).compile(checkpointer=checkpointer, cache=cache)


graph = build().compile()
"""What ``langgraph.json`` names ``map_reduce``."""
