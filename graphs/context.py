"""The map-reduce's context: plain settings that open their parts when asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ..backends.accounts.folder import RunFolder, open_folder
from ..backends.build import open_fleet, serving
from ..backends.contract.money import Amount
from ..backends.reuse import reusing
from ..configs.load import Loaded, load
from ..configs.presets import preset_text
from ..nodes.context import ItemContext, Prepared, RunTools
from ..nodes.meter import Meter
from .crew import life_end
from .finish import write_results
from .form import Form
from .item import item_engine
from .items import item_context
from .lives import begin_life, end_life
from .opened import OpenedRun
from .opening import Mode, open_run
from .plan import cut
from .prepare import default_folder, prepare_run
from .requests import Request, RequestPolicy
from .settings import settle
from .shared import Shared
from .spending import allow, shortfall
from .walltime import Walltime
from .worker import work_shard


@dataclass(kw_only=True)
class RunContext(Form):
    """Settings of a run; a field that is left as it is changes nothing."""

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        *,
        embedded: bool = False,
        allow_simulated: bool = True,
        **settings: Any,
    ) -> Self:
        """Return a context of settings that are loaded already.

        Args:
            loaded: The settings.
            embedded: Whether the graph itself notes the run's lives.
            allow_simulated: Whether a run may ask a simulated fleet.
            **settings: The context's own.
        """
        context = cls(**settings)
        given = {"loaded": loaded, "embedded": embedded, "allow_simulated": allow_simulated}
        context.__dict__ |= given | {"stands_alone": True, "preloaded": True}
        return context

    @classmethod
    def of_request(cls, owner: RunContext, policy: RequestPolicy, given: Mapping[str, Any]) -> Self:
        """Return the context of a request to a graph.

        Args:
            owner: The settings bound to the graph.
            policy: What requests may set.
            given: The fields that the request sets.
        """
        own = {key: given.get(key, getattr(owner, key)) for key in ("out", "trace", "retry_failed")}
        context = cls(**own)
        kept = {key: getattr(owner, key) for key in ("embedded", "allow_simulated")}
        asked = {"policy": policy, "_owner": owner, "_given": given}
        context.__dict__ |= kept | asked | {"stands_alone": True}
        return context.joined(owner)

    @cached_property
    def policy(self) -> RequestPolicy | None:
        """Return what requests may set; None: these are bound settings, or trusted ones."""
        return None

    @cached_property
    def _owner(self) -> RunContext | None:
        return None

    @cached_property
    def _given(self) -> Mapping[str, Any]:
        return {}

    @cached_property
    def preloaded(self) -> bool:
        """Say whether the settings were loaded before the context was made."""
        return False

    def is_request_to(self, owner: RunContext) -> bool:
        """Say whether this is the context of a request to a graph that is bound to ``owner``."""
        return self._owner is owner

    def _requested(self, kept: Mapping[str, Any] | None, more: Request | None = None) -> Loaded:
        """Return the settings of a request, upon what its run was asked for before; blocks.

        Args:
            kept: What the run's provenance keeps of earlier invocations.
            more: What the input asks for beside the context.
        """
        assert self.policy is not None, "only a request is checked"
        assert self._owner is not None, "a request is made to bound settings"
        request = Request.from_json(kept).then(self.policy.read(self._given))
        return self.policy.settings(self._owner.loaded, request.then(more or Request()))

    @cached_property
    def loaded(self) -> Loaded:
        """Return the checked configuration.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        if self.policy is not None:
            return self._requested(None)
        config = self.preset if self.config in (None, "") else self.config
        if config is self.preset:
            preset_text(self.preset)  # says which there are, if that is none
        return settle(config, self.changes(), endpoints=self.endpoints or None)[0]

    @cached_property
    def stands_alone(self) -> bool:
        """Say whether these are all settings; else they go on top of what a run has already."""
        return bool(self.filled().keys() & {"config", "preset"})

    @cached_property
    def embedded(self) -> bool:
        """Say whether the graph itself notes the run's lives; the command line notes its own."""
        return True

    @cached_property
    def allow_simulated(self) -> bool:
        """Say whether a run may ask a simulated fleet."""
        return True

    @cached_property
    def _runs(self) -> Shared[RunTools]:
        return Shared()

    def joined(self, other: RunContext) -> Self:
        """Know which runs another context has open, and return itself."""
        self.__dict__.setdefault("_runs", other._runs)
        return self

    @cached_property
    def _retried(self) -> dict[Path, int]:
        return {}

    @cached_property
    def _meters(self) -> dict[Path, Meter]:
        return {}

    @cached_property
    def _by_folder(self) -> dict[str, Loaded]:
        return {}

    @cached_property
    def _ends(self) -> dict[str, Walltime | None]:
        return {}

    def bound(self, folder: str, end: Walltime | None) -> None:
        """Have the present life of a run end in time."""
        self._ends[folder] = end

    @cached_property
    def _contexts(self) -> Shared[ItemContext]:
        return Shared()

    async def prepare(
        self,
        folder: str | None,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None = None,
    ) -> Prepared:
        """Make a run's folder from a path or items, or look up one that was made."""
        if folder is not None:
            self._retried.pop(Path(folder), None)  # a further invocation asks once more
            if self.embedded:
                self._ends.pop(folder, None)  # a life of its own
        else:
            loaded, target = await asyncio.to_thread(self._new_run, path, preset)
            made = await prepare_run(loaded, target, items, self.allow_simulated)
            if preset is not None:
                await asyncio.to_thread(_note_preset, made, preset)
            folder = str(made.path)
        run = await asyncio.to_thread(self._look_up, folder)
        if self.embedded:
            await asyncio.to_thread(begin_life, RunFolder(Path(folder)))
        return run

    def _new_run(self, path: str | None, preset: str | None) -> tuple[Loaded, Path]:
        loaded = self._with_preset(preset)
        if path is not None:
            changes = {"input.path": str(Path(path).resolve()), "input.dataset": None}
            loaded = load(loaded.raw, settings=changes)
        return loaded, Path(self.out).resolve() if self.out else default_folder(loaded.config.name)

    def _with_preset(self, preset: str | None) -> Loaded:
        """Return the settings, of a preset that the input names if it names one."""
        if preset is None:
            return self.loaded
        return replace(self, preset=preset, config=None).loaded

    def _look_up(self, folder: str) -> Prepared:
        total = open_folder(Path(folder)).read_provenance()["input"]["items"]
        return cut(folder, self._loaded_of(folder).config, total, singly=self.embedded)

    def _loaded_of(self, folder: str) -> Loaded:
        """Return the settings of a run that there is; blocks."""
        if not self.embedded:
            return self.loaded
        if folder not in self._by_folder:
            self._by_folder[folder] = self._settings_of(open_folder(Path(folder)))
        return self._by_folder[folder]

    def _settings_of(self, run: RunFolder) -> Loaded:
        """Return the run's own settings with these on top, unless these stand alone."""
        if asked := run.read_provenance().get("preset"):
            return self._with_preset(asked)
        if self.stands_alone:
            return self.loaded
        return settle(str(run.settings), self.changes(), endpoints=self.endpoints or None)[0]

    @asynccontextmanager
    async def opened(self, folder: str) -> AsyncIterator[RunTools]:
        """Open a run; users in the same loop share what is open."""
        retried = self._retried if self.retry_failed else None
        loaded = await asyncio.to_thread(self._loaded_of, folder)
        if folder not in self._ends:
            self.bound(folder, life_end(loaded.config, time.time()))
        mode = Mode(
            self.trace,
            self.embedded,
            retried,
            self._meters,
            item_engine,
            work_shard,
            self._ends[folder],
        )
        path = await asyncio.to_thread(open_folder, Path(folder))
        # A cancelled run lets its items end, and whoever cancelled it may go on with it meanwhile.
        await self._runs.gone(lambda key: key[0] == folder, lambda tools: tools.gate.cancelled)
        key = folder, id(self)
        async with self._runs.use(key, lambda: open_run(path, loaded, mode)) as tools:
            yield tools

    async def shortfall(self, folder: str, needed: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what to ask of the user while the budget does not carry ``needed``, or None."""
        loaded = await asyncio.to_thread(self._loaded_of, folder)
        tools = self._runs.opened((folder, id(self)))
        budget = tools.budget if isinstance(tools, OpenedRun) else None
        run = RunFolder(Path(folder))
        return await asyncio.to_thread(shortfall, run, loaded.config, Amount(**needed), budget)

    async def allow(self, folder: str, answer: Any) -> str | None:
        """Take an answer as the run's new caps; return what is wrong with it, or None."""
        if self.embedded:
            self._ends.pop(folder, None)  # a life of its own: the answer may have taken days
        return await asyncio.to_thread(allow, RunFolder(Path(folder)), answer)

    async def finish(
        self, folder: str, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the results' files and return references to them."""
        run = RunFolder(Path(folder))
        async with self.opened(folder) as tools:
            results = await asyncio.to_thread(
                write_results, run, self._loaded_of(folder), tools, aggregate, progress
            )
            if self.embedded:
                await asyncio.to_thread(end_life, run)
        self._meters.pop(run.path, None)
        self._by_folder.pop(folder, None)
        return results

    @asynccontextmanager
    async def item_context(self) -> AsyncIterator[ItemContext]:
        """Open what the item graph needs when it runs by itself."""

        @asynccontextmanager
        async def make() -> AsyncIterator[ItemContext]:
            loaded = await asyncio.to_thread(lambda: self.loaded)
            async with (
                serving(loaded.config, loaded.plain["endpoints"]) as up,
                reusing(loaded.config, up.simulated, None) as reuse,
                open_fleet(loaded.config, up, reuse) as fleet,
            ):
                yield item_context(loaded, fleet, up.model, traced=True)

        async with self._contexts.use("item", make) as context:
            yield context


def _note_preset(folder: RunFolder, preset: str) -> None:
    folder.write_provenance(folder.read_provenance() | {"preset": preset})
