"""One session of a run: open it, invoke the graph, return a result."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.types import Interrupt
from rich.console import Console

from ..backends.batch.files import BatchFolder, describe_open_batches
from ..backends.budget.cost import Cost
from ..backends.budget.price import read_price
from ..backends.budget.spend_log import open_spend_logs
from ..backends.budget.tokens import LIKELY_SHARE, estimate_prompt_tokens
from ..backends.cluster.walltime import Walltime
from ..backends.core.errors import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    BudgetExhaustedError,
    FanfoldError,
    InvalidItemError,
    JournalError,
    RunStoppedError,
)
from ..backends.core.terminal import count_nouns
from ..backends.core.types import Shard
from ..backends.discovery.connect import make_fleet_policy
from ..backends.storage.journal_file import RunIds
from ..backends.storage.run_folder import RunFolder, get_run_ids, utc_timestamp
from ..configs.loader import LoadedConfig
from ..nodes.shard.local import run_local_shard
from ..nodes.shard.remote import run_remote_shard
from .context import RunContext
from .map_reduce import MapReduce, get_run_graph
from .run.accounting import OpenRun
from .run.checkpoints import open_saver
from .run.estimate import count_nodes, limit_rates, make_run_plan, read_messages, sample_indices
from .run.forecast import Forecast, ItemStats, Range, RunPlan, forecast
from .run.monitor import show_progress
from .run.next_steps import FINISHED
from .run.noted_counts import count_for_list
from .run.prepare import ReadyRun, describe_session
from .run.run_result import RunResult
from .run.shard_plan import UNBOUNDED_STEPS
from .run.shutdown import Shutdown, handle_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one session of a run.

    Attributes:
        checkpointer: ``postgresql://…``, or None for SQLite in the run folder.
        trace: Run every item through LangGraph's engine.
        retry_failed: Retry failed items.
        quiet: Show no progress.
        deadline: End of the session, or None.
    """

    checkpointer: str | None = None
    trace: bool = False
    retry_failed: bool = False
    quiet: bool = False
    deadline: Walltime | None = None


async def execute_run(run: ReadyRun, options: RunOptions, console: Console) -> RunResult:
    """Run or resume a prepared run to its end, and record the session in its provenance.

    Signals and the deadline stop it: see :class:`~fanfold.graphs.run.shutdown.Shutdown`.

    Raises:
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        JournalError: A write failed; the message says how many items are safe.
        RunStoppedError: It was stopped while it was being opened.
    """
    with handle_signals(console) as stop, stop.stop_at_deadline(options.deadline), freeze_gc():
        return await run_session(run, options, console, stop)


async def run_session(
    run: ReadyRun,
    options: RunOptions,
    console: Console,
    stop: Shutdown,
    *,
    on_open: Callable[[OpenRun], None] | None = None,
) -> RunResult:
    """Run a session in the current event loop; the caller provides ``stop``.

    Args:
        run: The run.
        options: Options of this session.
        console: Console for progress.
        stop: Stops the session.
        on_open: Called once the run is open.
    """
    started = time.monotonic()
    folder = run.folder
    context = RunContext.from_loaded(
        run.loaded,
        out=str(folder.path),
        trace=options.trace,
        retry_failed=options.retry_failed,
    )
    async with AsyncExitStack() as stack:
        tools = await stop.open_unless_stopped(
            stack.enter_async_context(context.open_session_run(run, options.deadline))
        )
        if on_open is not None:
            on_open(tools)
        async with (
            add_saved_count(tools),
            record_session(folder, is_begun=run.is_begun) as (about, this),
        ):
            session = Session(run, about["run"], context, tools, options, console, stop)
            result = await session.run_graph()
            this["outcome"] = result.reason or FINISHED
            if run.resources is None:
                this["settings"] = await asyncio.to_thread(folder.digest_settings)
            this.update(exit_code=result.exit_code, **count_for_list(tools))
    if run.resources is not None:  # the pipeline reports what all of its runs have cost
        return replace(result, seconds=round(time.monotonic() - started, 3))
    budget = {} if tools.budget is None else tools.budget.report()
    cost = await asyncio.to_thread(compute_run_cost, folder, get_run_ids(about), tools)
    seconds = round(time.monotonic() - started, 3)
    batches = await asyncio.to_thread(BatchFolder(folder.batches).read)
    return replace(
        result,
        seconds=seconds,
        budget=budget,
        cost=cost,
        batch=run.loaded.config.batch,
        open_batches=tuple(describe_open_batches(batches)),
    )


@contextmanager
def freeze_gc() -> Iterator[None]:
    """Exclude the objects that are already loaded from garbage collection.

    About 200,000 objects of imported modules never become garbage, and each full collection
    that traverses them blocks the loop for more than 0.1 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@asynccontextmanager
async def add_saved_count(tools: OpenRun) -> AsyncIterator[None]:
    """Add the number of safe items to the message of a failed write."""
    try:
        yield
    except JournalError as error:
        if "items are safe" in error.message:
            raise
        safe, total = tools.progress.done + tools.progress.failed, tools.progress.total
        msg = f"{error.message}. {safe:,} of {total:,} items are safe; fix the cause, then resume"
        raise JournalError(msg) from error


@asynccontextmanager
async def record_session(
    folder: RunFolder, *, is_begun: bool = False
) -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Record the session in the run's provenance, at its start and at its end.

    Args:
        folder: The run's folder.
        is_begun: Whether the provenance has the start already.
    """

    def begin() -> tuple[dict[str, Any], dict[str, Any]]:
        about = folder.read_provenance()
        if is_begun:
            return about, about["sessions"].pop()
        this = describe_session(folder)
        folder.write_provenance(about | {"sessions": [*about["sessions"], this]})
        return about, this

    async def write() -> None:
        sessions = [*about["sessions"], this]
        await asyncio.to_thread(folder.write_provenance, about | {"sessions": sessions})

    about, this = await asyncio.to_thread(begin)
    this["outcome"] = "stopped by an error"
    try:
        yield about, this
    except BaseException:
        this["ended"] = utc_timestamp()
        try:
            await write()
        except JournalError as error:
            logger.warning("%s", error.message)  # the error that ended the run matters more
        raise
    this["ended"] = utc_timestamp()
    await write()


@dataclass(frozen=True, slots=True)
class Session:
    """One session of a run: its parts, and how it runs the graph.

    A level of an operator has no checkpoints: it has few steps, the journal has everything, and
    they would cost more than many of its questions.
    """

    run: ReadyRun
    run_id: str
    context: RunContext
    tools: OpenRun
    options: RunOptions
    console: Console
    stop: Shutdown

    async def run_graph(self) -> RunResult:
        """Run the graph until it ends or the session is stopped; return the result."""
        thread = RunnableConfig(
            configurable={"thread_id": self.run_id}, recursion_limit=UNBOUNDED_STEPS
        )
        async with show_progress(self.tools, self.console, self.options.quiet):
            if self.tools.is_level:
                return await self._invoke(get_run_graph(checkpointer=False), thread, resumed=False)
            file = self.run.folder.checkpoints
            async with open_saver(self.options.checkpointer, file) as saver:
                graph = get_run_graph(saver)
                result = await self._invoke(graph, thread, await self._can_resume(graph, thread))
                if result.exit_code not in {
                    EXIT_BUDGET,
                    EXIT_INTERRUPTED,
                } and not self._matches_journal(result):
                    result = await self._invoke(graph, thread, resumed=False)
                return result

    async def _can_resume(self, graph: MapReduce, thread: RunnableConfig) -> bool:
        """Return True if the last checkpoint is of an unfinished run with the same aggregators."""
        state = await graph.aget_state(thread)
        parts, empty = state.values.get("parts"), self.tools.aggregators.empty()
        return (
            bool(state.next)
            and not (self.run.reduce_changed or self.options.retry_failed)
            and (not parts or _stages(parts) == _stages(empty))
        )

    async def _invoke(self, graph: MapReduce, thread: RunnableConfig, resumed: bool) -> RunResult:
        """Resume from the last checkpoint, or fold all items again from the journal."""
        begin: Any = None if resumed else {}
        control = self.stop.control
        durability: Any = "sync" if graph.checkpointer else None
        invocation = asyncio.ensure_future(
            graph.ainvoke(
                begin, thread, context=self.context, durability=durability, control=control
            )
        )
        with self.stop.watch_work(self.tools.gate, invocation):
            return await self._outcome(invocation)

    def _matches_journal(self, result: RunResult) -> bool:
        """Return True if the fold and the journal have the same counts.

        They differ after resuming from a checkpoint that is older than the journal: failed items
        may have been retried in a session that kept its checkpoints in another saver.
        """
        counted = self.tools.progress
        found = result.progress
        return (found["done"], found["failed"]) == (counted.done, counted.failed)

    async def _outcome(self, invocation: asyncio.Future[Any]) -> RunResult:
        try:
            final = await invocation
        except BudgetExhaustedError as error:
            return self._result(EXIT_BUDGET, _counts(self.tools), [], error.message)
        except (GraphDrained, RunStoppedError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and self.stop.reason is None:
                raise
            reason = self.tools.gate.reason or str(error)
            return self._result(EXIT_INTERRUPTED, _counts(self.tools), [], reason)
        if interrupts := final.get("__interrupt__"):
            return self._result(
                EXIT_BUDGET, _counts(self.tools), [], _reason(interrupts, self.tools)
            )
        progress = final["progress"]
        code = EXIT_FAILURES if progress["failed"] else EXIT_DONE
        return self._result(code, progress, final["aggregate"])

    def _result(
        self,
        code: int,
        progress: dict[str, Any],
        aggregate: list[dict[str, Any]],
        reason: str | None = None,
    ) -> RunResult:
        return RunResult(
            code,
            self.run.folder,
            self.run_id,
            0.0,
            progress,
            aggregate,
            self.tools.simulated,
            reason,
        )


_UNITS: Final = {"usd": "USD", "node_hours": "node-hours"}
"""Limits whose name is no word."""


def _reason(interrupts: Sequence[Interrupt], tools: OpenRun) -> str:
    """Return which limit is exhausted, and the total required to finish."""
    question: dict[str, Any] = interrupts[0].value
    needs = (
        f"{value:,} {_UNITS.get(name, name)}" for name, value in question["total_to_finish"].items()
    )
    to_finish = ", ".join(needs)
    reason = tools.gate.reason or question["why"]
    left = tools.batches is not None and tools.batches.report().batches and tools.gate.left
    reason += f"; {left}" if left else ""
    return reason + (f"; finishing requires about {to_finish} in total" if to_finish else "")


def _stages(parts: dict[str, Any]) -> Any:
    return parts.get("v"), [part["of"] for part in parts["stages"]]


def _counts(tools: OpenRun) -> dict[str, Any]:
    return tools.progress_json()


def compute_run_cost(folder: RunFolder, run: RunIds, tools: OpenRun) -> Cost:
    """Return the cost of a run at the end of a session, including earlier sessions; blocks.

    Raises:
        JournalError: A spend log is damaged.
    """
    journal = tools.item_journal
    recorded = {name: spent.amount for name, spent in journal.usage_by_session.items()}
    doubt = open_spend_logs(folder, run).unaccounted(recorded)
    return Cost(journal.total_usage(), tools.progress.node_time, doubt, tools.is_priced)


@dataclass(frozen=True, slots=True)
class PilotResult:
    """Result of a pilot.

    Attributes:
        items: Items of the pilot.
        total: Items of the run, without those that it has taken over from another run.
        left: Items of the run that are not finished yet.
        done: Items of the pilot that were answered.
        failed: Items of the pilot that failed.
        stats: Measurements of its items; None if no model was called.
        plan: Requests of the whole run.
        forecast: Estimate for the whole run; None if no model was called.
        simulated: Whether the answers are simulated.
    """

    items: int
    total: int
    left: int
    done: int
    failed: int
    stats: ItemStats | None
    plan: RunPlan
    forecast: Forecast | None
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "items": self.items,
            "done": self.done,
            "failed": self.failed,
            "left": self.left,
            "seen": None if self.stats is None else self.stats.to_json(),
            "estimate": None if self.forecast is None else self.forecast.to_json(),
        }


async def run_pilot(
    run: ReadyRun, options: RunOptions, count: int, console: Console
) -> PilotResult:
    """Finish some items of a prepared run in a session; the next session finishes the others.

    Items that an earlier session has finished are not repeated, so a pilot can be repeated.

    Args:
        run: The run.
        options: Options of the session.
        count: Number of items, spread over the input.
        console: Console for progress.

    Raises:
        RunStoppedError: It was stopped, or cannot continue.
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        JournalError: A write failed.
    """
    folder, loaded = run.folder, run.loaded
    context = RunContext.from_loaded(loaded, out=str(folder.path), trace=options.trace)
    with handle_signals(console) as stop, stop.stop_at_deadline(options.deadline), freeze_gc():
        async with AsyncExitStack() as stack:
            opened = context.open_session_run(run, options.deadline)
            tools = await stop.open_unless_stopped(stack.enter_async_context(opened))
            async with add_saved_count(tools), record_session(folder) as (about, this):
                chosen = _choose_items(tools, count, about["input"]["digest"])
                async with show_progress(tools, console, options.quiet):
                    await _run_items(tools, chosen, stop, folder)
                this["outcome"] = f"pilot of {count_nouns(len(chosen), 'item')}; resumable"
                this.update(count_for_list(tools))
            return await asyncio.to_thread(_measure_pilot, tools, loaded, about, chosen)


def _choose_items(tools: OpenRun, count: int, seed: str) -> list[int]:
    """Return items spread over the input, without those that were taken over from another run."""
    journal = tools.item_journal
    asked = [index for index in range(len(tools.store)) if not journal.is_taken_over(index)]
    return [asked[at] for at in sample_indices(len(asked), count, seed)]


async def _run_items(
    tools: OpenRun, chosen: Sequence[int], stop: Shutdown, folder: RunFolder
) -> None:
    asking = asyncio.ensure_future(_run_each_item(tools, chosen, stop))
    with stop.watch_work(tools.gate, asking):
        try:
            await asking
        except asyncio.CancelledError:
            if stop.reason is None:
                raise
    if tools.gate.is_closed:
        raise _pilot_error(tools, folder)


def _pilot_error(tools: OpenRun, folder: RunFolder) -> Exception:
    """Return the error that ended a pilot early, with the command to resume."""
    error, again = tools.gate.error, f"fanfold resume {folder.path}"
    if isinstance(error, BudgetExhaustedError):
        caps = tools.budget.report() if tools.budget is not None else {}
        options = "".join(f" --budget-{name.replace('_', '-')} N" for name in caps)
        return BudgetExhaustedError(
            f"{error.message}. Resume with a higher limit: {again}{options}"
        )
    return error or RunStoppedError(f"{tools.gate.reason} during the pilot. Resume with: {again}")


async def _run_each_item(tools: OpenRun, chosen: Sequence[int], stop: Shutdown) -> None:
    """Finish the items, each as a separate shard."""

    async def one(index: int) -> None:
        position = tools.position(index)
        shard = Shard(position, position + 1)
        if tools.coordinator is None:
            await run_local_shard(shard, tools, lambda: stop.reason)
        else:
            await run_remote_shard(shard, tools, tools.coordinator, lambda: stop.reason)

    try:
        async with asyncio.TaskGroup() as group:
            for index in chosen:
                group.create_task(one(index))
    except* FanfoldError as errors:
        raise errors.exceptions[0] from None


def _measure_pilot(
    tools: OpenRun, loaded: LoadedConfig, about: dict[str, Any], chosen: Sequence[int]
) -> PilotResult:
    """Summarize the measurements of the items and estimate the run; blocks."""
    records = [tools.item_journal.read_record(index) for index in chosen]
    total = len(tools.store) - tools.item_journal.count_items().taken_over
    stats = ItemStats.from_records(records, total, "the pilot")
    items = total - about["input"]["invalid"]
    first = _first_prompts(tools, loaded, chosen, items)
    plan = make_run_plan(
        loaded.config,
        items,
        first,
        read_price(about),
        _nodes(tools, loaded),
    )
    policy = make_fleet_policy(loaded.config) if tools.fleet is None else tools.fleet.policy
    endpoints = () if tools.fleet is None else tools.fleet.endpoints
    plan = limit_rates(plan, loaded.config, policy, [endpoint.spec for endpoint in endpoints])
    done = sum(record["status"] == "done" for record in records)
    return PilotResult(
        items=len(records),
        total=total,
        left=len(tools.store) - tools.progress.done - tools.progress.failed,
        done=done,
        failed=len(records) - done,
        stats=stats,
        plan=plan,
        forecast=None if stats is None else forecast(plan, stats, own=True),
        simulated=tools.simulated,
    )


def _nodes(tools: OpenRun, loaded: LoadedConfig) -> int | None:
    fleet = tools.fleet
    own = fleet is not None and not fleet.policy.whole_answers  # a gateway's answers are whole
    endpoints = fleet.endpoints if fleet is not None and own else ()
    return count_nodes(loaded.config, [endpoint.url for endpoint in endpoints])


def _first_prompts(
    tools: OpenRun, loaded: LoadedConfig, chosen: Sequence[int], items: int
) -> Range:
    """Estimate the tokens of first prompts from their length, for servers that report none."""
    tokens = list[float]()
    prompt = loaded.config.parse_prompt()
    for index in chosen:
        (item,) = tools.store.read(index, index + 1)
        try:
            messages = read_messages(loaded.config, prompt, item.row)
        except InvalidItemError:
            continue
        tokens.append(estimate_prompt_tokens({"messages": messages}) * LIKELY_SHARE)
    return Range.from_sample(tokens, items)
