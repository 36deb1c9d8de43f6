"""Graphs that check each invocation: settings bound to a graph, and what a caller may change."""

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
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import (
    ensure_config,
    get_callback_manager_for_config,
    merge_configs,
)
from langchain_core.tracers import LangChainTracer
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime, get_runtime
from langgraph.types import Command, StateSnapshot
from langgraph.typing import InputT, OutputT, StateT
from langsmith.utils import get_env_var

from ..backends.core.aio import PortalProvider
from ..backends.core.errors import ConfigurationError, FanfoldError, InputError
from ..configs.preset_files import is_preset
from ..configs.raw_settings import check_overrides
from ..nodes.batch.load import describe_unknown_keys
from ..nodes.context import Context
from ..nodes.item.item_graph import NO_PAYLOAD, make_untraced
from .caller_policy import CallerPolicy
from .context import RunContext
from .context_schema import build_request_form
from .invocation import (
    CURRENT_INVOCATION,
    follow_stream,
    follow_stream_sync,
)

_BASES: Final = frozenset({"config", "preset"})
_MARKS: Final = _BASES | {"overrides", "out"}
_KEPT: Final = 256
_TRACED_ITEMS: Final = 1000
"""Pasted items that LangSmith may be sent: they are the input of the graph's run, whose trace no
policy of a node changes."""
_SAVER: Final = "__pregel_checkpointer"
_NOTHING: Final = (
    "there is nothing to resume: no interrupt of this thread waits for an answer; start a run with "
    "an input, continue a stopped one with the input None, or name the thread of the paused run"
)
_INTERRUPT_ID: Final = re.compile(r"[0-9a-f]{32}")
_READ: Final = "__pregel_read"
"""Key under which LangGraph gives a node the reader of its graph's state."""

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
"""Keys, besides private ones, that LangGraph's server moves from ``configurable`` to contexts."""

_PRIVATE: Final = re.compile(
    r"__pregel_\w+|__\w+__"
    r"|langgraph_(auth_(user|user_id|permissions)|request_id|version|api_version|api_url|plan|host)"
)

S = TypeVar("S")
U = TypeVar("U")

CheckInput: TypeAlias = Callable[[object, Sequence[str]], None]
"""Raises InputError for a wrong input; takes the input and its keys of a parent graph's state."""


class BoundSettings:
    """The settings bound to a graph, and the contexts made from those of callers.

    A subgraph gets its parent's context, of any type, or None. So only fanfold's own type is used,
    or a mapping that has only its fields and at least one of ``config``, ``preset``, ``overrides``
    and ``out``: names such as ``model`` may belong to the parent.

    The context of a caller is a request: see :class:`~fanfold.graphs.caller_policy.CallerPolicy`.
    In a graph that trusts it, it may set everything; without a preset or a configuration it changes
    the bound settings.

    Args:
        context: The bound settings.
        policy: The settings that requests may change; None trusts them.
        fixed: Use only the bound settings, whatever the caller gives.
    """

    def __init__(
        self, context: RunContext, policy: CallerPolicy | None = None, *, fixed: bool = False
    ) -> None:
        self._owner, self.policy, self._fixed = context, policy, fixed
        self._context = context if policy is None else RunContext.from_request(context, policy, {})
        self._contexts: dict[bytes, RunContext] = {}
        self._portal = PortalProvider()

    @property
    def preset(self) -> str | None:
        """Return the bound preset, or None."""
        config = self._owner.config
        if config in (None, ""):
            return self._owner.preset
        return config if isinstance(config, str) and is_preset(config) else None

    def resolve(self, given: object) -> RunContext:
        """Return the effective settings; equal ones share one context, and so one fleet.

        Raises:
            ConfigurationError: A request sets what a request may not set.
        """
        if self._fixed or given is self._owner:
            return self._context
        if isinstance(given, RunContext):
            return (
                self._resolve_trusted(given)
                if self.policy is None
                else self._resolve_request(given)
            )
        marks = _MARKS if self.policy is None else _MARKS - {"out"}
        if not isinstance(given, Mapping) or not given.keys() & marks or given.keys() - _names():
            return self._context
        if self.policy is not None:
            return self._make_request_context(given)
        alone = bool(given.keys() & _BASES)
        return self._make_context(dict(given) if alone else self._merge(given))

    def _resolve_trusted(self, given: RunContext) -> RunContext:
        if given.preloaded:
            return given
        filled = _changed_fields(given)
        if not filled:
            return self._context
        alone = bool(filled.keys() & _BASES) or not self._context.changed_fields()
        return given.share_runs(self._context) if alone else self._make_context(self._merge(filled))

    def read_context(self, given: Mapping[str, Any]) -> RunContext:
        """Return the settings from a mapping that is this graph's own context.

        Raises:
            ConfigurationError: A key is unknown, or a request may not set it.
        """
        names = _names()
        fields_ = {
            key: value for key, value in given.items() if key in names or not _is_server_key(key)
        }
        if unknown := sorted(fields_.keys() - names):
            known = sorted(names if self.policy is None else filter(self.policy.is_shown, names))
            msg = (
                f"context: {describe_unknown_keys(unknown, known)}; the settings are "
                f"{', '.join(known)}"
            )
            raise ConfigurationError(msg)
        if self.policy is None or self._fixed:
            return RunContext(**fields_)
        return self._make_request_context(fields_)

    def _merge(self, given: Mapping[str, Any]) -> dict[str, Any]:
        overrides = [*self._context.overrides, *check_overrides(given.get("overrides", []))]
        bound = self._context.changed_fields()
        if self._context.out_path is not None:
            bound["out"] = str(self._context.out_path)
        return {**bound, **given, "overrides": overrides}

    def _make_context(self, values: dict[str, Any]) -> RunContext:
        return self._get_or_make(values, lambda: RunContext(**values).share_runs(self._context))

    def _resolve_request(self, given: RunContext) -> RunContext:
        if given.is_request_to(self._owner):
            return given
        if given.preloaded:
            msg = (
                "context: an invocation cannot use a context with loaded settings; bind it, or "
                "trust the context: build_graph(…, trust_context=True)"
            )
            raise ConfigurationError(msg)
        return self._make_request_context(_changed_fields(given))

    def _make_request_context(self, given: Mapping[str, Any]) -> RunContext:
        """Return the context of a request; a field at its default requests nothing."""
        policy = self.policy
        assert policy is not None, "only a request is checked"
        filled = RunContext(**given).changed_fields()
        if (preset := given.get("preset")) in (None, "", self.preset):
            filled.pop("preset", None)
        else:
            filled["preset"] = preset  # also if it is the default of the form
        if not filled:
            return self._context
        policy.check_fields(filled)
        return self._get_or_make(
            filled, lambda: RunContext.from_request(self._owner, policy, filled)
        )

    def _get_or_make(self, values: Mapping[str, Any], make: Callable[[], RunContext]) -> RunContext:
        key = orjson.dumps(dict(values), default=repr, option=orjson.OPT_SORT_KEYS)
        made = self._contexts.pop(key, None) or make()
        self._contexts[key] = made  # the last one used is evicted last
        if len(self._contexts) > _KEPT:
            del self._contexts[next(iter(self._contexts))]
        return made

    def bind_node(
        self, run: Callable[[S, Runtime[Context]], Awaitable[U]], inside: Any = None
    ) -> Any:
        """Return a node that runs with the effective settings, with or without an event loop.

        LangGraph refuses ``invoke`` for a graph of coroutines only; here the thread of the node
        waits for a loop in another thread.

        Args:
            run: The node function.
            inside: A graph that the node runs; LangGraph finds it in the closure, for pictures.
        """

        async def bound(state: S) -> U:
            runtime: Runtime[Any] = get_runtime()
            context = self.resolve(await _absolute_out(runtime.context))
            try:
                return await run(state, runtime.override(context=context))
            except FanfoldError as error:
                error.hide_folders(await asyncio.to_thread(context.list_shown_folders))
                raise

        def run_in_thread(state: S) -> U:
            _ = inside
            if (invocation := CURRENT_INVOCATION.get()) is not None:
                invocation.set_runtime(get_runtime())
            return self._portal.run(lambda: bound(state))

        run_in_thread.__doc__ = bound.__doc__ = run.__doc__
        return make_untraced(run_in_thread, bound)


async def _absolute_out(given: Any) -> Any:
    """Return the caller's context with ``out`` as an absolute path; keep its type."""
    out = given.get("out") if isinstance(given, Mapping) else getattr(given, "out", None)
    if not isinstance(out, str) or not out or out.startswith("/"):
        return given
    if isinstance(given, RunContext):
        await asyncio.to_thread(lambda: given.out_path)  # a cached property
    if isinstance(given, Mapping):
        return {**given, "out": await asyncio.to_thread(lambda: str(Path(out).absolute()))}
    return given


def _changed_fields(given: RunContext) -> dict[str, Any]:
    """Return the changed fields, with the folder as an absolute path."""
    return given.changed_fields() | ({} if given.out_path is None else {"out": str(given.out_path)})


class BoundGraph(StateGraph[StateT, RunContext, InputT, OutputT]):
    """A graph whose compiled form checks each invocation before it starts.

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
        bound: BoundSettings,
        check_input: CheckInput,
        *,
        input_schema: type[InputT],
        output_schema: type[OutputT],
    ) -> None:
        self.bound, self.check_input = bound, check_input
        shown: Any = RunContext
        if bound.policy is not None:
            shown = build_request_form(bound.policy.is_shown, bound.preset)
        super().__init__(state, shown, input_schema=input_schema, output_schema=output_schema)

    def compile(
        self, *args: Any, **options: Any
    ) -> CompiledStateGraph[StateT, RunContext, InputT, OutputT]:
        """Compile the graph; the options are LangGraph's."""
        checked = object.__new__(CheckedGraph)
        checked.__dict__ |= super().compile(*args, **options).__dict__
        checked.nodes[START].trace_policy = NO_PAYLOAD
        return cast("CompiledStateGraph[StateT, RunContext, InputT, OutputT]", checked)


class CheckedGraph(CompiledStateGraph[Any, RunContext, Any, Any]):
    """A compiled graph that checks what an invocation may do.

    Unknown keys of its input and context are errors. Invocations that are not trusted cannot write
    its state either: no ``Command`` with ``update`` or ``goto``, and no ``update_state``.
    """

    @property
    def _bound(self) -> BoundSettings:
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
        given = self._check_input(input, config), config
        more["context"] = self._read_context(context)
        parts: Iterator[Any]
        if input is None:
            parts = self._stream_or_start(config, more)
        elif isinstance(input, Command) and input.resume is not None:
            parts = self._stream_resume(input, config, more)
        else:
            parts = super().stream(*given, **more)
        return follow_stream_sync(parts, config, self._thread(config))

    def astream(
        self,
        input: Any,  # noqa: A002 - LangGraph's name
        config: RunnableConfig | None = None,
        *,
        context: Any = None,
        **more: Any,
    ) -> AsyncIterator[Any]:
        """Stream the graph's steps; see LangGraph."""
        given = self._check_input(input, config), config
        more["context"] = self._read_context(context)
        parts: AsyncIterator[Any]
        if input is None:
            parts = self._astream_or_start(config, more)
        elif isinstance(input, Command) and input.resume is not None:
            parts = self._astream_resume(input, config, more)
        else:
            parts = super().astream(*given, **more)
        return follow_stream(parts, config, self._thread(config))

    def _thread(self, config: RunnableConfig | None) -> tuple[Hashable, str] | None:
        """Return the key and name of the thread in the graph's own saver, or None."""
        if not isinstance(self.checkpointer, BaseCheckpointSaver):
            return None
        given = merge_configs(self.config, config).get("configurable", {})
        name = given.get("thread_id")
        return None if name is None else ((id(self.checkpointer), str(name)), f"thread {name}")

    def _stream_or_start(
        self, config: RunnableConfig | None, more: dict[str, Any]
    ) -> Iterator[Any]:
        """Resume the thread, or run the bound input if it is empty."""
        try:
            yield from super().stream(None, config, **more)
        except EmptyInputError:
            self._check_unnamed(config)
            yield from super().stream(cast(Any, {}), config, **more)

    async def _astream_or_start(
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
        """Check that a call without an input names no checkpoint that does not exist.

        Raises:
            InputError: It names one.
        """
        given = ensure_config(merge_configs(self.config, config)).get("configurable", {})
        if name := given.get("checkpoint_id"):
            msg = (
                f"there is no checkpoint {name}; name one of the thread's history, or give an "
                "input, {} for the bound one"
            )
            raise InputError(msg)

    def _stream_resume(
        self, command: Any, config: RunnableConfig | None, more: dict[str, Any]
    ) -> Iterator[Any]:
        """Answer an interrupt, or raise if there is none."""
        if self._has_saver(config):
            _check_addressee(command.resume, self.get_state(ensure_config(config)), config)
        yield from super().stream(command, config, **more)

    async def _astream_resume(
        self, command: Any, config: RunnableConfig | None, more: dict[str, Any]
    ) -> AsyncIterator[Any]:
        if self._has_saver(config):
            state = await self.aget_state(ensure_config(config))
            _check_addressee(command.resume, state, config)
        async with aclosing(cast(Any, super().astream(command, config, **more))) as parts:
            async for part in parts:
                yield part

    def _has_saver(self, config: RunnableConfig | None) -> bool:
        """Return True if a call has a saver; LangGraph itself refuses an answer without one."""
        given = ensure_config(merge_configs(self.config, config)).get("configurable", {})
        return isinstance(given.get(_SAVER, self.checkpointer), BaseCheckpointSaver)

    def _check_input(self, given: Any, config: RunnableConfig | None) -> Any:
        """Return a checked input.

        Raises:
            InputError: A key is unknown, or the input is empty or malformed.
            ConfigurationError: A request has a Command that does more than answer an interrupt.
        """
        if isinstance(given, Command):
            if given.resume is None and not (given.update or given.goto or given.graph):
                raise InputError("an empty Command: give the answer to an interrupt as resume=…")
            if isinstance(given.resume, Mapping) and (
                odd := [key for key in given.resume if not isinstance(key, str)]
            ):
                raise InputError(f"resume: the key {odd[0]!r} is not text; name a total, as 'usd'")
            if self._bound.policy is not None and (given.update or given.goto or given.graph):
                msg = (
                    "a Command with update, goto or graph: a request may only answer an interrupt "
                    "(resume); build_graph(…, trust_context=True) trusts invocations"
                )
                raise ConfigurationError(msg)
        elif given is not None:
            cast(Any, self.builder).check_input(given, self._parents_keys(given, config))
            _check_traced_items(given, config)
        return given

    def _parents_keys(self, given: Any, config: RunnableConfig | None) -> tuple[str, ...]:
        """Return the keys of an input that belong to the state of a parent graph."""
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

    def _read_context(self, given: Any) -> Any:
        """Return the context of a call.

        Raises:
            ConfigurationError: It is not a mapping or a RunContext.
        """
        if given is None or isinstance(given, RunContext):
            return given
        if not isinstance(given, Mapping):
            msg = (
                "context: give a mapping of settings, or a RunContext "
                f"(found {type(given).__name__})"
            )
            raise ConfigurationError(msg)
        return self._bound.read_context(given)

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
                "a request may not write this graph's state; run from an earlier checkpoint to go "
                "back, or trust invocations: build_graph(…, trust_context=True)"
            )
            raise ConfigurationError(msg)

    def get_context_jsonschema(self) -> dict[str, Any] | None:
        """Return the JSON Schema of the settings that a request may change."""
        schema = super().get_context_jsonschema()
        return (
            None if schema is None else schema | {"properties": _AnyKeyDict(schema["properties"])}
        )


def _check_addressee(answer: Any, state: StateSnapshot, config: RunnableConfig | None) -> None:
    """Check that an answer belongs to an open question; LangGraph runs the thread in any case.

    LangGraph's server sends the answer again in a further attempt of a run that had taken it.

    Raises:
        InputError: No question is open, or the answer names one that is not.
    """
    if ensure_config(config).get("metadata", {}).get("run_attempt", 1) != 1:
        return
    open_ids = [interrupt.id for interrupt in state.interrupts]
    if not open_ids:
        raise InputError(_NOTHING)
    if not isinstance(answer, Mapping) or not all(map(_INTERRUPT_ID.fullmatch, answer)):
        return
    if unknown := sorted(answer.keys() - set(open_ids)):
        msg = (
            f"resume: {unknown[0]} names no open question of this thread; it may have been "
            f"answered. Nothing was changed. Open: {', '.join(open_ids)}"
        )
        raise InputError(msg)


def _check_traced_items(given: Any, config: RunnableConfig | None) -> None:
    """Check that LangSmith is not sent a large batch as the input of the graph's run.

    Raises:
        InputError: Too many items are pasted while tracing is on.
    """
    count = len(given.get("items") or ())
    if count <= _TRACED_ITEMS or get_env_var("HIDE_INPUTS") == "true":
        return
    handlers = get_callback_manager_for_config(ensure_config(config)).handlers
    if any(isinstance(handler, LangChainTracer) for handler in handlers):
        msg = (
            f"input.items: {count:,} items are pasted while LangSmith tracing is on, and the trace "
            f"would contain all of them; at most {_TRACED_ITEMS:,} are allowed. Give a path, turn "
            "tracing off (LANGSMITH_TRACING=false), or set LANGSMITH_HIDE_INPUTS=true"
        )
        raise InputError(msg)


class _AnyKeyDict(dict[str, Any]):
    """The fields that a form shows; claims to contain every key.

    LangGraph's server silently drops the keys of a context that the schema does not have. Here it
    finds every key, so that the graph itself can refuse unknown ones by name.
    """

    def __contains__(self, key: object) -> bool:
        return True


def _is_server_key(key: object) -> bool:
    """Return True if LangGraph's server, not a caller, has added a key to a context."""
    return key in _SERVERS or (isinstance(key, str) and _PRIVATE.fullmatch(key) is not None)


def check_item_input(given: object, parents: Sequence[str] = ()) -> None:
    """Check the input of the item graph: ``id`` and ``row``, and nothing else.

    Args:
        given: The input.
        parents: Keys of a parent graph's state, which are ignored.

    Raises:
        InputError: A key is missing, unknown or of the wrong kind.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"input: give a mapping with id and row (found {type(given).__name__})")
    known = ("id", "row")
    if unknown := [str(key) for key in given if key not in known and key not in parents]:
        raise InputError(f"input: {describe_unknown_keys(unknown, known)}; give id and row")
    if not isinstance(given.get("id"), str) or not isinstance(given.get("row"), Mapping):
        raise InputError("input: give id, a text, and row, a mapping of columns")


def _names() -> set[str]:
    return {field.name for field in fields(RunContext) if field.init}
