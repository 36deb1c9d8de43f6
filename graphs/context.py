"""RunContext: settings, the open runs that nodes share, and binding them to a graph."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar, cast

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

from ..backends.budget.budget import budget_gap, lower_raised_limits, raise_limits
from ..backends.cluster.walltime import Walltime
from ..backends.core.aio import PortalProvider, SharedResource
from ..backends.core.errors import ConfigurationError, FanfoldError, InputError
from ..backends.core.money import Amount
from ..backends.discovery.connect import (
    ReadyEndpoints,
    open_cache,
    open_fleet,
    open_ready_endpoints,
)
from ..backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    is_folder_of_run,
    is_vacant,
    open_folder,
)
from ..configs.loader import LoadedConfig, is_preset, load_config, read_preset
from ..configs.raw_settings import check_overrides
from ..configs.resolve import resolve_config
from ..nodes.batch.load import describe_unknown_keys
from ..nodes.context import Context, ItemContext, PreparedRun
from ..nodes.item.steps import NO_PAYLOAD, make_untraced
from ..nodes.shard.progress import ProgressStream
from ..nodes.state import RunKey
from .caller_policy import CallerPolicy, CallerSettings
from .context_schema import SettingsForm, build_request_form
from .invocation import (
    CURRENT_INVOCATION,
    Invocation,
    follow_stream,
    follow_stream_sync,
    get_claims,
)
from .run.accounting import OpenRun
from .run.items import make_item_context, make_item_engine, plan_shards
from .run.open_run import OpenOptions, open_run, write_results
from .run.prepare import (
    RUNS_FOLDER,
    begin_session,
    end_session,
    new_folder_name,
    prepare_run,
    resume_run,
)
from .run.shutdown import session_deadline
from .worker import work_shard

_PROBED_S: Final = 10.0
"""Age at which endpoints that a check has probed are probed again by the session."""


@dataclass(kw_only=True)
class RunContext(SettingsForm):
    """Settings of a run; a field at its default changes nothing."""

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedConfig,
        *,
        embedded: bool = False,
        allow_simulated: bool = True,
        new_folder: tuple[Path, str] | None = None,
        **settings: Any,
    ) -> Self:
        """Return a context for settings that are already loaded.

        Args:
            loaded: The settings.
            embedded: The graph records the sessions of the run.
            allow_simulated: Allow a simulated fleet.
            new_folder: Parent folder and name of a new run folder, instead of the default.
            **settings: Fields of the context.
        """
        context = cls(**settings)
        given = {"loaded": loaded, "embedded": embedded, "allow_simulated": allow_simulated}
        alone = {"stands_alone": True, "preloaded": True, "_new_folder": new_folder}
        context.__dict__ |= given | alone
        return context

    @classmethod
    def from_request(
        cls, owner: RunContext, policy: CallerPolicy, given: Mapping[str, Any]
    ) -> Self:
        """Return the context of a request to a graph.

        Args:
            owner: The settings bound to the graph.
            policy: The settings that requests may change.
            given: The fields that the request sets.
        """
        own = {key: given.get(key, getattr(owner, key)) for key in ("out", "trace", "retry_failed")}
        context = cls(**own)
        kept = {key: getattr(owner, key) for key in ("embedded", "allow_simulated", "_new_folder")}
        asked = {"policy": policy, "_owner": owner, "_given": given}
        context.__dict__ |= kept | asked | {"stands_alone": True}
        return context.share_runs(owner)

    @cached_property
    def policy(self) -> CallerPolicy | None:
        """Return the policy for requests; None for bound or trusted settings."""
        return None

    @cached_property
    def _owner(self) -> RunContext | None:
        return None

    @cached_property
    def _given(self) -> Mapping[str, Any]:
        return {}

    @cached_property
    def preloaded(self) -> bool:
        """Return True if the settings were loaded before the context was created."""
        return False

    def is_request_to(self, owner: RunContext) -> bool:
        """Return True if this is the context of a request to a graph bound to ``owner``."""
        return self._owner is owner

    def _resolve_request(
        self,
        kept: Mapping[str, Any] | None = None,
        path: str | None = None,
        preset: str | None = None,
    ) -> tuple[LoadedConfig, CallerSettings]:
        """Return the settings of a request and the request itself; blocks.

        Args:
            kept: The request of earlier invocations, from the run's provenance.
            path: The path in the input.
            preset: The preset in the input, which replaces that of the context.

        Raises:
            ConfigurationError: The request exceeds its rights.
        """
        assert self.policy is not None, "only a request is checked"
        assert self._owner is not None, "a request is made to bound settings"
        given = dict(self._given)
        if preset is not None:
            given = {k: v for k, v in given.items() if k != "config"} | {"preset": preset}
        request = CallerSettings.from_json(kept).merge(self.policy.read_request(given))
        if path is not None:
            request = request.merge(
                CallerSettings(settings={"input.path": self.policy.resolve_path(path)})
            )
        return self.policy.apply_request(self._owner.loaded, request), request

    @cached_property
    def loaded(self) -> LoadedConfig:
        """Return the checked configuration.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        if self.policy is not None:
            return self._resolve_request()[0]
        config = self.preset if self.config in (None, "") else self.config
        if config is self.preset:
            read_preset(self.preset)  # raises, listing the presets, if it is unknown
        return resolve_config(config, self.to_assignments(), endpoints=self.endpoints or None)[0]

    @cached_property
    def stands_alone(self) -> bool:
        """Return True if these are complete settings; else they change those of a run."""
        return bool(self.changed_fields().keys() & {"config", "preset"})

    @cached_property
    def embedded(self) -> bool:
        """Return True if the graph records sessions; the command line records its own."""
        return True

    @cached_property
    def allow_simulated(self) -> bool:
        """Return True if a run may use a simulated fleet."""
        return True

    @cached_property
    def _new_folder(self) -> tuple[Path, str] | None:
        return None

    @cached_property
    def _runs(self) -> SharedResource[OpenRun]:
        return SharedResource()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Return the folders of the runs of this process, by run id."""
        return {}

    def share_runs(self, other: RunContext) -> Self:
        """Share the open runs and folders of another context; return this context."""
        self.__dict__.setdefault("_runs", other._runs)
        self.__dict__.setdefault("_folders", other._folders)
        return self

    @cached_property
    def _own_invocation(self) -> Invocation:
        """Return the invocation for runs opened outside a graph, such as a command's session."""
        return Invocation(keeps_claims=False)

    @property
    def _invocation(self) -> Invocation:
        return (CURRENT_INVOCATION.get() if self.embedded else None) or self._own_invocation

    @cached_property
    def _retry_before(self) -> dict[Path, int]:
        return {}

    @cached_property
    def _progress_streams(self) -> dict[Path, ProgressStream]:
        return {}

    @cached_property
    def _loaded_by_folder(self) -> dict[Path, LoadedConfig]:
        return {}

    @cached_property
    def _deadlines(self) -> dict[Path, Walltime | None]:
        return {}

    @cached_property
    def _probed(self) -> dict[Path, tuple[float, ReadyEndpoints]]:
        """Return, by run folder, endpoints that no session has used yet, with the probe's time."""
        return {}

    def _keep_probed(self, folder: Path, endpoints: ReadyEndpoints | None) -> None:
        """Keep endpoints that a check has just probed for the session that follows."""
        self._probed.pop(folder, None)
        if endpoints is not None:
            self._probed[folder] = time.monotonic(), endpoints

    def _take_probed(self, folder: Path) -> ReadyEndpoints | None:
        """Return the kept endpoints, once, unless they were probed too long ago."""
        at, endpoints = self._probed.pop(folder, (0.0, None))
        return endpoints if time.monotonic() - at < _PROBED_S else None

    @cached_property
    def _item_contexts(self) -> SharedResource[ItemContext]:
        return SharedResource()

    # -- the run's folder ----------------------------------------------------------------

    @cached_property
    def out_path(self) -> Path | None:
        """Return ``out`` as an absolute path, resolved at first use.

        A program may change its working directory between two invocations.
        """
        if self._owner is not None and "out" not in self._given:
            return self._owner.out_path
        return Path(self.out).absolute() if self.out else None

    @property
    def out_folder(self) -> Path | None:
        """Return the folder that ``out`` names, with links resolved; blocks."""
        return None if self.out_path is None else self.out_path.resolve()

    def find_folder(self, run: RunKey) -> Path:
        """Return the current folder of a run; blocks.

        Tries the folder that the context names, then the folder that this process has used, then
        the default folder.

        Raises:
            ConfigurationError: It is not found, or the context names the folder of another run.
        """
        if (named := self.out_folder) is not None:
            ids = get_run_ids(open_folder(named).read_provenance())
            if run["id"] not in ids:
                msg = (
                    f"{self.out}: this is the folder of run {ids[0]}, but the thread belongs to "
                    f"run {run['id']}; set 'out' to that run's folder"
                )
                raise ConfigurationError(msg)
            self._folders[run["id"]] = named
            return named
        name = run["name"]
        usual = self._default_root / name if name is not None and Path(name).name == name else None
        candidates = [p for p in (self._folders.get(run["id"]), usual) if p is not None]
        for path in candidates:
            if is_folder_of_run(path, run["id"]):
                self._folders[run["id"]] = found = path.resolve()
                return found
        tried = "".join(f"; {path} is not it" for path in candidates)
        msg = (
            f"the folder of run {run['id']} is not known here{tried}; if it was moved, set 'out': "
            "bind it with build_graph(RunContext(…, out=DIR)), or give it in the context of a "
            "graph that trusts it"
        )
        raise ConfigurationError(msg)

    @property
    def _default_root(self) -> Path:
        """Return the folder of run folders that ``out`` does not name."""
        return Path.cwd() / RUNS_FOLDER if self._new_folder is None else self._new_folder[0]

    def list_shown_folders(self) -> set[str]:
        """Return the folders, as spelled in messages; blocks."""
        own = {self.out, str(self.out_path), str(self.out_folder)} if self.out else set[str]()
        return own | {str(path) for path in self._folders.values()}

    async def prepare(
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None = None,
    ) -> PreparedRun:
        """Create a run folder from a path or items, or open the one that the context names.

        An existing run in ``out`` is resumed if nothing else is given; the settings must fit it.
        """
        given = path is not None or items is not None or preset is not None
        folder = None if given else await asyncio.to_thread(self._find_existing)
        if folder is None:
            loaded, target, asked = await asyncio.to_thread(self._resolve_new_run, path, preset)
            made = await prepare_run(loaded, target, items, self.allow_simulated)
            if asked:
                await asyncio.to_thread(_extend_provenance, made.folder, asked)
            folder = made.folder.path
            for kept in (
                self._loaded_by_folder,
                self._progress_streams,
                self._deadlines,
                self._retry_before,
            ):
                kept.pop(folder, None)  # remove the data of an earlier run in this folder
            self._keep_probed(folder, made.endpoints)
        else:
            await get_claims().wait_for_run(RunFolder(folder), self._invocation)
            self._retry_before.pop(folder, None)  # a further invocation retries again
            if self.embedded:
                self._deadlines.pop(folder, None)  # a new session
                loaded = await asyncio.to_thread(self._get_settings, folder)
                checked = await resume_run(RunFolder(folder), loaded)
                self._keep_probed(folder, checked.endpoints)
        if self.embedded:
            await self._claim(folder)
            await asyncio.to_thread(begin_session, RunFolder(folder))
        return await asyncio.to_thread(self._read_prepared, folder)

    async def _claim(self, folder: Path) -> None:
        """Claim a run until the current invocation ends.

        Raises:
            ConfigurationError: Another invocation or process uses the run.
        """
        await get_claims().claim_run(RunFolder(folder), self._invocation)

    def _find_existing(self) -> Path | None:
        """Return the folder that ``out`` names, unless it is empty or missing."""
        folder = self.out_folder
        return None if folder is None or is_vacant(folder) else open_folder(folder).path

    def _resolve_new_run(
        self, path: str | None, preset: str | None
    ) -> tuple[LoadedConfig, Path, dict[str, Any]]:
        """Return a new run's settings, its folder, and the request for its provenance."""
        asked = dict[str, Any]()
        if self.policy is not None:
            loaded, request = self._resolve_request(None, path, preset)
            asked = {} if request.is_empty else {"request": request.to_json()}
        else:
            loaded = self._load_with_preset(preset)
            asked = {} if preset is None else {"preset": preset}
        if path is not None and self.policy is None:
            changes = {"input.path": str(Path(path).resolve()), "input.dataset": None}
            loaded = load_config(loaded.raw, settings=changes)
        name = (
            new_folder_name(loaded.config.name) if self._new_folder is None else self._new_folder[1]
        )
        return loaded, self.out_folder or self._default_root / name, asked

    def _load_with_preset(self, preset: str | None) -> LoadedConfig:
        """Return the settings, with the preset of the input if it has one."""
        if preset is None:
            return self.loaded
        return replace(self, preset=preset, config=None).loaded

    def _read_prepared(self, folder: Path) -> PreparedRun:
        about = open_folder(folder).read_provenance()
        self._folders[about["run"]] = folder
        run: RunKey = {"id": about["run"], "name": None if self.out else folder.name}
        config, total = self._get_settings(folder).config, about["input"]["items"]
        return plan_shards(run, config, total, singly=self.embedded)

    def _get_settings(self, folder: Path) -> LoadedConfig:
        """Return the settings of an existing run; blocks."""
        if not self.embedded:
            return self.loaded
        if folder not in self._loaded_by_folder:
            self._loaded_by_folder[folder] = self._load_settings(open_folder(folder))
        return self._loaded_by_folder[folder]

    def _load_settings(self, run: RunFolder) -> LoadedConfig:
        """Return the run's settings changed by these, or these if they are complete."""
        if self.policy is not None:
            return self._resolve_request(run.read_provenance().get("request"))[0]
        if asked := run.read_provenance().get("preset"):
            return self._load_with_preset(asked)
        if self.stands_alone:
            return self.loaded
        return resolve_config(
            str(run.settings), self.to_assignments(), endpoints=self.endpoints or None
        )[0]

    @asynccontextmanager
    async def open_run(self, run: RunKey) -> AsyncIterator[OpenRun]:
        """Open a run; the nodes of one invocation share it."""
        folder = self._folders.get(run["id"])
        if folder is None or self._runs.get_open((folder, self._invocation)) is None:
            folder = await asyncio.to_thread(self.find_folder, run)
        async with self._open_at(folder) as tools:
            yield tools

    @asynccontextmanager
    async def open_session_run(
        self, end: Walltime | None, endpoints: ReadyEndpoints | None
    ) -> AsyncIterator[OpenRun]:
        """Open the run in the folder that ``out`` names, for a session.

        Args:
            end: End of the session, or None.
            endpoints: Its endpoints if they were just probed.
        """
        folder = await asyncio.to_thread(lambda: self.out_folder)
        assert folder is not None, "the command line names a folder"
        self._deadlines[folder] = end
        self._keep_probed(folder, endpoints)
        async with self._open_at(folder) as tools:
            yield tools

    @asynccontextmanager
    async def _open_at(self, folder: Path) -> AsyncIterator[OpenRun]:
        retried = self._retry_before if self.retry_failed else None
        loaded = await asyncio.to_thread(self._get_settings, folder)
        if folder not in self._deadlines:
            self._deadlines[folder] = session_deadline(loaded.config, time.time())
        mode = OpenOptions(
            self.trace,
            self.embedded,
            retried,
            self._progress_streams,
            make_item_engine,
            work_shard,
            self._deadlines[folder],
        )
        invocation, run_folder = self._invocation, RunFolder(folder)

        @asynccontextmanager
        async def make() -> AsyncIterator[OpenRun]:
            with invocation.track_opening():
                await get_claims().claim_run(run_folder, invocation)
                await asyncio.to_thread(self._lower_limits, folder)
                ready = self._take_probed(folder)
                async with open_run(run_folder, loaded, mode, ready) as tools:
                    with invocation.track_run(tools):
                        yield tools

        async with self._runs.use((folder, invocation), make) as tools:
            yield tools

    async def budget_gap(self, run: RunKey, needed: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the question to the user if the budget does not cover ``needed``, or None."""
        folder = await asyncio.to_thread(self.find_folder, run)
        await self._claim(folder)
        await asyncio.to_thread(self._lower_limits, folder)
        loaded = await asyncio.to_thread(self._get_settings, folder)
        tools = self._runs.get_open((folder, self._invocation))
        budget = None if tools is None else tools.budget
        run_folder, amount = RunFolder(folder), Amount(**needed)
        asked = await asyncio.to_thread(budget_gap, run_folder, loaded.config, amount, budget)
        if asked is None or self.policy is None or self._owner is None:
            return asked
        owner = self._owner
        return self.policy.limit_question(await asyncio.to_thread(lambda: owner.loaded), asked)

    def _lower_limits(self, folder: Path) -> None:
        """Lower the limits that requests raised to the bound limits; blocks."""
        if self.policy is not None and self._owner is not None:
            lower_raised_limits(RunFolder(folder), self.policy.bound_totals(self._owner.loaded))

    def _check_answer(self, answer: Any) -> str | None:
        """Return why a request may not give this answer about the budget, or None; blocks."""
        if self.policy is None or self._owner is None:
            return None
        return self.policy.check_answer(self._owner.loaded, answer)

    async def raise_limits(self, run: RunKey, answer: Any) -> str | None:
        """Raise the run's limits as answered; return what is wrong with the answer, or None."""
        if (problem := await asyncio.to_thread(self._check_answer, answer)) is not None:
            return problem
        folder = await asyncio.to_thread(self.find_folder, run)
        if self.embedded:
            self._deadlines.pop(folder, None)  # a new session: the answer may have taken days
        requested = self.policy is not None
        return await asyncio.to_thread(raise_limits, RunFolder(folder), answer, requested=requested)

    async def finish_run(
        self, run: RunKey, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the result files and return references to them."""
        folder = await asyncio.to_thread(self.find_folder, run)
        run_folder = RunFolder(folder)
        async with self._open_at(folder) as tools:
            results = await asyncio.to_thread(
                write_results, run_folder, self._get_settings(folder), tools, aggregate, progress
            )
            if self.embedded:
                await asyncio.to_thread(end_session, run_folder)
        self._progress_streams.pop(folder, None)
        self._loaded_by_folder.pop(folder, None)
        return results

    @asynccontextmanager
    async def open_item_context(self) -> AsyncIterator[ItemContext]:
        """Open the context of the standalone item graph."""

        @asynccontextmanager
        async def make() -> AsyncIterator[ItemContext]:
            loaded = await asyncio.to_thread(lambda: self.loaded)
            async with (
                open_ready_endpoints(loaded.config, loaded.plain["endpoints"]) as ready,
                open_cache(loaded.config, ready.simulated, None) as cache,
                open_fleet(loaded.config, ready, cache) as fleet,
            ):
                yield make_item_context(loaded, fleet, ready.model, traced=True)

        async with self._item_contexts.use("item", make) as context:
            yield context


def _extend_provenance(folder: RunFolder, asked: Mapping[str, Any]) -> None:
    folder.write_provenance(folder.read_provenance() | dict(asked))


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
        filled = _changed_fields(given)
        if not filled and not given.preloaded:
            return self._context
        alone = (
            bool(filled.keys() & _BASES) or given.preloaded or not self._context.changed_fields()
        )
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
                raise InputError(f"resume: the key {odd[0]!r} is no text; name a total, as 'usd'")
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
