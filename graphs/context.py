"""RunContext: settings, and the open runs that nodes share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from ..backends.budget.budget import budget_gap, lower_raised_limits, raise_limits
from ..backends.cluster.walltime import Walltime
from ..backends.core.aio import SharedResource
from ..backends.core.errors import ConfigurationError
from ..backends.core.money import Amount
from ..backends.core.types import RunKey
from ..backends.discovery.connect import (
    ReadyEndpoints,
    open_cache,
    open_fleet,
    open_ready_endpoints,
)
from ..backends.inputs.images import open_images
from ..backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    is_folder_of_run,
    is_vacant,
    open_folder,
)
from ..configs.loader import LoadedConfig, load_config
from ..configs.preset_files import read_preset
from ..configs.resolve import resolve_config
from ..nodes.context import ItemContext, PreparedRun
from ..nodes.shard.progress import ProgressStream
from .caller_policy import CallerPolicy, CallerSettings
from .context_schema import SettingsForm
from .invocation import (
    CURRENT_INVOCATION,
    Invocation,
    get_claims,
)
from .run.accounting import OpenRun
from .run.final_reducers import add_final_results
from .run.items import make_item_context
from .run.open_run import OpenOptions, open_run, refer_to_results, write_aggregate, write_results
from .run.pipeline import Pipeline, list_stages, prepare_pipeline
from .run.pipeline_report import read_stage_end
from .run.pipeline_resources import PipelineResources
from .run.prepare import (
    RUNS_FOLDER,
    ReadyRun,
    begin_session,
    end_session,
    new_folder_name,
    prepare_run,
    resume_run,
)
from .run.shard_plan import plan_shards
from .run.shutdown import session_deadline
from .run.stage_estimate import make_reserve
from .worker import work_shard

InvokeRun: TypeAlias = Callable[["RunContext"], Awaitable[dict[str, Any]]]
"""Invokes the map-reduce graph with the context of a run; returns its output."""

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
    def _around(self) -> RunContext | None:
        """Return the context of the pipeline that the run is a part of, or None."""
        return None

    @cached_property
    def _shared_endpoints(self) -> ReadyEndpoints | None:
        """Return endpoints that the runs of a pipeline share, or None."""
        return None

    @cached_property
    def _resources(self) -> PipelineResources | None:
        """Return what the run shares with other runs of its pipeline, or None."""
        return None

    @cached_property
    def _is_begun(self) -> bool:
        """Return True if the provenance of the run names this session."""
        return False

    @property
    def owner(self) -> RunContext | None:
        """Return the bound settings that the context is a request to, or None."""
        return self._owner

    @property
    def _asked(self) -> RunContext:
        """Return the context whose caller answers questions about the budget."""
        return self._around or self

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
            loaded, target, asked = await asyncio.to_thread(
                self._resolve_new_run, path, items, preset
            )
            if loaded.config.stages is not None:
                return await self._prepare_pipeline(loaded, path, items, preset)
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
        elif RunFolder(folder).is_pipeline:
            loaded = await asyncio.to_thread(self._get_settings, folder)
            return await self._prepare_pipeline(loaded, path, items, preset)
        else:
            self._retry_before.pop(folder, None)  # a further invocation retries again
            if self.embedded:
                await get_claims().wait_for_run(RunFolder(folder), self._invocation)
                self._deadlines.pop(folder, None)  # a new session
                loaded = await asyncio.to_thread(self._get_settings, folder)
                checked = await resume_run(RunFolder(folder), loaded)
                self._keep_probed(folder, checked.endpoints)
        if self.embedded:
            await self._claim(folder)
            if not self._is_begun:
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
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None,
    ) -> tuple[LoadedConfig, Path, dict[str, Any]]:
        """Return a new run's settings, its folder, and the request for its provenance."""
        asked = dict[str, Any]()
        if self.policy is not None:
            loaded, request = self._resolve_request(None, path, preset)
            if items is not None or "input.path" in request.settings:
                self.policy.check_items(loaded.config.input, items)
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

    async def _prepare_pipeline(
        self,
        loaded: LoadedConfig,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None,
    ) -> PreparedRun:
        """Prepare a pipeline in a graph that was built without its stages."""
        names = tuple(stage.name for stage in loaded.config.stages or ())
        key = await self.prepare_stages(path, items, preset, names)
        return PreparedRun(key, 0, 1, 1, None, names)

    async def prepare_stages(
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None,
        names: Sequence[str],
    ) -> RunKey:
        """Create the folder of a pipeline, or open the one that the context names.

        Args:
            path: Input in place of the configured one, or None.
            items: Items in place of the configured input, or None.
            preset: Preset in place of the settings, or None.
            names: The stages that the graph has.

        Raises:
            ConfigurationError: The settings have other stages, or do not fit the folder.
        """
        given = path is not None or items is not None or preset is not None
        folder = None if given else await asyncio.to_thread(self._find_existing)
        if folder is None:
            loaded, target, asked = await asyncio.to_thread(
                self._resolve_new_run, path, items, preset
            )
            _check_stages(loaded, names)
            made = await prepare_pipeline(loaded, target, items, self.allow_simulated)
            if asked:
                await asyncio.to_thread(_extend_provenance, made, asked)
            folder = made.path
        else:
            await get_claims().wait_for_run(RunFolder(folder), self._invocation)
        self._loaded_by_folder.pop(folder, None)
        self._deadlines.pop(folder, None)
        _check_stages(await asyncio.to_thread(self._get_settings, folder), names)
        await self._claim(folder)
        await asyncio.to_thread(begin_session, RunFolder(folder))
        about = await asyncio.to_thread(RunFolder(folder).read_provenance)
        self._folders[about["run"]] = folder
        return {"id": about["run"], "name": None if self.out else folder.name}

    async def run_stage(self, run: RunKey, name: str, invoke: InvokeRun) -> dict[str, Any]:
        """Run one stage of a pipeline; return its aggregate, progress and results.

        Args:
            run: The key of the pipeline.
            name: The stage.
            invoke: Invokes the map-reduce graph with the context of one run.

        Raises:
            ConfigurationError: The settings do not fit what an earlier session has done.
        """
        folder = await asyncio.to_thread(self.find_folder, run)
        await self._claim(folder)
        loaded = await asyncio.to_thread(self._get_settings, folder)
        self._deadlines.setdefault(folder, session_deadline(loaded.config, time.time()))
        end = dict[str, Any]()

        async def run_inner(ready: ReadyRun) -> None:
            end.clear()
            end.update(await invoke(self._make_inner(folder, ready)))

        resources = PipelineResources(folder)
        try:
            stages = list_stages(loaded, folder)
            reserve = make_reserve(loaded, stages)
            pipeline = Pipeline(
                RunFolder(folder), loaded, stages, resources, self.allow_simulated, reserve
            )
            stage = next(one for one in pipeline.stages if one.name == name)
            await pipeline.run_stage(stage, run_inner)
        finally:
            await resources.aclose()
        if stage is pipeline.stages[-1]:
            await asyncio.to_thread(end_session, RunFolder(folder))
        return await asyncio.to_thread(read_stage_end, stage, end.get("progress"))

    def _make_inner(self, folder: Path, ready: ReadyRun) -> RunContext:
        """Return the context of one run of a pipeline."""
        inner = RunContext.from_loaded(
            ready.loaded,
            embedded=True,
            allow_simulated=self.allow_simulated,
            out=str(ready.folder.path),
            trace=self.trace,
        )
        inner.__dict__ |= {"_around": self, "_shared_endpoints": ready.endpoints}
        inner.__dict__ |= {"_resources": ready.resources, "_is_begun": ready.is_begun}
        inner.__dict__["_session_end"] = self._deadlines.get(folder)
        return inner

    @cached_property
    def _session_end(self) -> Walltime | None:
        """Return the end of the session of the pipeline around the run, or None."""
        return None

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
        async with self._open_at(await self._find_open_folder(run)) as tools:
            yield tools

    async def _find_open_folder(self, run: RunKey) -> Path:
        """Return the folder of a run, without a look at the disk while the run is open."""
        folder = self._folders.get(run["id"])
        if folder is not None and self._runs.get_open((folder, self._invocation)) is not None:
            return folder
        return await asyncio.to_thread(self.find_folder, run)

    @asynccontextmanager
    async def open_session_run(self, run: ReadyRun, end: Walltime | None) -> AsyncIterator[OpenRun]:
        """Open the run in the folder that ``out`` names, for a session.

        Args:
            run: The run as it was checked.
            end: End of the session, or None.
        """
        folder = await asyncio.to_thread(lambda: self.out_folder)
        assert folder is not None, "the command line names a folder"
        self._deadlines[folder] = end
        self._keep_probed(folder, run.endpoints)
        self.__dict__ |= {"_resources": run.resources, "_is_begun": run.is_begun}
        async with self._open_at(folder) as tools:
            yield tools

    @asynccontextmanager
    async def _open_at(self, folder: Path) -> AsyncIterator[OpenRun]:
        invocation, run_folder = self._invocation, RunFolder(folder)

        def prepare() -> LoadedConfig:
            loaded = self._get_settings(folder)
            if folder not in self._deadlines:
                end = None if self._around is None else self._session_end
                if self._around is None:
                    end = session_deadline(loaded.config, time.time())
                self._deadlines[folder] = end
            self._lower_limits(folder)
            return loaded

        @asynccontextmanager
        async def make() -> AsyncIterator[OpenRun]:
            with invocation.track_opening():
                await get_claims().claim_run(run_folder, invocation)
                loaded = await asyncio.to_thread(prepare)
                mode = OpenOptions(
                    self.trace,
                    self.embedded,
                    self._retry_before if self.retry_failed else None,
                    self._progress_streams,
                    work_shard,
                    self._deadlines[folder],
                    self._resources,
                    self._is_begun and not self.embedded,  # embedded runs are opened repeatedly
                )
                ready = self._take_probed(folder) or self._shared_endpoints
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
        policy, owner = self._asked.policy, self._asked.owner
        if asked is None or policy is None or owner is None:
            return asked
        return policy.limit_question(await asyncio.to_thread(lambda: owner.loaded), asked)

    def _lower_limits(self, folder: Path) -> None:
        """Lower the limits that requests raised to the bound limits; blocks."""
        policy, owner = self._asked.policy, self._asked.owner
        if policy is not None and owner is not None:
            lower_raised_limits(RunFolder(folder), policy.bound_totals(owner.loaded))

    def _check_answer(self, answer: Any) -> str | None:
        """Return why a request may not give this answer about the budget, or None; blocks."""
        policy, owner = self._asked.policy, self._asked.owner
        if policy is None or owner is None:
            return None
        return policy.check_answer(owner.loaded, answer)

    async def raise_limits(self, run: RunKey, answer: Any) -> str | None:
        """Raise the run's limits as answered; return what is wrong with the answer, or None."""
        if (problem := await asyncio.to_thread(self._check_answer, answer)) is not None:
            return problem
        folder = await asyncio.to_thread(self.find_folder, run)
        if self.embedded:
            self._deadlines.pop(folder, None)  # a new session: the answer may have taken days
        requested = self._asked.policy is not None
        return await asyncio.to_thread(raise_limits, RunFolder(folder), answer, requested=requested)

    async def finish_run(
        self, run: RunKey, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write the result files; return the whole aggregate, and references to the files."""
        folder = await self._find_open_folder(run)
        run_folder = RunFolder(folder)
        async with self._open_at(folder) as tools:
            results = refer_to_results(run_folder, tools.simulated)
            if not tools.is_level:  # its operator reads the journal
                loaded, extents = self._get_settings(folder), tools.item_journal.extents()
                source = await asyncio.to_thread(write_results, run_folder, loaded, tools)
                reducers = loaded.config.reduce
                aggregate = await add_final_results(reducers, aggregate, run_folder, source)
                await asyncio.to_thread(
                    write_aggregate, run_folder, tools, aggregate, progress, extents
                )
            if self.embedded:
                await asyncio.to_thread(end_session, run_folder)
        self._progress_streams.pop(folder, None)
        self._loaded_by_folder.pop(folder, None)
        return aggregate, results

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
                images = open_images(loaded.config, in_memory=True)
                yield make_item_context(loaded, fleet, ready.model, traced=True, images=images)

        async with self._item_contexts.use("item", make) as context:
            yield context


def _check_stages(loaded: LoadedConfig, names: Sequence[str]) -> None:
    """Check that settings have the stages of a graph.

    Raises:
        ConfigurationError: They have others.
    """
    found = [stage.name for stage in loaded.config.stages or ()]
    if found != list(names):
        msg = (
            f"{loaded.source}: has the stages {', '.join(found) or 'none'}, and this graph was "
            f"built for {', '.join(names)}; build a graph of these settings"
        )
        raise ConfigurationError(msg)


def _extend_provenance(folder: RunFolder, asked: Mapping[str, Any]) -> None:
    folder.write_provenance(folder.read_provenance() | dict(asked))
