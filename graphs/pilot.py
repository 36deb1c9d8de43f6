"""The first life of a run that begins with a pilot: some items, spread over the input."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..backends.budget.pricing import kept_price
from ..backends.budget.tokens import LIKELY, prompt_tokens
from ..backends.core.errors import (
    BudgetExhaustedError,
    FanfoldError,
    InvalidItemError,
    RunStoppedError,
)
from ..backends.core.templates import Template
from ..backends.core.types import Shard
from ..backends.storage.run_folder import RunFolder
from ..configs.loader import Loaded
from ..nodes.context import RunTools
from ..nodes.item.prepare import asked
from ..nodes.shard.local import work
from ..nodes.shard.remote import work_elsewhere
from .context import RunContext
from .run.estimate import nodes_of, plan_of, spread
from .run.forecast import Forecast, Plan, Seen, Span, forecast
from .run.monitor import watching
from .run.open_run import OpenedRun
from .run.shutdown import Stop, stoppable
from .session import RunOptions, counted, noted, spared_modules


@dataclass(frozen=True, slots=True)
class Piloted:
    """How a pilot went.

    Attributes:
        items: Its items.
        total: Items of the run.
        left: Items of the run that have not ended yet.
        done: Items of the pilot that were answered.
        failed: Items of the pilot that failed.
        seen: What they took; None when none of them was asked.
        plan: What the whole run asks.
        forecast: What it will take, going by the pilot; None when none of it was asked.
        simulated: Whether the answers are simulated.
    """

    items: int
    total: int
    left: int
    done: int
    failed: int
    seen: Seen | None
    plan: Plan
    forecast: Forecast | None
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "items": self.items,
            "done": self.done,
            "failed": self.failed,
            "left": self.left,
            "seen": None if self.seen is None else self.seen.to_json(),
            "estimate": None if self.forecast is None else self.forecast.to_json(),
        }


async def fly(
    folder: RunFolder, loaded: Loaded, options: RunOptions, count: int, console: Console
) -> Piloted:
    """Finish some items of a prepared run, as a life of it; the next one asks the others.

    Items that an earlier life has finished are not asked again, so that a pilot can be repeated.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        options: How the run goes.
        count: Items to ask, spread over the input.
        console: Where to show what goes on.

    Raises:
        RunStoppedError: It was stopped, or cannot go on.
        ConfigurationError: The endpoints do not fit the run, or another process works on it.
        LedgerError: Something could not be written.
    """
    context = RunContext.of(loaded, out=str(folder.path), trace=options.trace)
    with stoppable(console) as stop, stop.ending(options.end), spared_modules():
        async with AsyncExitStack() as stack:
            opened = context.open_named(options.end)
            tools = await stop.opening(stack.enter_async_context(opened))
            async with counted(tools), noted(folder) as (about, this):
                chosen = spread(len(tools.store), count, about["input"]["digest"])
                async with watching(tools, console, options.quiet):
                    await _ask(tools, chosen, stop, folder)
                this["outcome"] = f"pilot of {len(chosen):,} items; resumable"
            return await asyncio.to_thread(_measured, tools, loaded, about, chosen)


async def _ask(tools: RunTools, chosen: Sequence[int], stop: Stop, folder: RunFolder) -> None:
    asking = asyncio.ensure_future(_each(tools, chosen, stop))
    with stop.working(tools.gate, asking):
        try:
            await asking
        except asyncio.CancelledError:
            if stop.reason is None:
                raise
    if tools.gate.closed:
        raise _ended(tools, folder)


def _ended(tools: RunTools, folder: RunFolder) -> Exception:
    """Return why a pilot was not flown to its end, and how to go on."""
    error, again = tools.gate.error, f"fanfold resume {folder.path}"
    if isinstance(error, BudgetExhaustedError):
        caps = tools.budget.report() if tools.budget is not None else {}
        options = "".join(f" --budget-{name.replace('_', '-')} N" for name in caps)
        return BudgetExhaustedError(f"{error.message}. Go on with a higher total: {again}{options}")
    return error or RunStoppedError(f"{tools.gate.reason} during the pilot. Go on with: {again}")


async def _each(tools: RunTools, chosen: Sequence[int], stop: Stop) -> None:
    """Finish the items, each as a shard of its own."""

    async def one(index: int) -> None:
        shard = Shard(index, index + 1)
        if tools.crew is None:
            await work(shard, tools, lambda: stop.reason)
        else:
            await work_elsewhere(shard, tools, tools.crew, lambda: stop.reason)

    try:
        async with asyncio.TaskGroup() as group:
            for index in chosen:
                group.create_task(one(index))
    except* FanfoldError as errors:
        raise errors.exceptions[0] from None


def _measured(
    tools: RunTools, loaded: Loaded, about: dict[str, Any], chosen: Sequence[int]
) -> Piloted:
    """Sum up what the items took, and foretell the run; blocks."""
    records = [tools.ledger.record(index) for index in chosen]
    total = len(tools.store)
    seen = Seen.of(records, total, "the pilot")
    items = total - about["input"]["invalid"]
    first = _first_prompts(tools, loaded, chosen, items)
    plan = plan_of(loaded.config, items, first, kept_price(about), _nodes(tools, loaded))
    done = sum(record["status"] == "done" for record in records)
    return Piloted(
        items=len(records),
        total=total,
        left=total - tools.progress.done - tools.progress.failed,
        done=done,
        failed=len(records) - done,
        seen=seen,
        plan=plan,
        forecast=None if seen is None else forecast(plan, seen, own=True),
        simulated=tools.simulated,
    )


def _nodes(tools: RunTools, loaded: Loaded) -> int | None:
    fleet = tools.fleet if isinstance(tools, OpenedRun) else None
    own = fleet is not None and not fleet.policy.whole_answers  # a gateway's are whole
    endpoints = fleet.endpoints if fleet is not None and own else ()
    return nodes_of(loaded.config, [endpoint.url for endpoint in endpoints])


def _first_prompts(tools: RunTools, loaded: Loaded, chosen: Sequence[int], items: int) -> Span:
    """Return the tokens of first prompts by length, for servers that report none."""
    task, tokens = loaded.config.task, list[float]()
    prompt = Template.parse(task.prompt)
    for index in chosen:
        (item,) = tools.store.read(index, index + 1)
        try:
            messages = asked(task.system, prompt, item.row)
        except InvalidItemError:
            continue
        tokens.append(prompt_tokens({"messages": messages}) * LIKELY)
    return Span.mean(tokens, items)
