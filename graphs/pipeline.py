"""One session of a pipeline: a graph with one node for each stage, each of which runs runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from rich.console import Console
from typing_extensions import TypedDict

from ..backends.core.errors import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    BudgetExhaustedError,
    RunStoppedError,
)
from ..backends.core.money import NANO_PER_USD
from ..backends.core.terminal import count_nouns
from ..backends.storage.run_folder import RunFolder
from ..configs.loader import LoadedConfig
from .run.pipeline import Pipeline, Stage, list_stages, remove_unfinished
from .run.pipeline_report import PipelineState, read_pipeline
from .run.pipeline_resources import PipelineResources
from .run.prepare import ReadyRun
from .run.rich_console import print_message
from .run.run_result import RunResult
from .run.shutdown import Shutdown, handle_signals
from .run.stage_estimate import make_reserve
from .session import RunOptions, freeze_gc, record_session, run_session


class PipelineGraphState(TypedDict, total=False):
    """State of the graph of stages; the results are in the folder of the pipeline.

    Keys:
        stage: Name of the last stage that has ended.
    """

    stage: str


RunStage: TypeAlias = Callable[[str], Awaitable[None]]
"""Runs the stage of a name to its end."""

StageGraph = CompiledStateGraph[PipelineGraphState, None, PipelineGraphState, PipelineGraphState]


def build_stage_graph(names: Sequence[str], run_stage: RunStage) -> StageGraph:
    """Return a graph with one node for each stage, one after the other.

    Args:
        names: Names of the stages, in order.
        run_stage: Runs a stage.
    """
    graph: StateGraph[PipelineGraphState, None, PipelineGraphState, PipelineGraphState]
    graph = StateGraph(PipelineGraphState)
    before = START
    for name in names:
        graph.add_node(name, _make_node(name, run_stage))
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph.compile(name="pipeline")


def _make_node(name: str, run_stage: RunStage) -> Any:
    async def node(_state: PipelineGraphState) -> PipelineGraphState:
        await run_stage(name)
        return {"stage": name}

    node.__doc__ = f"Run the stage {name}."
    return node


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """Result of one session of a pipeline.

    Attributes:
        exit_code: Exit code.
        folder: Its folder.
        run_id: Its id.
        seconds: Wall time of this session.
        state: What its stages came to.
        last: Result of the last run of the session, or None if it ran none.
        reason: Why it was interrupted, or None.
        simulated: Whether the answers are simulated.
    """

    exit_code: int
    folder: RunFolder
    run_id: str
    seconds: float
    state: PipelineState
    last: RunResult | None
    reason: str | None
    simulated: bool


class _StoppedError(RunStoppedError):
    """A run of the pipeline stopped before its end.

    Args:
        result: Its result.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.reason or "stopped")
        self.result = result


async def execute_pipeline(
    folder: RunFolder, loaded: LoadedConfig, options: RunOptions, console: Console
) -> PipelineResult:
    """Run or resume a pipeline to its end, and record the session in its provenance.

    Args:
        folder: The folder of the pipeline.
        loaded: Its settings.
        options: Options of the session.
        console: Console for progress.

    Raises:
        ConfigurationError: The settings do not fit, or another process works on the pipeline.
        JournalError: A file is damaged or cannot be written.
        RunStoppedError: It was stopped while a run was being opened.
    """
    started = time.monotonic()
    with handle_signals(console) as stop, stop.stop_at_deadline(options.deadline), freeze_gc():
        async with AsyncExitStack() as stack:
            lock = folder.lock()
            await asyncio.to_thread(lock.__enter__)
            stack.callback(lock.__exit__, None, None, None)
            await asyncio.to_thread(remove_unfinished, folder)
            about, this = await stack.enter_async_context(record_session(folder))
            session = _PipelineSession(folder, loaded, options, console, stop)
            stack.push_async_callback(session.resources.aclose)
            code, reason = await session.run()
            state = await asyncio.to_thread(read_pipeline, folder, loaded)
            if code == EXIT_DONE and state.failed:
                code = EXIT_FAILURES
            nano, first = state.cost.nano_usd, state.stages[0]
            about |= _describe_models(state)
            this.update(
                outcome=reason or "finished",
                exit_code=code,
                done=first.results if first.stage.config.operator is None else first.items,
                failed=first.failed,
                failed_in_stages=state.count_questions()["failed"],
                usd=None if nano is None else nano / NANO_PER_USD,
            )
    last = session.last
    return PipelineResult(
        code,
        folder,
        about["run"],
        round(time.monotonic() - started, 3),
        state,
        last,
        reason,
        about["simulated"] if last is None else last.simulated,
    )


def _describe_models(state: PipelineState) -> dict[str, Any]:
    """Return the models that the stages have used, and whether they are simulated; blocks."""
    runs = [run.folder.read_provenance() for one in state.stages for run in one.runs]
    if not runs:
        return {}
    models = ", ".join(sorted({str(about["model"]) for about in runs}))
    return {"model": models, "simulated": any(bool(about["simulated"]) for about in runs)}


class _PipelineSession:
    """One session of a pipeline, and the last run that it has run."""

    def __init__(
        self,
        folder: RunFolder,
        loaded: LoadedConfig,
        options: RunOptions,
        console: Console,
        stop: Shutdown,
    ) -> None:
        self.resources = PipelineResources(folder.path)
        self.last: RunResult | None = None
        stages = list_stages(loaded, folder.path)
        reserve = make_reserve(loaded, stages)
        self._pipeline = Pipeline(folder, loaded, stages, self.resources, estimate_reserve=reserve)
        self._options, self._console, self._stop = options, console, stop

    async def run(self) -> tuple[int, str | None]:
        """Run all stages; return the exit code, and why the session stopped or None."""
        stages = {stage.name: stage for stage in self._pipeline.stages}
        graph = build_stage_graph(list(stages), lambda name: self._run_stage(stages[name]))
        try:
            await graph.ainvoke({})
        except _StoppedError as error:
            return error.result.exit_code, error.message
        except BudgetExhaustedError as error:
            return EXIT_BUDGET, error.message
        return EXIT_DONE, None

    async def _run_stage(self, stage: Stage) -> None:
        await self._pipeline.run_stage(stage, self._run_inner)

    async def _run_inner(self, run: ReadyRun) -> None:
        """Run one run as a session of its own, outside the graph of stages.

        The run keeps its checkpoints in its own folder, so it must not take part in those of the
        graph around it.
        """
        if self._stop.reason is not None:
            raise RunStoppedError(f"{self._stop.reason} between two runs; resume the pipeline")
        if not self._options.quiet:
            print_message(self._console, _announce(run))
        outside = copy_context()
        outside.run(var_child_runnable_config.set, None)
        work = run_session(run, replace(self._options), self._console, self._stop)
        result = await asyncio.create_task(work, context=outside)
        self.last = result
        if result.exit_code in {EXIT_BUDGET, EXIT_INTERRUPTED}:
            raise _StoppedError(result)


def _announce(run: ReadyRun) -> str:
    about = run.folder.read_provenance()
    place = run.folder.read_place()
    assert place is not None, "the run is a part of a pipeline"
    level = "" if about.get("level") is None else f", {about['level']}"
    known = about.get("from") or {"done": 0, "failed": 0}
    kept = known["done"] + known["failed"]
    more = f", {kept:,} of them kept" if kept else ""
    return f"stage {place.stage}{level}: {count_nouns(about['input']['items'], 'item')}{more}"
