"""Extend a pipeline: its stages and levels take over answers of another pipeline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...backends.core.errors import ConfigurationError
from ...backends.core.types import Json
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder, get_run_ids
from ...configs.loader import LoadedConfig
from .extend import ExtensionPlan, open_source, take_over
from .stage_folder import is_operator, list_levels

if TYPE_CHECKING:
    from .prepare import ExtendRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What a pipeline takes over from another one, as far as it is known before its first call.

    Attributes:
        run: Id of the other pipeline.
        path: Its folder.
        simulated: Whether the answers of both are simulated.
        model: Name of the model of the first stage, or empty if it is not known yet.
        items: The items of the first stage, on disk.
        first: The plan of the first stage; None if it is an operator, or not in the other pipeline.
        answers: Answers that the other pipeline has, by stage; None for a stage that it lacks.
    """

    run: str
    path: Path
    simulated: bool
    model: str
    items: Path
    first: ExtensionPlan | None
    answers: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class PipelineExtension:
    """The pipeline that a new pipeline extends.

    A stage or level takes over the answers to items with the same id and the same question, of the
    stage of the same name and of any of its levels. The folder is named in the provenance of the
    new pipeline, because most stages begin in the middle of it, or in a later session.

    Attributes:
        source: Folder of the other pipeline; it is only read.
        run: Its id.
        ask_again: Finished items that are asked again: ``cut``, ``failed`` or ``all``; None decides
            by what has changed.
        confirm: Called with the plan before the folder of the new pipeline appears; it raises to
            stop.
    """

    source: RunFolder
    run: str
    ask_again: str | None
    confirm: Callable[[PipelinePlan], Awaitable[None]] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        stages: Mapping[str, bool],
        ask_again: str | None,
        confirm: Callable[[PipelinePlan], Awaitable[None]],
    ) -> Self:
        """Check that a pipeline can be extended; blocks.

        Args:
            path: Its folder.
            stages: The stages of the new pipeline, and whether their settings simulate the fleet.
            ask_again: Finished items that are asked again, or None.
            confirm: Called with the plan; it raises to stop.

        Raises:
            ConfigurationError: There is no pipeline, a session is working on it, or its answers are
                real and those of the new pipeline are not.
            JournalError: It cannot be read, or has another format.
        """
        source = open_source(path)
        if not source.is_pipeline:
            msg = (
                f"--from {path}: this is a run of a single task, and these settings have stages; "
                "a pipeline takes over answers of the stages of another one"
            )
            raise ConfigurationError(msg)
        found = cls(source, source.read_provenance()["run"], ask_again, confirm)
        for stage, simulated in stages.items():
            kinds = {one.read_provenance()["simulated"] for one in found.list_runs(stage)}
            if simulated and False in kinds:
                msg = (
                    f"--from {path}: the answers of stage {stage!r} are real, and these endpoints "
                    "are simulated; a run cannot mix them"
                )
                raise ConfigurationError(msg)
        return found

    @classmethod
    def read(cls, folder: RunFolder) -> Self | None:
        """Return what a pipeline extends by its provenance, or None; blocks.

        If the other folder is gone, the remaining stages ask all of their items, and a warning says
        so.

        Raises:
            JournalError: A provenance is damaged.
        """
        known = folder.read_provenance().get("from")
        if known is None:
            return None
        source = RunFolder(Path(known["path"]))
        if not source.provenance.exists() or known["run"] not in get_run_ids(
            source.read_provenance()
        ):
            _warn_gone(source, known["run"])
            return None
        return cls(source, known["run"], known["ask_again"])

    def to_json(self) -> dict[str, Json]:
        """Return what the provenance of the new pipeline keeps."""
        path = str(self.source.path.resolve())
        return {"run": self.run, "path": path, "ask_again": self.ask_again}

    def list_runs(self, stage: str) -> list[RunFolder]:
        """Return the runs of the other pipeline that have asked about a stage of a name; blocks."""
        folder = RunFolder(self.source.stages / stage)
        runs = list_levels(folder.path) if is_operator(folder.path) else [folder]
        return [run for run in runs if run.provenance.exists()]

    def count_answers(self, stage: str) -> int | None:
        """Return how many answers a stage of a name has; None if there is none; blocks.

        Raises:
            JournalError: A journal is damaged.
        """
        runs, total = self.list_runs(stage), 0
        for run in runs:
            about = run.read_provenance()
            with Journal(run.journal, get_run_ids(about), about["input"]["items"]) as journal:
                total += journal.count_items().done
        return total if runs else None

    def make_extend(
        self,
        stage: str,
        loaded: LoadedConfig,
        note: ExtendRun,
        confirm: Callable[[ExtensionPlan | None], Awaitable[None]] | None = None,
    ) -> ExtendRun:
        """Return a function that takes over what a run of a stage has in common with this pipeline.

        Args:
            stage: Name of the stage.
            loaded: The settings of the run.
            note: Returns what else to add to the provenance of the run.
            confirm: Called with the plan, or None if there is nothing to take over; it raises to
                stop. Without it, runs whose answers are of the other kind (real or simulated) are
                left out.
        """

        async def extend(folder: RunFolder, about: Mapping[str, Any]) -> dict[str, Any]:
            facts = await note(folder, about)
            runs = await asyncio.to_thread(lambda: _order_runs(self.list_runs(stage), facts))
            if confirm is None:
                level = facts.get("level")
                runs = await asyncio.to_thread(_select_kind, runs, about["simulated"], level)
            if not runs and not await asyncio.to_thread(self.source.provenance.exists):
                _warn_gone(self.source, self.run)
            if not runs or loaded.config.input.is_batch:
                if confirm is not None:
                    await confirm(None)
                return facts
            again = self.ask_again
            plan = await take_over(
                runs, loaded, folder, about, ask_again=again, confirm=confirm, run=self.run
            )
            return facts | {"from": plan.to_json()}

        return extend


def _warn_gone(source: RunFolder, run: str) -> None:
    logger.warning(
        "%s: pipeline %s is no longer there, so no more answers are taken over from it; if it was "
        "moved, stop, and repeat fanfold run with its new place in --from",
        source.path,
        run,
    )


def _order_runs(runs: Sequence[RunFolder], facts: Mapping[str, Any]) -> list[RunFolder]:
    """Return the runs that a run may take answers from, a level of the same name first; blocks.

    A level that asks questions a second time wants further answers: it shares none with others.
    """
    same, others = list[RunFolder](), list[RunFolder]()
    for run in runs:
        about = run.read_provenance()
        if about.get("level") == facts.get("level"):
            same.append(run)
        elif not (about.get("asks_again") or facts.get("asks_again")):
            others.append(run)
    return [*same, *others]


def _select_kind(runs: Sequence[RunFolder], simulated: bool, level: Json) -> list[RunFolder]:
    """Return the runs whose answers are simulated, or those whose answers are real; blocks.

    The models of a stage may be of both kinds, so a warning is due only if the answers to the same
    questions, those of the same level, are left out.
    """
    known = [(run, run.read_provenance()) for run in runs]
    kept = [run for run, about in known if about["simulated"] == simulated]
    same = [run for run, about in known if about.get("level") == level]
    if same and not any(run in kept for run in same):
        kind = "real" if simulated else "simulated"
        logger.warning("--from: %s answers of %s are not taken over", kind, same[0].path)
    return kept
