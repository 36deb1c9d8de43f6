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

from ..backends.budget.budget import allow, lower_allowed, shortfall
from ..backends.cluster.walltime import Walltime
from ..backends.core.aio import Shared
from ..backends.core.errors import ConfigurationError
from ..backends.core.money import Amount
from ..backends.discovery.connect import open_fleet, reusing, serving
from ..backends.storage.run_folder import RunFolder, is_run, is_vacant, open_folder, run_ids
from ..configs.loader import Loaded, load, preset_text
from ..configs.resolve import settle
from ..nodes.context import ItemContext, Prepared, RunTools
from ..nodes.shard.progress import Meter
from ..nodes.state import RunKey
from .context_schema import Form
from .invocation import CURRENT, Invocation, claims
from .requests import Request, RequestPolicy
from .run.items import cut, item_context, item_engine
from .run.open_run import OpenedRun
from .run.prepare import RUNS, begin_life, end_life, new_name, prepare_run, resume_run
from .run.resources import Mode, open_run, write_results
from .run.shutdown import life_end
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
        place: tuple[Path, str] | None = None,
        **settings: Any,
    ) -> Self:
        """Return a context of settings that are loaded already.

        Args:
            loaded: The settings.
            embedded: Whether the graph itself notes the run's lives.
            allow_simulated: Whether a run may ask a simulated fleet.
            place: Where run folders lie in place of the default place, and the new one's name.
            **settings: The context's own.
        """
        context = cls(**settings)
        given = {"loaded": loaded, "embedded": embedded, "allow_simulated": allow_simulated}
        alone = {"stands_alone": True, "preloaded": True, "_place": place}
        context.__dict__ |= given | alone
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
        kept = {key: getattr(owner, key) for key in ("embedded", "allow_simulated", "_place")}
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

    def _requested(
        self,
        kept: Mapping[str, Any] | None = None,
        path: str | None = None,
        preset: str | None = None,
    ) -> tuple[Loaded, Request]:
        """Return the settings of a request and the request itself; blocks.

        Args:
            kept: What the run's provenance keeps of earlier invocations.
            path: The path that the input names.
            preset: The preset that the input names, in place of the context's.

        Raises:
            ConfigurationError: It asks for more than it may.
        """
        assert self.policy is not None, "only a request is checked"
        assert self._owner is not None, "a request is made to bound settings"
        given = dict(self._given)
        if preset is not None:
            given = {k: v for k, v in given.items() if k != "config"} | {"preset": preset}
        request = Request.from_json(kept).then(self.policy.read(given))
        if path is not None:
            request = request.then(Request(settings={"input.path": self.policy.path(path)}))
        return self.policy.settings(self._owner.loaded, request), request

    @cached_property
    def loaded(self) -> Loaded:
        """Return the checked configuration.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        if self.policy is not None:
            return self._requested()[0]
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
    def _place(self) -> tuple[Path, str] | None:
        return None

    @cached_property
    def _runs(self) -> Shared[RunTools]:
        return Shared()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Return the folders of the runs that were worked on, by run id."""
        return {}

    def joined(self, other: RunContext) -> Self:
        """Know which runs another context has open and where they lie, and return itself."""
        self.__dict__.setdefault("_runs", other._runs)
        self.__dict__.setdefault("_folders", other._folders)
        return self

    @cached_property
    def _own(self) -> Invocation:
        """Return what works on runs outside of an invocation of the graph: a command's session."""
        return Invocation(lasting=False)

    @property
    def _invocation(self) -> Invocation:
        return (CURRENT.get() if self.embedded else None) or self._own

    @cached_property
    def _retried(self) -> dict[Path, int]:
        return {}

    @cached_property
    def _meters(self) -> dict[Path, Meter]:
        return {}

    @cached_property
    def _by_folder(self) -> dict[Path, Loaded]:
        return {}

    @cached_property
    def _ends(self) -> dict[Path, Walltime | None]:
        return {}

    @cached_property
    def _contexts(self) -> Shared[ItemContext]:
        return Shared()

    # -- the run's folder ----------------------------------------------------------------

    @cached_property
    def named(self) -> Path | None:
        """Return ``out`` as an absolute path; what is relative counts from where it is first used.

        A program may change its working directory between two invocations.
        """
        if self._owner is not None and "out" not in self._given:
            return self._owner.named
        return Path(self.out).absolute() if self.out else None

    @property
    def folder(self) -> Path | None:
        """Return the folder that ``out`` names, one path for all its spellings; blocks."""
        return None if self.named is None else self.named.resolve()

    def find(self, run: RunKey) -> Path:
        """Return where a run's folder lies now; blocks.

        The folder that the context names comes first, then where this process has worked on the
        run, then the default place.

        Raises:
            ConfigurationError: It is not found, or the folder that the context names is another
                run's.
        """
        if (named := self.folder) is not None:
            ids = run_ids(open_folder(named).read_provenance())
            if run["id"] not in ids:
                msg = (
                    f"{self.out}: this is the folder of run {ids[0]}, and the thread goes on with "
                    f"run {run['id']}; set 'out' to that run's folder"
                )
                raise ConfigurationError(msg)
            self._folders[run["id"]] = named
            return named
        name = run["name"]
        usual = self._usual / name if name is not None and Path(name).name == name else None
        candidates = [p for p in (self._folders.get(run["id"]), usual) if p is not None]
        for path in candidates:
            if is_run(path, run["id"]):
                self._folders[run["id"]] = found = path.resolve()
                return found
        looked = "".join(f"; {path} is not it" for path in candidates)
        msg = (
            f"the folder of run {run['id']} is not known here{looked}; if it was moved, name it by "
            "'out', which is bound, build_graph(RunContext(…, out=DIR)), or comes with the context "
            "of a graph that trusts it"
        )
        raise ConfigurationError(msg)

    @property
    def _usual(self) -> Path:
        """Return where run folders lie that ``out`` does not name."""
        return Path.cwd() / RUNS if self._place is None else self._place[0]

    def shown_folders(self) -> set[str]:
        """Return the folders as messages may show them; blocks."""
        own = {self.out, str(self.named), str(self.folder)} if self.out else set[str]()
        return own | {str(path) for path in self._folders.values()}

    async def prepare(
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None = None,
    ) -> Prepared:
        """Make a run's folder from a path or items, or look up the one that the context names.

        An existing run in ``out`` is gone on with when nothing else is given; what the settings
        ask for must be what it asks for.
        """
        given = path is not None or items is not None or preset is not None
        folder = None if given else await asyncio.to_thread(self._existing)
        if folder is None:
            loaded, target, asked = await asyncio.to_thread(self._new_run, path, preset)
            made = await prepare_run(loaded, target, items, self.allow_simulated)
            if asked:
                await asyncio.to_thread(_note, made, asked)
            folder = made.path
            for kept in (self._by_folder, self._meters, self._ends, self._retried):
                kept.pop(folder, None)  # of a run that lay there before
        else:
            await claims().wait_run(RunFolder(folder), self._invocation)
            self._retried.pop(folder, None)  # a further invocation asks once more
            if self.embedded:
                self._ends.pop(folder, None)  # a life of its own
                loaded = await asyncio.to_thread(self._loaded_of, folder)
                await resume_run(RunFolder(folder), loaded)
        if self.embedded:
            await self._claim(folder)
            await asyncio.to_thread(begin_life, RunFolder(folder))
        return await asyncio.to_thread(self._look_up, folder)

    async def _claim(self, folder: Path) -> None:
        """Have nobody else work on a run until the present invocation ends.

        Raises:
            ConfigurationError: Somebody does.
        """
        await claims().take_run(RunFolder(folder), self._invocation)

    def _existing(self) -> Path | None:
        """Return the folder that ``out`` names if something is in it."""
        folder = self.folder
        return None if folder is None or is_vacant(folder) else open_folder(folder).path

    def _new_run(self, path: str | None, preset: str | None) -> tuple[Loaded, Path, dict[str, Any]]:
        """Return a new run's settings, its folder, and what its provenance keeps of the input."""
        asked = dict[str, Any]()
        if self.policy is not None:
            loaded, request = self._requested(None, path, preset)
            asked = {} if request.empty else {"request": request.to_json()}
        else:
            loaded = self._with_preset(preset)
            asked = {} if preset is None else {"preset": preset}
        if path is not None and self.policy is None:
            changes = {"input.path": str(Path(path).resolve()), "input.dataset": None}
            loaded = load(loaded.raw, settings=changes)
        name = new_name(loaded.config.name) if self._place is None else self._place[1]
        return loaded, self.folder or self._usual / name, asked

    def _with_preset(self, preset: str | None) -> Loaded:
        """Return the settings, of a preset that the input names if it names one."""
        if preset is None:
            return self.loaded
        return replace(self, preset=preset, config=None).loaded

    def _look_up(self, folder: Path) -> Prepared:
        about = open_folder(folder).read_provenance()
        self._folders[about["run"]] = folder
        run: RunKey = {"id": about["run"], "name": None if self.out else folder.name}
        config, total = self._loaded_of(folder).config, about["input"]["items"]
        return cut(run, config, total, singly=self.embedded)

    def _loaded_of(self, folder: Path) -> Loaded:
        """Return the settings of a run that there is; blocks."""
        if not self.embedded:
            return self.loaded
        if folder not in self._by_folder:
            self._by_folder[folder] = self._settings_of(open_folder(folder))
        return self._by_folder[folder]

    def _settings_of(self, run: RunFolder) -> Loaded:
        """Return the run's own settings with these on top, unless these stand alone."""
        if self.policy is not None:
            return self._requested(run.read_provenance().get("request"))[0]
        if asked := run.read_provenance().get("preset"):
            return self._with_preset(asked)
        if self.stands_alone:
            return self.loaded
        return settle(str(run.settings), self.changes(), endpoints=self.endpoints or None)[0]

    @asynccontextmanager
    async def opened(self, run: RunKey) -> AsyncIterator[RunTools]:
        """Open a run; the nodes of one invocation share what is open."""
        folder = self._folders.get(run["id"])
        if folder is None or self._runs.opened((folder, self._invocation)) is None:
            folder = await asyncio.to_thread(self.find, run)
        async with self._open_at(folder) as tools:
            yield tools

    @asynccontextmanager
    async def open_named(self, end: Walltime | None) -> AsyncIterator[RunTools]:
        """Open the run of the folder that ``out`` names, for a session that ends in time."""
        folder = await asyncio.to_thread(lambda: self.folder)
        assert folder is not None, "the command line names a folder"
        self._ends[folder] = end
        async with self._open_at(folder) as tools:
            yield tools

    @asynccontextmanager
    async def _open_at(self, folder: Path) -> AsyncIterator[RunTools]:
        retried = self._retried if self.retry_failed else None
        loaded = await asyncio.to_thread(self._loaded_of, folder)
        if folder not in self._ends:
            self._ends[folder] = life_end(loaded.config, time.time())
        mode = Mode(
            self.trace,
            self.embedded,
            retried,
            self._meters,
            item_engine,
            work_shard,
            self._ends[folder],
        )
        invocation, place = self._invocation, RunFolder(folder)

        @asynccontextmanager
        async def make() -> AsyncIterator[RunTools]:
            with invocation.opening():
                await claims().take_run(place, invocation)
                await asyncio.to_thread(self._lower_caps, folder)
                async with open_run(place, loaded, mode) as tools:
                    with invocation.using(tools):
                        yield tools

        async with self._runs.use((folder, invocation), make) as tools:
            yield tools

    async def shortfall(self, run: RunKey, needed: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what to ask of the user while the budget does not carry ``needed``, or None."""
        folder = await asyncio.to_thread(self.find, run)
        await self._claim(folder)
        await asyncio.to_thread(self._lower_caps, folder)
        loaded = await asyncio.to_thread(self._loaded_of, folder)
        tools = self._runs.opened((folder, self._invocation))
        budget = tools.budget if isinstance(tools, OpenedRun) else None
        place, amount = RunFolder(folder), Amount(**needed)
        asked = await asyncio.to_thread(shortfall, place, loaded.config, amount, budget)
        if asked is None or self.policy is None or self._owner is None:
            return asked
        owner = self._owner
        return self.policy.question(await asyncio.to_thread(lambda: owner.loaded), asked)

    def _lower_caps(self, folder: Path) -> None:
        """Hold what requests were allowed to what is bound now; blocks."""
        if self.policy is not None and self._owner is not None:
            lower_allowed(RunFolder(folder), self.policy.bound_totals(self._owner.loaded))

    def _refuse(self, answer: Any) -> str | None:
        """Return why a request may not give this answer to a spent budget, or None; blocks."""
        if self.policy is None or self._owner is None:
            return None
        return self.policy.check_answer(self._owner.loaded, answer)

    async def allow(self, run: RunKey, answer: Any) -> str | None:
        """Take an answer as the run's new caps; return what is wrong with it, or None."""
        if (problem := await asyncio.to_thread(self._refuse, answer)) is not None:
            return problem
        folder = await asyncio.to_thread(self.find, run)
        if self.embedded:
            self._ends.pop(folder, None)  # a life of its own: the answer may have taken days
        requested = self.policy is not None
        return await asyncio.to_thread(allow, RunFolder(folder), answer, requested=requested)

    async def finish(
        self, run: RunKey, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the results' files and return references to them."""
        folder = await asyncio.to_thread(self.find, run)
        place = RunFolder(folder)
        async with self._open_at(folder) as tools:
            results = await asyncio.to_thread(
                write_results, place, self._loaded_of(folder), tools, aggregate, progress
            )
            if self.embedded:
                await asyncio.to_thread(end_life, place)
        self._meters.pop(folder, None)
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


def _note(folder: RunFolder, asked: Mapping[str, Any]) -> None:
    folder.write_provenance(folder.read_provenance() | dict(asked))
