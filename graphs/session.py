"""One life of a run: from an open folder to its end, whatever end that is."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.types import Interrupt
from rich.console import Console

from ..backends.budget.cost import Cost
from ..backends.budget.spend_log import Shelf
from ..backends.cluster.walltime import Walltime
from ..backends.core.errors import (
    BUDGET,
    DONE,
    FAILURES,
    INTERRUPTED,
    BudgetExhaustedError,
    LedgerError,
    RunStoppedError,
)
from ..backends.storage.journal import RunIds
from ..backends.storage.run_folder import RunFolder, now, run_ids
from ..configs.loader import Loaded
from ..nodes.context import RunTools
from .context import RunContext
from .map_reduce import MapReduce, build
from .run.checkpoints import open_saver
from .run.items import UNBOUNDED
from .run.monitor import watching
from .run.open_run import OpenedRun
from .run.prepare import life
from .run.shutdown import Stop, stoppable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one life of a run goes.

    Attributes:
        checkpointer: ``postgresql://…``, or None for SQLite in the run folder.
        trace: Run every item by LangGraph's engine.
        retry_failed: Ask failed items again.
        anew: Fold from the first item instead of from the last checkpoint.
        quiet: Show no progress.
        end: When it must end, or None.
    """

    checkpointer: str | None = None
    trace: bool = False
    retry_failed: bool = False
    anew: bool = False
    quiet: bool = False
    end: Walltime | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """How one life of a run ended.

    Attributes:
        code: Exit code.
        folder: The run's folder.
        run: The run's id.
        seconds: Wall time of this life.
        progress: Counts of items, requests and tokens.
        aggregate: One entry per reduce stage; empty when the run is not finished.
        simulated: Whether the answers are simulated.
        reason: Why it was interrupted, or None.
        budget: By limit, what is spent of which cap.
        cost: What all lives have cost; None until the life has ended.
    """

    code: int
    folder: RunFolder
    run: str
    seconds: float
    progress: dict[str, Any]
    aggregate: list[dict[str, Any]]
    simulated: bool
    reason: str | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    cost: Cost | None = None


async def execute(
    folder: RunFolder, loaded: Loaded, options: RunOptions, console: Console
) -> RunResult:
    """Run or resume a prepared run to its end, and note this life in its provenance.

    Signals and the end of its time stop it: see :class:`~fanfold.graphs.run.shutdown.Stop`.

    Raises:
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        LedgerError: Something could not be written; says how many items are safe.
        RunStoppedError: It was stopped while it was being opened.
    """
    with stoppable(console) as stop, stop.ending(options.end), spared_modules():
        return await lived(folder, loaded, options, console, stop)


async def lived(  # noqa: PLR0913 - what a life is made of
    folder: RunFolder,
    loaded: Loaded,
    options: RunOptions,
    console: Console,
    stop: Stop,
    *,
    opened: Callable[[RunTools], None] | None = None,
) -> RunResult:
    """Do the same in any loop; what stops the run is the caller's.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        options: How this life goes.
        console: Where to say what is going on.
        stop: By which the caller stops it.
        opened: Called once the run is open, for whoever watches.
    """
    started = time.monotonic()
    context = RunContext.of(
        loaded,
        out=str(folder.path),
        trace=options.trace,
        retry_failed=options.retry_failed,
    )
    async with AsyncExitStack() as stack:
        tools = await stop.opening(stack.enter_async_context(context.open_named(options.end)))
        if opened is not None:
            opened(tools)
        async with counted(tools), noted(folder) as (about, this):
            life = _Life(folder, about["run"], context, tools, options, console, stop)
            result = await life.lived()
            this["outcome"] = result.reason or "finished"
    budget = {} if tools.budget is None else tools.budget.report()
    assert isinstance(tools, OpenedRun), "the run's own context has opened it"
    cost = await asyncio.to_thread(cost_of_life, folder, run_ids(about), tools)
    seconds = round(time.monotonic() - started, 3)
    return replace(result, seconds=seconds, budget=budget, cost=cost)


@contextmanager
def spared_modules() -> Iterator[None]:
    """Keep the garbage collector from what is loaded already.

    Some 200,000 objects of imported modules never become garbage, and each full collection
    that walks them holds up the loop for more than 0.1 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@asynccontextmanager
async def counted(tools: RunTools) -> AsyncIterator[None]:
    """Let every failed write say how many items are safe."""
    try:
        yield
    except LedgerError as error:
        if "items are safe" in error.message:
            raise
        safe, total = tools.progress.done + tools.progress.failed, tools.progress.total
        msg = f"{error.message}. {safe:,} of {total:,} items are safe; mend it, then resume"
        raise LedgerError(msg) from error


@asynccontextmanager
async def noted(folder: RunFolder) -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Note this life in the run's provenance, at its begin and at its end."""
    about, this = await asyncio.to_thread(lambda: (folder.read_provenance(), life(folder)))

    async def note() -> None:
        lives = [*about["lives"], this]
        await asyncio.to_thread(folder.write_provenance, about | {"lives": lives})

    await note()
    this["outcome"] = "stopped by an error"
    try:
        yield about, this
    except BaseException:
        this["ended"] = now()
        try:
            await note()
        except LedgerError as error:
            logger.warning("%s", error.message)  # what ended the run matters more
        raise
    this["ended"] = now()
    await note()


@dataclass(frozen=True, slots=True)
class _Life:
    """The parts of one life of a run, and how it is lived."""

    folder: RunFolder
    run: str
    context: RunContext
    tools: RunTools
    options: RunOptions
    console: Console
    stop: Stop

    async def lived(self) -> RunResult:
        thread = RunnableConfig(configurable={"thread_id": self.run}, recursion_limit=UNBOUNDED)
        async with open_saver(self.options.checkpointer, self.folder.checkpoints) as saver:
            graph = build(self.context, trust_context=True).compile(checkpointer=saver)
            going_on = await self._can_go_on(graph, thread)
            async with watching(self.tools, self.console, self.options.quiet):
                result = await self._invoked(graph, thread, going_on)
                if result.code not in {BUDGET, INTERRUPTED} and not self._agrees(result):
                    result = await self._invoked(graph, thread, going_on=False)
                return result

    async def _can_go_on(self, graph: MapReduce, thread: RunnableConfig) -> bool:
        """Say whether the last checkpoint is of an unfinished run of the same reduce stages."""
        state = await graph.aget_state(thread)
        parts, empty = state.values.get("parts"), self.tools.aggregate.empty()
        return (
            bool(state.next)
            and not (self.options.anew or self.options.retry_failed)
            and (not parts or _stages(parts) == _stages(empty))
        )

    async def _invoked(self, graph: MapReduce, thread: RunnableConfig, going_on: bool) -> RunResult:
        """Go on from the last checkpoint, or fold all items anew: the journal has the finished."""
        begin: Any = None if going_on else {}
        control = self.stop.control
        invocation = asyncio.ensure_future(
            graph.ainvoke(begin, thread, context=self.context, durability="sync", control=control)
        )
        with self.stop.working(self.tools.gate, invocation):
            return await self._outcome(invocation)

    def _agrees(self, result: RunResult) -> bool:
        """Say whether the fold counts what the journal counts.

        It does not when it went on from a checkpoint that is older than the journal: failed
        items may have been asked again with the checkpoints kept elsewhere.
        """
        counted = self.tools.progress
        found = result.progress
        return (found["done"], found["failed"]) == (counted.done, counted.failed)

    async def _outcome(self, invocation: asyncio.Future[Any]) -> RunResult:
        try:
            final = await invocation
        except BudgetExhaustedError as error:
            return self._result(BUDGET, _counts(self.tools), [], error.message)
        except (GraphDrained, RunStoppedError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and self.stop.reason is None:
                raise
            reason = self.tools.gate.reason or str(error)
            return self._result(INTERRUPTED, _counts(self.tools), [], reason)
        if asked := final.get("__interrupt__"):
            return self._result(BUDGET, _counts(self.tools), [], _reason(asked, self.tools))
        progress = final["progress"]
        code = FAILURES if progress["failed"] else DONE
        return self._result(code, progress, final["aggregate"])

    def _result(
        self,
        code: int,
        progress: dict[str, Any],
        aggregate: list[dict[str, Any]],
        reason: str | None = None,
    ) -> RunResult:
        return RunResult(
            code, self.folder, self.run, 0.0, progress, aggregate, self.tools.simulated, reason
        )


def _reason(asked: Sequence[Interrupt], tools: RunTools) -> str:
    """Return what is exhausted, and what it would take to finish."""
    question: dict[str, Any] = asked[0].value
    needs = (f"{value:,} {name}" for name, value in question["total_to_finish"].items())
    to_finish = ", ".join(needs)
    reason = tools.gate.reason or question["why"]
    return reason + (f"; to finish it takes about {to_finish} in all" if to_finish else "")


def _stages(parts: dict[str, Any]) -> Any:
    return parts.get("v"), [part["of"] for part in parts["stages"]]


def _counts(tools: RunTools) -> dict[str, Any]:
    return tools.counts()


def cost_of_life(folder: RunFolder, run: RunIds, tools: OpenedRun) -> Cost:
    """Return what a run has cost by the end of a life, its earlier lives included; blocks.

    Raises:
        LedgerError: A book is damaged.
    """
    assert tools.journal is not None, "a run that was opened has one"
    recorded = {life: spent.amount for life, spent in tools.journal.spent.items()}
    doubt = Shelf(folder.budget, run).doubt(recorded)
    return Cost(tools.journal.total(), tools.progress.held, doubt, tools.priced)
