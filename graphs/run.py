"""One life of a run: from an open folder to its end, whatever end that is."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.runtime import RunControl
from rich.console import Console

from ..backends.accounts.folder import RunFolder, now
from ..backends.contract.errors import RunStoppedError
from ..configs.load import Loaded
from ..nodes.context import RunTools
from .context import RunContext
from .live import watching
from .map_reduce import MapReduce, build
from .prepare import life
from .saver import open_saver

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

    Raises:
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        LedgerError: An item could not be recorded.
    """
    about = await asyncio.to_thread(folder.read_provenance)
    this = await asyncio.to_thread(life)
    started = time.monotonic()
    context = RunContext.of(loaded, trace=options.trace, retry_failed=options.retry_failed)
    outcome = "stopped by an error"
    async with context.opened(str(folder.path)) as tools:
        await _note(folder, about, this)
        try:
            result = await _invoke(folder, about["run"], context, tools, options, console)
            outcome = result.reason or "finished"
        finally:
            await _note(folder, about, this | {"ended": now(), "outcome": outcome})
    return _timed(result, time.monotonic() - started)


async def _note(folder: RunFolder, about: dict[str, Any], this: dict[str, Any]) -> None:
    lives = [*about["lives"], this]
    await asyncio.to_thread(folder.write_provenance, about | {"lives": lives})


def _timed(result: RunResult, seconds: float) -> RunResult:
    return RunResult(
        result.code,
        result.folder,
        result.run,
        round(seconds, 3),
        result.progress,
        result.aggregate,
        result.simulated,
        result.reason,
    )


async def _invoke(  # noqa: PLR0913 - the parts of one life, used here alone
    folder: RunFolder,
    run: str,
    context: RunContext,
    tools: RunTools,
    options: RunOptions,
    console: Console,
) -> RunResult:
    control = RunControl()
    thread: RunnableConfig = {"configurable": {"thread_id": run}}
    async with open_saver(options.checkpointer, folder.checkpoints) as saver:
        graph = build(context).compile(checkpointer=saver)
        begin = await _beginning(graph, thread, folder, options)
        invocation = asyncio.ensure_future(
            graph.ainvoke(begin, thread, context=context, durability="sync", control=control)
        )
        async with watching(tools, console, options.quiet):
            with _signals(tools, control, invocation, console):
                try:
                    final = await invocation
                except (GraphDrained, RunStoppedError, asyncio.CancelledError) as error:
                    if isinstance(error, asyncio.CancelledError) and not tools.gate.closed:
                        raise
                    reason = tools.gate.reason or str(error)
                    return RunResult(
                        INTERRUPTED, folder, run, 0.0, _counts(tools), [], tools.simulated, reason
                    )
    progress = final["progress"]
    code = FAILURES if progress["failed"] else DONE
    return RunResult(code, folder, run, 0.0, progress, final["aggregate"], tools.simulated)


async def _beginning(
    graph: MapReduce, thread: RunnableConfig, folder: RunFolder, options: RunOptions
) -> Any:
    """Return the graph's input: None goes on from the last checkpoint."""
    state = await graph.aget_state(thread)
    if state.next and not options.anew and not options.retry_failed:
        return None
    return {"folder": str(folder.path)}


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


@contextmanager
def _signals(
    tools: RunTools, control: RunControl, invocation: asyncio.Future[Any], console: Console
) -> Iterator[None]:
    """On SIGINT or SIGTERM take no more items and let those in flight end; at once on a second."""
    loop = asyncio.get_running_loop()

    def stop(name: str) -> None:
        if tools.gate.closed:
            invocation.cancel()
            return
        flying = tools.gate.in_flight
        tools.gate.close(name)
        control.request_drain(name)
        console.print(f"{name}: waiting for {flying} items in flight; once more stops at once")

    handled: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        handled.append((number, signal.getsignal(number)))
        loop.add_signal_handler(number, stop, number.name)
    try:
        yield
    finally:
        for number, handler in handled:
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
