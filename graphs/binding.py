"""Which settings a graph runs with, and the checks that each invocation of it passes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, cast

import orjson
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.config import ensure_config, merge_configs
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime, get_runtime
from langgraph.types import Command
from langgraph.typing import InputT, OutputT, StateT

from ..backends.core.aio import LoopAside
from ..backends.core.errors import ConfigurationError, FanfoldError, InputError
from ..configs.loader import is_preset
from ..nodes.batch.load import unknown_keys
from ..nodes.context import Context
from .context import RunContext
from .context_schema import request_form
from .invocation import CURRENT, follow, follow_plainly
from .requests import RequestPolicy

_BASES: Final = frozenset({"config", "preset"})
_MARKS: Final = _BASES | {"overrides", "out"}
_KEPT: Final = 256
_SAVER: Final = "__pregel_checkpointer"
_NOTHING: Final = (
    "there is nothing to resume: no interrupt of this thread waits for an answer; start a run with "
    "an input, or name the thread of the run that asked"
)
_READ: Final = "__pregel_read"
"""Where LangGraph hands a node the reader of its graph's state."""

_SERVERS: Final = frozenset(
    {
        "__event_streaming_v2",
        "assistant_id",
        "checkpoint_id",
        "checkpoint_map",
        "checkpoint_ns",
        "cron_id",
        "graph_id",
        "run_id",
        "thread_id",
        "user_id",
    }
)
"""Keys that LangGraph's server moves from ``configurable`` to the context, beside its private
ones."""

_PRIVATE: Final = re.compile(
    r"__pregel_\w+|__\w+__"
    r"|langgraph_(auth_(user|user_id|permissions)|request_id|version|api_version|api_url|plan|host)"
)

S = TypeVar("S")
U = TypeVar("U")

CheckInput: TypeAlias = Callable[[object, Sequence[str]], None]
"""Raises InputError for an input that does not fit; is given the input, and the keys of it that
belong to a parent graph's state."""


class Bound:
    """The settings bound to a graph, and the contexts made of what callers handed over.

    As a subgraph a graph is given its parent's context, of whatever type, or None. So only
    fanfold's own type counts, or a mapping of nothing but its fields that has ``config``,
    ``preset``, ``overrides`` or ``out``: ``model`` and the like are anybody's.

    What is handed over is a request: see :class:`~fanfold.graphs.requests.RequestPolicy`. In a
    graph that trusts it, it may set everything; what names neither a preset nor a configuration
    goes on top of what is bound.

    Args:
        context: The bound settings.
        policy: What requests may set; None trusts them.
        fixed: Whether the bound settings count alone, whatever is handed over.
    """

    def __init__(
        self, context: RunContext, policy: RequestPolicy | None = None, *, fixed: bool = False
    ) -> None:
        self._owner, self.policy, self._fixed = context, policy, fixed
        self._context = context if policy is None else RunContext.of_request(context, policy, {})
        self._made: dict[bytes, RunContext] = {}
        self._aside = LoopAside()

    @property
    def preset(self) -> str | None:
        """Return the preset that is bound, if it is one."""
        config = self._owner.config
        if config in (None, ""):
            return self._owner.preset
        return config if isinstance(config, str) and is_preset(config) else None

    def resolve(self, given: object) -> RunContext:
        """Return the settings that count; equal ones share one context, so one fleet.

        Raises:
            ConfigurationError: It is a request that sets what a request may not set.
        """
        if self._fixed or given is self._owner:
            return self._context
        if isinstance(given, RunContext):
            return self._trusted(given) if self.policy is None else self._requested(given)
        marks = _MARKS if self.policy is None else _MARKS - {"out"}
        if not isinstance(given, Mapping) or not given.keys() & marks or given.keys() - _names():
            return self._context
        if self.policy is not None:
            return self._request_of(given)
        alone = bool(given.keys() & _BASES)
        return self._of(dict(given) if alone else self._merged(given))

    def _trusted(self, given: RunContext) -> RunContext:
        filled = _filled(given)
        if not filled and not given.preloaded:
            return self._context
        alone = bool(filled.keys() & _BASES) or given.preloaded or not self._context.filled()
        return given.joined(self._context) if alone else self._of(self._merged(filled))

    def read(self, given: Mapping[str, Any]) -> RunContext:
        """Return the settings of a mapping that is this graph's own context.

        Raises:
            ConfigurationError: A key is unknown, or it sets what a request may not set.
        """
        names = _names()
        fields_ = {
            key: value for key, value in given.items() if key in names or not _is_servers(key)
        }
        if unknown := sorted(fields_.keys() - names):
            known = sorted(names if self.policy is None else filter(self.policy.shows, names))
            msg = f"context: {unknown_keys(unknown, known)}; the settings are {', '.join(known)}"
            raise ConfigurationError(msg)
        if self.policy is None or self._fixed:
            return RunContext(**fields_)
        return self._request_of(fields_)

    def _merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        overrides = [*self._context.overrides, *given.get("overrides", ())]
        bound = self._context.filled()
        if self._context.named is not None:
            bound["out"] = str(self._context.named)
        return {**bound, **given, "overrides": overrides}

    def _of(self, values: dict[str, Any]) -> RunContext:
        return self._kept(values, lambda: RunContext(**values).joined(self._context))

    def _requested(self, given: RunContext) -> RunContext:
        if given.is_request_to(self._owner):
            return given
        if given.preloaded:
            msg = (
                "context: a context of settings that are loaded already has no place in an "
                "invocation; bind it, or trust what arrives: build_graph(…, trust_context=True)"
            )
            raise ConfigurationError(msg)
        return self._request_of(_filled(given))

    def _request_of(self, given: Mapping[str, Any]) -> RunContext:
        """Return the context of a request; a field at its default asks for nothing."""
        policy = self.policy
        assert policy is not None, "only a request is checked"
        filled = RunContext(**given).filled()
        if (preset := given.get("preset")) in (None, "", self.preset):
            filled.pop("preset", None)
        else:
            filled["preset"] = preset  # also the one that is the form's default
        if not filled:
            return self._context
        policy.check(filled)
        return self._kept(filled, lambda: RunContext.of_request(self._owner, policy, filled))

    def _kept(self, values: Mapping[str, Any], make: Callable[[], RunContext]) -> RunContext:
        key = orjson.dumps(dict(values), default=repr, option=orjson.OPT_SORT_KEYS)
        made = self._made.pop(key, None) or make()
        self._made[key] = made  # the last one used is the last one to go
        if len(self._made) > _KEPT:
            del self._made[next(iter(self._made))]
        return made

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
            context = self.resolve(await _anchored(runtime.context))
            try:
                return await run(state, runtime.override(context=context))
            except FanfoldError as error:
                error.hide(await asyncio.to_thread(context.shown_folders))
                raise

        def waited_for(state: S) -> U:
            _ = inside
            if (invocation := CURRENT.get()) is not None:
                invocation.entered(get_runtime())
            return self._aside.run(lambda: bound(state))

        waited_for.__doc__ = bound.__doc__ = run.__doc__
        return RunnableLambda(waited_for, bound)


async def _anchored(given: Any) -> Any:
    """Return what a caller handed over with ``out`` as an absolute path, as it is typed there."""
    out = given.get("out") if isinstance(given, Mapping) else getattr(given, "out", None)
    if not isinstance(out, str) or not out or out.startswith("/"):
        return given
    if isinstance(given, RunContext):
        await asyncio.to_thread(lambda: given.named)  # which it remembers
    if isinstance(given, Mapping):
        return {**given, "out": await asyncio.to_thread(lambda: str(Path(out).absolute()))}
    return given


def _filled(given: RunContext) -> dict[str, Any]:
    """Return the fields that are filled in, the folder as an absolute path."""
    return given.filled() | ({} if given.named is None else {"out": str(given.named)})


class BoundGraph(StateGraph[StateT, RunContext, InputT, OutputT]):
    """A graph whose compiled form checks each invocation before anything happens.

    Args:
        state: The state's schema.
        bound: The settings bound to it.
        check_input: Checks an input.
        input_schema: The input's schema.
        output_schema: The output's schema.
    """

    def __init__(
        self,
        state: type[StateT],
        bound: Bound,
        check_input: CheckInput,
        *,
        input_schema: type[InputT],
        output_schema: type[OutputT],
    ) -> None:
        self.bound, self.check_input = bound, check_input
        shown: Any = RunContext
        if bound.policy is not None:
            shown = request_form(bound.policy.shows, bound.preset)
        super().__init__(state, shown, input_schema=input_schema, output_schema=output_schema)

    def compile(
        self, *args: Any, **options: Any
    ) -> CompiledStateGraph[StateT, RunContext, InputT, OutputT]:
        """Compile the graph; the options are LangGraph's."""
        checked = object.__new__(CheckedGraph)
        checked.__dict__ |= super().compile(*args, **options).__dict__
        return cast("CompiledStateGraph[StateT, RunContext, InputT, OutputT]", checked)


class CheckedGraph(CompiledStateGraph[Any, RunContext, Any, Any]):
    """A compiled graph that refuses what an invocation may not do.

    Unknown keys of its own input and context are errors. Where invocations are not trusted, its
    state is not theirs to write either: no ``Command`` with ``update`` or ``goto``, and no
    ``update_state``.
    """

    @property
    def _bound(self) -> Bound:
        return cast(Any, self.builder).bound  # type: ignore[no-any-return]

    def stream(
        self,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        *,
        context: Any = None,
        **more: Any,
    ) -> Iterator[Any]:
        """Stream the graph's steps; see LangGraph."""
        given = self._checked(input, config), config
        more["context"] = self._context_of(context)
        parts: Iterator[Any]
        if input is None:
            parts = self._streamed(config, more)
        elif isinstance(input, Command) and input.resume is not None:
            parts = self._resumed(input, config, more)
        else:
            parts = super().stream(*given, **more)
        return follow_plainly(parts, config, self._thread(config))

    def astream(
        self,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        *,
        context: Any = None,
        **more: Any,
    ) -> AsyncIterator[Any]:
        """Stream the graph's steps; see LangGraph."""
        given = self._checked(input, config), config
        more["context"] = self._context_of(context)
        parts: AsyncIterator[Any]
        if input is None:
            parts = self._astreamed(config, more)
        elif isinstance(input, Command) and input.resume is not None:
            parts = self._aresumed(input, config, more)
        else:
            parts = super().astream(*given, **more)
        return follow(parts, config, self._thread(config))

    def _thread(self, config: RunnableConfig | None) -> tuple[Hashable, str] | None:
        """Return the thread of the graph's own saver that a call works on, and its name."""
        if not isinstance(self.checkpointer, BaseCheckpointSaver):
            return None
        given = merge_configs(self.config, config).get("configurable", {})
        name = given.get("thread_id")
        return None if name is None else ((id(self.checkpointer), str(name)), f"thread {name}")

    def _streamed(self, config: RunnableConfig | None, more: dict[str, Any]) -> Iterator[Any]:
        """Go on with what there is, or else run the bound input."""
        try:
            yield from super().stream(None, config, **more)
        except EmptyInputError:
            self._check_unnamed(config)
            yield from super().stream(cast(Any, {}), config, **more)

    async def _astreamed(
        self, config: RunnableConfig | None, more: dict[str, Any]
    ) -> AsyncIterator[Any]:
        try:
            async with aclosing(cast(Any, super().astream(None, config, **more))) as parts:
                async for part in parts:
                    yield part
        except EmptyInputError:
            self._check_unnamed(config)
            async with aclosing(cast(Any, super().astream(cast(Any, {}), config, **more))) as parts:
                async for part in parts:
                    yield part

    def _check_unnamed(self, config: RunnableConfig | None) -> None:
        """Check that a call without an input names no checkpoint: it meant to go on from there.

        Raises:
            InputError: It names one.
        """
        given = ensure_config(merge_configs(self.config, config)).get("configurable", {})
        if name := given.get("checkpoint_id"):
            msg = (
                f"there is no checkpoint {name} to go on from; name one of the thread's history, "
                "or give an input, {} for the bound one"
            )
            raise InputError(msg)

    def _resumed(
        self, command: Any, config: RunnableConfig | None, more: dict[str, Any]
    ) -> Iterator[Any]:
        """Answer an interrupt, if there is one."""
        if self._saves(config) and not self.get_state(ensure_config(config)).next:
            raise InputError(_NOTHING)
        yield from super().stream(command, config, **more)

    async def _aresumed(
        self, command: Any, config: RunnableConfig | None, more: dict[str, Any]
    ) -> AsyncIterator[Any]:
        if self._saves(config) and not (await self.aget_state(ensure_config(config))).next:
            raise InputError(_NOTHING)
        async with aclosing(cast(Any, super().astream(command, config, **more))) as parts:
            async for part in parts:
                yield part

    def _saves(self, config: RunnableConfig | None) -> bool:
        """Say whether a call has a saver; LangGraph itself refuses an answer without one."""
        given = ensure_config(merge_configs(self.config, config)).get("configurable", {})
        return isinstance(given.get(_SAVER, self.checkpointer), BaseCheckpointSaver)

    def _checked(self, given: Any, config: RunnableConfig | None) -> Any:
        """Return an input that may be run.

        Raises:
            InputError: A key is unknown, or the input is none.
            ConfigurationError: A request commands more than an answer to an interrupt.
        """
        if isinstance(given, Command):
            if given.resume is None and not (given.update or given.goto or given.graph):
                raise InputError("an empty Command: give the answer to an interrupt as resume=…")
            if isinstance(given.resume, Mapping) and (
                odd := [key for key in given.resume if not isinstance(key, str)]
            ):
                raise InputError(f"resume: the key {odd[0]!r} is no text; name a total, as 'usd'")
            if self._bound.policy is not None and (given.update or given.goto or given.graph):
                msg = (
                    "a Command with update, goto or graph: a request may only answer an interrupt "
                    "(resume); build_graph(…, trust_context=True) trusts what arrives"
                )
                raise ConfigurationError(msg)
        elif given is not None:
            cast(Any, self.builder).check_input(given, self._parents_keys(given, config))
        return given

    def _parents_keys(self, given: Any, config: RunnableConfig | None) -> tuple[str, ...]:
        """Return the keys of an input that a parent graph's state has: they are the parent's."""
        read = ensure_config(config).get("configurable", {}).get(_READ)
        if not callable(read) or not isinstance(given, Mapping):
            return ()

        def has(key: str) -> bool:
            try:
                read(key, False)
            except KeyError:
                return False
            return True

        return tuple(key for key in given if isinstance(key, str) and has(key))

    def _context_of(self, given: Any) -> Any:
        """Return the context of a call.

        Raises:
            ConfigurationError: It is of another type.
        """
        if given is None or isinstance(given, RunContext):
            return given
        if not isinstance(given, Mapping):
            msg = (
                "context: give a mapping of settings, or a RunContext "
                f"(found {type(given).__name__})"
            )
            raise ConfigurationError(msg)
        return self._bound.read(given)

    def bulk_update_state(self, *args: Any, **more: Any) -> RunnableConfig:
        """Write the state; see LangGraph.

        Raises:
            ConfigurationError: Invocations are not trusted.
        """
        self._check_update()
        return super().bulk_update_state(*args, **more)

    async def abulk_update_state(self, *args: Any, **more: Any) -> RunnableConfig:
        """Write the state; see LangGraph.

        Raises:
            ConfigurationError: Invocations are not trusted.
        """
        self._check_update()
        return await super().abulk_update_state(*args, **more)

    def _check_update(self) -> None:
        if self._bound.policy is not None:
            msg = (
                "a request may not write this graph's state; go back by running from an earlier "
                "checkpoint, or trust what arrives: build_graph(…, trust_context=True)"
            )
            raise ConfigurationError(msg)

    def get_context_jsonschema(self) -> dict[str, Any] | None:
        """Return the JSON Schema of the settings that a request may make."""
        schema = super().get_context_jsonschema()
        return None if schema is None else schema | {"properties": _Shown(schema["properties"])}


class _Shown(dict[str, Any]):
    """The fields that a form shows.

    LangGraph's server drops the keys of a context that the schema does not have, and says
    nothing; here it finds every key, so that the graph itself can refuse them by name.
    """

    def __contains__(self, key: object) -> bool:
        return True


def _is_servers(key: object) -> bool:
    """Say whether LangGraph's server, not a caller, has put a key into a context."""
    return key in _SERVERS or (isinstance(key, str) and _PRIVATE.fullmatch(key) is not None)


def check_item(given: object, parents: Sequence[str] = ()) -> None:
    """Check the input of the item graph: ``id`` and ``row``, and nothing else.

    Args:
        given: The input.
        parents: Keys of a parent graph's state, which are none of this graph's business.

    Raises:
        InputError: A key is missing, unknown or of the wrong kind.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"input: give a mapping with id and row (found {type(given).__name__})")
    known = ("id", "row")
    if unknown := [str(key) for key in given if key not in known and key not in parents]:
        raise InputError(f"input: {unknown_keys(unknown, known)}; give id and row")
    if not isinstance(given.get("id"), str) or not isinstance(given.get("row"), Mapping):
        raise InputError("input: give id, a text, and row, a mapping of columns")


def _names() -> set[str]:
    return {field.name for field in fields(RunContext) if field.init}
