"""Which settings a graph runs with: those bound to it, or those its caller hands over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from typing import Any, Final, TypeVar

import orjson
from langchain_core.runnables import RunnableLambda
from langgraph.runtime import Runtime, get_runtime

from ..backends.contract.errors import FanfoldError
from ..nodes.context import Context
from .aside import LoopAside
from .context import RunContext
from .invocation import CURRENT

_BASES: Final = frozenset({"config", "preset"})
_MARKS: Final = _BASES | {"overrides", "out"}

S = TypeVar("S")
U = TypeVar("U")


class Bound:
    """The settings bound to a graph, and the contexts made of what callers handed over.

    As a subgraph a graph is given its parent's context, of whatever type, or None. So only
    fanfold's own type counts, or a mapping of nothing but its fields that has ``config``,
    ``preset``, ``overrides`` or ``out``: ``model`` and the like are anybody's.

    What is handed over and names neither a preset nor a configuration goes on top of what is
    bound.

    Args:
        context: The bound settings.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._made: dict[bytes, RunContext] = {}
        self._aside = LoopAside()

    def resolve(self, given: object) -> RunContext:
        """Return the settings that count; equal ones share one context, so one fleet."""
        if given is self._context:
            return self._context
        if isinstance(given, RunContext):
            filled = given.filled()
            alone = bool(filled.keys() & _BASES) or not self._context.filled()
            if not filled:
                return self._context
            return given.joined(self._context) if alone else self._of(self._merged(filled))
        if not isinstance(given, Mapping) or not given.keys() & _MARKS or given.keys() - _names():
            return self._context
        alone = bool(given.keys() & _BASES)
        return self._of(dict(given) if alone else self._merged(given))

    def _merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        overrides = [*self._context.overrides, *given.get("overrides", ())]
        return {**self._context.filled(), **given, "overrides": overrides}

    def _of(self, values: dict[str, Any]) -> RunContext:
        key = orjson.dumps(values, default=repr, option=orjson.OPT_SORT_KEYS)
        if key not in self._made:
            self._made[key] = RunContext(**values).joined(self._context)
        return self._made[key]

    def node(self, run: Callable[[S, Runtime[Context]], Awaitable[U]], inside: Any = None) -> Any:
        """Return a node that runs with the settings that count, in a loop or without one.

        LangGraph refuses ``invoke`` to a graph of coroutines alone; here the thread that it
        would run the node in waits for a loop aside.

        Args:
            run: What the node does.
            inside: A graph that the node runs, for pictures: LangGraph finds it in a closure.
        """

        async def bound(state: S) -> U:
            runtime: Runtime[Any] = get_runtime()
            context = self.resolve(runtime.context)
            try:
                return await run(state, runtime.override(context=context))
            except FanfoldError as error:
                error.hide(context.shown_folders())
                raise

        def waited_for(state: S) -> U:
            _ = inside
            if (invocation := CURRENT.get()) is not None:
                invocation.entered(get_runtime())
            return self._aside.run(lambda: bound(state))

        waited_for.__doc__ = bound.__doc__ = run.__doc__
        return RunnableLambda(waited_for, bound)


def _names() -> set[str]:
    return {field.name for field in fields(RunContext) if field.init}
