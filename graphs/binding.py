"""Which settings a graph runs with: those bound to it, or those its caller hands over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import orjson
from langgraph.runtime import Runtime

from ..nodes.context import Context
from .context import RunContext

S = TypeVar("S")
U = TypeVar("U")


class Bound:
    """The settings bound to a graph, and the contexts made of what callers handed over.

    As a subgraph a graph is given its parent's context, of whatever type, or None. So only
    fanfold's own type counts, or a mapping of nothing but its fields.

    Args:
        context: The bound settings.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._made: dict[bytes, RunContext] = {}

    def resolve(self, given: object) -> RunContext:
        """Return the settings that count; equal mappings share one context, so one fleet."""
        if isinstance(given, RunContext):
            return self._context if given == RunContext() else given
        if not isinstance(given, Mapping) or not given or not set(given) <= _names():
            return self._context
        key = orjson.dumps(dict(given), option=orjson.OPT_SORT_KEYS)
        if key not in self._made:
            self._made[key] = RunContext(**given)
        return self._made[key]

    def node(self, run: Callable[[S, Runtime[Context]], Awaitable[U]]) -> Any:
        """Return a node function that runs with the settings that count."""

        async def bound(state: S, runtime: Runtime[Any]) -> U:
            context: Context = self.resolve(runtime.context)
            return await run(state, runtime.override(context=context))

        bound.__doc__ = run.__doc__
        return bound


def _names() -> set[str]:
    return {field.name for field in fields(RunContext) if field.init}
