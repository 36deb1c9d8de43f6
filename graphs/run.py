"""One life of a run: from an open folder to its end, whatever end that is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from rich.console import Console

from ..backends.accounts.folder import RunFolder, now
from ..backends.contract.errors import LedgerError, RunStoppedError
from ..configs.load import Loaded
from ..nodes.context import RunTools
from .context import RunContext
from .live import watching
from .map_reduce import MapReduce, build
from .prepare import life
from .saver import open_saver
from .stopping import Stop, stoppable

logger = logging.getLogger(__name__)

DONE, OTHER, USAGE, FAILURES, INTERRUPTED = 0, 1, 2, 3, 5
"""Exit codes: all done; anything else; wrong usage or settings; some items failed; resumable."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one life of a run goes.

    Attributes:
        checkpointer: ``postgresql://…``, or None for SQLite in the run folder.
        trace: Run every item by LangGraph's engine.
        retry_failed: Ask failed items again.
        anew: Fold from the first item instead of from the last checkpoint.
        quiet: Show no progress.
    """

    checkpointer: str | None = None
    trace: bool = False
    retry_failed: bool = False
    anew: bool = False
    quiet: bool = False


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
    """

    code: int
    folder: RunFolder
    run: str
    seconds: float
    progress: dict[str, Any]
    aggregate: list[dict[str, Any]]
    simulated: bool
    reason: str | None = None


async def execute(
    folder: RunFolder, loaded: Loaded, options: RunOptions, console: Console
) -> RunResult:
    """Run or resume a prepared run to its end, and note this life in its provenance.

    SIGINT and SIGTERM stop it: see :class:`~fanfold.graphs.stopping.Stop`.

    Raises:
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        LedgerError: Something could not be written; says how many items are safe.
        RunStoppedError: It was stopped while it was being opened.
    """
    started = time.monotonic()
    context = RunContext.of(loaded, trace=options.trace, retry_failed=options.retry_failed)
    with stoppable(console) as stop:
        async with AsyncExitStack() as stack:
            opened = context.opened(str(folder.path))
            tools = await stop.opening(stack.enter_async_context(opened))
            async with _counted(tools), _noted(folder) as (about, this):
                life = _Life(folder, about["run"], context, tools, options, console, stop)
                result = await life.lived()
                this["outcome"] = result.reason or "finished"
    return replace(result, seconds=round(time.monotonic() - started, 3))


@asynccontextmanager
async def _counted(tools: RunTools) -> AsyncIterator[None]:
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
async def _noted(folder: RunFolder) -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Note this life in the run's provenance, at its begin and at its end."""
    about, this = await asyncio.to_thread(lambda: (folder.read_provenance(), life()))

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
        thread: RunnableConfig = {"configurable": {"thread_id": self.run}}
        async with open_saver(self.options.checkpointer, self.folder.checkpoints) as saver:
            graph = build(self.context).compile(checkpointer=saver)
            begin = await self._beginning(graph, thread)
            control = self.stop.control
            invocation = asyncio.ensure_future(
                graph.ainvoke(
                    begin, thread, context=self.context, durability="sync", control=control
                )
            )
            async with watching(self.tools, self.console, self.options.quiet):
                with self.stop.working(self.tools.gate, invocation):
                    return await self._outcome(invocation)

    async def _beginning(self, graph: MapReduce, thread: RunnableConfig) -> Any:
        """Return the graph's input: None goes on from the last checkpoint."""
        state = await graph.aget_state(thread)
        if state.next and not self.options.anew and not self.options.retry_failed:
            return None
        return {"folder": str(self.folder.path)}

    async def _outcome(self, invocation: asyncio.Future[Any]) -> RunResult:
        try:
            final = await invocation
        except (GraphDrained, RunStoppedError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and self.stop.reason is None:
                raise
            reason = self.tools.gate.reason or str(error)
            return self._result(INTERRUPTED, _counts(self.tools), [], reason)
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
        simulated = self.tools.simulated
        return RunResult(code, self.folder, self.run, 0.0, progress, aggregate, simulated, reason)


def _counts(tools: RunTools) -> dict[str, Any]:
    progress = tools.progress
    return {
        "items": progress.total,
        "done": progress.done,
        "failed": progress.failed,
        "requests": progress.requests,
        "tokens": {"prompt": progress.prompt_tokens, "completion": progress.completion_tokens},
        "simulated": tools.simulated,
    }
