"""What the stages of a pipeline came to, read from their folders."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from ...backends.budget.cost import Cost
from ...backends.budget.limits import SETTING_UNITS
from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import EXIT_BUDGET, JournalError
from ...backends.core.money import NANO_PER_USD, UsageTotals
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder, get_run_ids
from ...configs.loader import LoadedConfig
from ...nodes.shard.progress import Progress
from .next_steps import ask_failed_command
from .pipeline import Stage, list_stages
from .stage_folder import OPERATOR_FILE, is_finished
from .stage_rows import PassedOn, StageRows


@dataclass(frozen=True, slots=True)
class LevelState:
    """The state of one run that asks the model: of a stage without an operator, or of a level.

    Attributes:
        folder: Its folder.
        level: Name of the level, or None.
        items: Its items.
        done: Items with an answer.
        failed: Items that failed.
        failed_by_class: Failed items by error class.
        usage: What its requests used.
        sessions: The same by session.
        is_finished: Whether all items have ended and its results are written.
        kept: Items that were taken over from another pipeline.
    """

    folder: RunFolder
    level: str | None
    items: int
    done: int
    failed: int
    failed_by_class: Mapping[str, int]
    usage: UsageTotals
    sessions: Mapping[int, UsageTotals]
    is_finished: bool
    kept: int = 0

    @classmethod
    def read(cls, folder: RunFolder) -> LevelState:
        """Read the state of a run; blocks.

        Raises:
            JournalError: Its journal or provenance is damaged.
        """
        about = folder.read_provenance()
        items = about["input"]["items"]
        known = about.get("from") or {"done": 0, "failed": 0}
        with Journal(folder.journal, get_run_ids(about), items) as journal:
            counts = journal.count_items()
            return cls(
                folder,
                about.get("level"),
                items,
                counts.done,
                counts.failed,
                journal.count_failures(),
                journal.total_usage(),
                dict(journal.usage_by_session),
                is_finished(folder),
                known["done"] + known["failed"],
            )

    def to_json(self) -> dict[str, Json]:
        """Return the state as plain data."""
        return {
            "level": self.level,
            "items": self.items,
            "done": self.done,
            "failed": self.failed,
            "kept": self.kept,
            "requests": self.usage.requests,
            "tokens": {
                "prompt": self.usage.prompt_tokens,
                "completion": self.usage.completion_tokens,
            },
        }


@dataclass(frozen=True, slots=True)
class StageState:
    """The state of a stage.

    Attributes:
        stage: The stage.
        state: ``waiting``, ``begun`` or ``finished``.
        items: Its items; of an operator, those that it reduces; None before it has begun.
        results: Results so far, without failed ones.
        failed: Failed items, or failed results of an operator.
        passed_on: What became of the results of the stage before: passed, failed, unselected.
        runs: The runs that ask the model: one, or one for each level of an operator.
        report: Facts that an operator reports at its end.
    """

    stage: Stage
    state: str
    items: int | None = None
    results: int = 0
    failed: int = 0
    passed_on: Mapping[str, int] | None = None
    runs: tuple[LevelState, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usage(self) -> UsageTotals:
        """Return what all requests of the stage used."""
        return UsageTotals.total(run.usage for run in self.runs)

    @property
    def kept(self) -> int:
        """Return the items and questions that were taken over from another pipeline."""
        return sum(run.kept for run in self.runs)

    @property
    def failed_questions(self) -> int:
        """Return the failed questions of an operator that reduces; other failures are items.

        Questions that were split because they were too long are asked again in parts.
        """
        if not self.stage.config.reduces:
            return 0
        return sum(run.failed for run in self.runs) - int(self.report.get("splits", 0))

    def to_json(self) -> dict[str, Json]:
        """Return the state as plain data."""
        usage = self.usage
        operator = self.stage.config.operator
        return {
            "stage": self.stage.name,
            "op": "map" if operator is None else operator.op,
            "state": self.state,
            "from": self.stage.source,
            "items": self.items,
            "results": self.results,
            "failed": self.failed,
            "kept": self.kept,
            "passed_on": None if self.passed_on is None else dict(self.passed_on),
            "requests": usage.requests,
            "tokens": {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens},
            "usd": usage.nano_usd / NANO_PER_USD if usage.nano_usd else None,
            "levels": [run.to_json() for run in self.runs] if operator is not None else [],
            "report": dict(self.report),
        }


@dataclass(frozen=True, slots=True)
class PipelineState:
    """The state of all stages.

    Attributes:
        stages: Each stage, in order.
        cost: What all sessions of all stages have cost.
    """

    stages: tuple[StageState, ...]
    cost: Cost

    @property
    def last(self) -> StageState:
        """Return the last stage that has begun, or the first one."""
        begun = [one for one in self.stages if one.state != "waiting"]
        return begun[-1] if begun else self.stages[0]

    @property
    def is_finished(self) -> bool:
        """Return True if all stages have ended."""
        return all(one.state == "finished" for one in self.stages)

    def count_questions(self) -> dict[str, int]:
        """Return the items of all runs that ask the model, by state; those to come are unknown."""
        runs = [run for one in self.stages for run in one.runs]
        items, done = sum(run.items for run in runs), sum(run.done for run in runs)
        failed = sum(run.failed for run in runs)
        return {"items": items, "done": done, "failed": failed, "open": items - done - failed}

    @property
    def failed(self) -> int:
        """Return the failed items and results of all stages, and failed questions of levels."""
        return sum(one.failed + one.failed_questions for one in self.stages)


def read_pipeline(folder: RunFolder, loaded: LoadedConfig) -> PipelineState:
    """Read the state of a pipeline; blocks.

    Args:
        folder: Its folder.
        loaded: Its settings.

    Raises:
        JournalError: A journal or a spend log is damaged.
    """
    stages = tuple(_read_stage(stage) for stage in list_stages(loaded, folder.path))
    sessions = dict[int, UsageTotals]()
    for run in (run for one in stages for run in one.runs):
        sessions |= run.sessions
    logs = SpendLogs(folder.budget, get_run_ids(folder.read_provenance()), live=folder.is_in_use())
    total = UsageTotals.total(sessions.values())
    recorded = {number: spent.amount for number, spent in sessions.items()}
    doubt = logs.unaccounted(recorded)
    return PipelineState(stages, Cost(total, logs.total_node_time(), doubt, total.nano_usd > 0))


def _read_stage(stage: Stage) -> StageState:
    if not stage.folder.path.exists():
        return StageState(stage, "waiting")
    runs = tuple(map(LevelState.read, stage.list_runs()))
    state = "finished" if stage.is_finished else "begun"
    if stage.config.operator is None:
        about = stage.folder.read_provenance()
        (run,) = runs
        return StageState(
            stage, state, run.items, run.done, run.failed, about.get("passed_on"), runs
        )
    kept = _read_json(stage.folder, OPERATOR_FILE)
    items = kept.get("items")
    found = StageState(stage, state, items, 0, 0, kept.get("passed_on"), runs)
    if state != "finished":
        return found
    aggregate = _read_json(stage.folder, stage.folder.aggregate.name)
    done, failed = aggregate["progress"]["done"], aggregate["progress"]["failed"]
    report = aggregate.get("report", {})
    return StageState(stage, state, items, done, failed, kept.get("passed_on"), runs, report)


def _read_json(folder: RunFolder, name: str) -> dict[str, Any]:
    path = folder.path / name
    try:
        return dict(orjson.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(f"{path}: cannot be read: {error}") from None


def find_next_command(
    folder: RunFolder, about: Mapping[str, Any], state: PipelineState, budget: Mapping[str, Any]
) -> str | None:
    """Return the command that continues a pipeline, or None if it has ended or a session runs.

    If no result is passed on to the next stage, that is another ``where``, or a new run that asks
    the failed items again.

    Args:
        folder: The folder of the pipeline.
        about: Its provenance.
        state: What its stages came to.
        budget: Spending and limit of the pipeline, by limit.
    """
    if folder.is_in_use() or state.is_finished:
        return None
    blocked = _find_blocked(folder, state)
    if blocked is not None:
        stage, counts = blocked
        if not counts.unselected:
            return ask_failed_command(folder)
        where = f"--set stages.{stage.number}.where=CONDITION"
        return f"fanfold resume {shlex.quote(str(folder.path))} {where}"
    last = about["sessions"][-1] if about["sessions"] else {}
    options = list_raise_options(state, budget) if last.get("exit_code") == EXIT_BUDGET else []
    return " ".join(["fanfold resume", shlex.quote(str(folder.path)), *options])


def _find_blocked(folder: RunFolder, state: PipelineState) -> tuple[Stage, PassedOn] | None:
    """Return the next stage if no result is passed on to it, and what became of the results."""
    ended = {one.stage.name for one in state.stages if one.state == "finished"}
    following = next(one for one in state.stages if one.state != "finished")
    stage = following.stage
    if following.state != "waiting" or stage.source is None or stage.source not in ended:
        return None
    counts = StageRows(folder.path, stage.source, stage.config.where).find_none()
    return None if counts is None else (stage, counts)


def list_raise_options(state: PipelineState, budget: Mapping[str, Any]) -> list[str]:
    """Return the options that raise the limits of the stage that is being worked on.

    Of a limit of the stage itself and that of the pipeline, the one that leaves less is raised.

    Args:
        state: What the stages came to.
        budget: Spending and limit of the pipeline, by limit.
    """
    last = state.last
    kept = _read_kept(last)
    left = {name: one["cap"] - one["spent"] - kept.get(name, 0.0) for name, one in budget.items()}
    options = list[str]()
    for name, own in read_stage_budget(last).items():
        if own["cap"] - own["spent"] <= left.get(name, math.inf):
            left.pop(name, None)
            options.append(f"--set stages.{last.stage.number}.budget.{name}=N")
    return [*(f"--budget-{name.replace('_', '-')} N" for name in left), *options]


def _read_kept(state: StageState) -> dict[str, float]:
    """Return what the budget of the pipeline keeps for stages after this one, by limit."""
    place = state.runs[-1].folder.read_place() if state.runs else None
    kept = {} if place is None else place.kept
    return {key: kept.get(name, 0) / unit for name, (key, unit) in SETTING_UNITS.items()}


def read_stage_budget(state: StageState) -> dict[str, dict[str, float]]:
    """Return spending and limit of a stage, by the limits of its own.

    Node-hours of a stage are not counted apart, so all of them appear as left.
    """
    config, usage = state.stage.config.budget, state.usage
    spent = {
        "requests": usage.requests,
        "tokens": usage.tokens,
        "usd": usage.nano_usd / NANO_PER_USD,
    }
    caps: dict[str, float] = {} if config is None else config.model_dump(exclude_none=True)
    return {name: {"spent": spent.get(name, 0.0), "cap": cap} for name, cap in caps.items()}


def read_stage_end(stage: Stage, progress: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return aggregate, progress and results of a finished stage, as a run's graph has them.

    The counts of an operator are those of its results, and its usage that of all its levels.

    Args:
        stage: The stage.
        progress: Counts of the run of the stage, or None to read those of its results.

    Raises:
        JournalError: A file is damaged.
    """
    folder = stage.folder
    found = _read_json(folder, folder.aggregate.name)
    counts = dict(found["progress"]) if progress is None else dict(progress)
    if stage.config.operator is not None:
        counts = _sum_levels(stage, found)
    return {
        "aggregate": found["aggregate"],
        "progress": {**counts, "stage": stage.name},
        "results": {
            "folder": str(folder.path),
            "table": str(folder.results),
            "failures": str(folder.failures),
            "simulated": bool(found["simulated"]),
        },
    }


def _sum_levels(stage: Stage, aggregate: Mapping[str, Any]) -> dict[str, Any]:
    counts, runs = aggregate["progress"], map(LevelState.read, stage.list_levels())
    usage = UsageTotals.total(run.usage for run in runs)
    whole = Progress(counts["items"], counts["done"], counts["failed"], usage=usage)
    simulated = bool(aggregate["simulated"])
    return whole.to_json(simulated=simulated, priced=usage.nano_usd > 0)


def describe_stages(state: PipelineState) -> Iterator[str]:
    """Yield one line for each stage that has begun."""
    for one in state.stages:
        if one.state == "waiting":
            continue
        usage, results = one.usage, f"{one.results:,} done"
        if one.stage.config.operator is not None:
            results = count_nouns(one.results, "result")
        counts = one.passed_on or {}
        left = [
            f"{counts[key]:,} {words}"
            for key, words in (("unselected", "not selected"), ("failed", "failed before"))
            if counts.get(key)
        ]
        passed = f" ({', '.join(left)})" if left else ""
        is_asked = one.stage.config.operator is not None and one.runs
        levels = f" in {count_nouns(len(one.runs), 'level')}" if is_asked else ""
        failed = one.failed + one.failed_questions
        kept = f"{one.kept:,} kept, " if one.kept else ""
        items = "? items" if one.items is None else count_nouns(one.items, "item")
        yield (
            f"stage {one.stage.name}: {items}{passed}, {results}{levels}, "
            f"{failed:,} failed; {kept}{count_nouns(usage.requests, 'request')}, "
            f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
            + ("" if one.state == "finished" else "; not finished")
        )
        for line in one.report.get("lines", ()):
            yield f"  {line}"
