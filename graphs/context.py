"""The map-reduce's context: plain settings that open their parts when asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ..backends.accounts.folder import RunFolder, open_folder
from ..backends.build import open_fleet, serving
from ..backends.contract.money import Amount
from ..backends.reuse import reusing
from ..configs.load import Loaded, load
from ..nodes.context import Context, ItemContext, Prepared, RunTools
from .crew import life_end
from .finish import write_results
from .item import item_engine
from .items import item_context
from .lives import begin_life, end_life
from .opened import OpenedRun
from .opening import Mode, open_run
from .plan import cut
from .prepare import default_folder, prepare_run
from .settings import settle
from .shared import Shared
from .spending import allow, shortfall
from .walltime import Walltime
from .worker import work_shard


@dataclass
class RunContext(Context):
    """Settings of a run.

    Attributes:
        config: A preset's name, a YAML file, or the settings as a mapping; None runs
            molecular_screening on the simulated fleet.
        overrides: Settings on top, each ``key.of.section=value``.
        out: Folder of the run; None makes one below ``fanfold-runs``.
        trace: Run every item by LangGraph's engine, visible in traces.
        retry_failed: On a resumed run, ask failed items again.
    """

    config: str | dict[str, Any] | None = None
    overrides: list[str] = field(default_factory=list)
    out: str | None = None
    trace: bool = False
    retry_failed: bool = False

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
        context.__dict__ |= given
        return context

    @cached_property
    def loaded(self) -> Loaded:
        """Return the checked configuration.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        return settle(self.config, self.overrides)[0]

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

    @cached_property
    def _retried(self) -> dict[Path, int]:
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
    ) -> Prepared:
        """Make a run's folder from a path or items, or look up one that was made."""
        if folder is not None:
            self._retried.pop(Path(folder), None)  # a further invocation asks once more
            if self.embedded:
                self._ends.pop(folder, None)  # a life of its own
        else:
            loaded, target = await asyncio.to_thread(self._new_run, path)
            made = await prepare_run(loaded, target, items, self.allow_simulated)
            folder = str(made.path)
        run = await asyncio.to_thread(self._look_up, folder)
        if self.embedded:
            await asyncio.to_thread(begin_life, RunFolder(Path(folder)))
        return run

    def _new_run(self, path: str | None) -> tuple[Loaded, Path]:
        loaded = self.loaded
        if path is not None:
            changes = {"input.path": str(Path(path).resolve()), "input.dataset": None}
            loaded = load(self.loaded.raw, settings=changes)
        return loaded, Path(self.out).resolve() if self.out else default_folder(loaded.config.name)

    def _look_up(self, folder: str) -> Prepared:
        total = open_folder(Path(folder)).read_provenance()["input"]["items"]
        return cut(folder, self.loaded.config, total)

    @asynccontextmanager
    async def opened(self, folder: str) -> AsyncIterator[RunTools]:
        """Open a run; users in the same loop share what is open."""
        retried = self._retried if self.retry_failed else None
        loaded = await asyncio.to_thread(lambda: self.loaded)  # files are read off the loop
        if folder not in self._ends:
            self.bound(folder, life_end(loaded.config, time.time()))
        mode = Mode(self.trace, retried, item_engine, work_shard, self._ends[folder])
        path = await asyncio.to_thread(open_folder, Path(folder))
        async with self._runs.use(folder, lambda: open_run(path, loaded, mode)) as tools:
            yield tools

    async def shortfall(self, folder: str, needed: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what to ask of the user while the budget does not carry ``needed``, or None."""
        loaded = await asyncio.to_thread(lambda: self.loaded)
        tools = self._runs.opened(folder)
        budget = tools.budget if isinstance(tools, OpenedRun) else None
        run = RunFolder(Path(folder))
        return await asyncio.to_thread(shortfall, run, loaded.config, Amount(**needed), budget)

    async def allow(self, folder: str, answer: Any) -> str | None:
        """Take an answer as the run's new caps; return what is wrong with it, or None."""
        return await asyncio.to_thread(allow, RunFolder(Path(folder)), answer)

    async def finish(
        self, folder: str, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the results' files and return references to them."""
        run = RunFolder(Path(folder))
        async with self.opened(folder) as tools:
            results = await asyncio.to_thread(
                write_results, run, self.loaded, tools, aggregate, progress
            )
            if self.embedded:
                await asyncio.to_thread(end_life, run)
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
