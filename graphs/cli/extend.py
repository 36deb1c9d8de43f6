"""``fanfold run --from``: the plan of an extended run or pipeline, shown before any call."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...backends.core.errors import ConfigurationError, FanfoldError
from ...backends.core.money import NANO_PER_USD, Amount
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import RunFolder
from ...configs.loader import LoadedConfig
from ..run.console import print_messages
from ..run.extend import ExtensionPlan
from ..run.extend_pipeline import PipelinePlan
from ..run.pipeline import Stage, list_stages
from ..run.stage_estimate import ServedModel, StageEstimate, estimate_stages, measure_rows
from .format import budget_lines, cost_lines, format_usd_amount


def plan_lines(plan: ExtensionPlan) -> Iterator[str]:
    """Yield what a run takes over, asks and drops, and what the asked items may cost."""
    mark = "SIMULATED: " if plan.simulated else ""
    yield f"{mark}extends run {plan.run} in {plan.path}"
    if plan.only is not None:
        yield f"  only items with: {plan.only}"
    yield from _count_lines(plan)
    yield from _estimate_lines(plan)


def _count_lines(plan: ExtensionPlan) -> Iterator[str]:
    failed = f", {plan.failed:,} failed" if plan.failed else ""
    yield f"  kept, at no cost: {plan.done:,} done{failed}"
    reasons = {
        "not in that run": plan.new,
        "with another question": plan.changed,
        "not finished there": plan.unfinished,
        "finished there and asked again": plan.again,
    }
    parts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    yield f"  asked: {plan.asked:,}{f' ({parts})' if parts else ''}"
    if plan.invalid:
        yield f"  invalid, fail without a call: {plan.invalid:,}"
    if plan.dropped:
        yield f"  dropped, of that run but not in this one: {plan.dropped:,}"


def _estimate_lines(plan: ExtensionPlan) -> Iterator[str]:
    if plan.forecast is not None and plan.plan is not None:
        found = plan.forecast
        like = f", as in {found.measured}" if found.measured else ""
        yield f"estimate for what is asked{like}:"
        for line in (*cost_lines(found, plan.plan), *budget_lines(found, plan.plan)):
            yield f"  {line}"


def pipeline_plan_lines(plan: PipelinePlan, loaded: LoadedConfig) -> Iterator[str]:
    """Yield what a pipeline takes over and asks, as far as it is known before its first call."""
    mark = "SIMULATED: " if plan.simulated else ""
    yield f"{mark}extends pipeline {plan.run} in {plan.path}"
    stages = list_stages(loaded, Path())
    later = stages
    if plan.first is not None:
        yield f"stage {stages[0].name}:"
        yield from _count_lines(plan.first)
        yield from _estimate_lines(plan.first)
        later = stages[1:]
    if later:
        yield "answers to the same questions are taken over later, as far as earlier answers agree:"
    for stage in later:
        count = plan.answers[stage.name]
        there = "that pipeline has no such stage"
        yield f"  stage {stage.name}: {there if count is None else f'{count:,} answers there'}"
    estimate = _estimate_most(plan, stages)
    most = [one for one in estimate if one.stage in later]
    if most:
        total = Amount()
        for one in most:
            total = total.plus(one.amount)
        usd = total.nano_usd / NANO_PER_USD
        dollars = f", {format_usd_amount(usd)}" if usd else ""
        requests = count_nouns(total.requests, "request")
        yield f"  if none is: at most {requests}, {total.tokens:,} tokens{dollars}"


def _estimate_most(plan: PipelinePlan, stages: Sequence[Stage]) -> list[StageEstimate]:
    items, tokens = measure_rows(plan.items)
    served = ServedModel(plan.model, plan.simulated)
    models = dict.fromkeys((stage.name for stage in stages), served)
    return list(estimate_stages(stages, items, tokens, models))


def is_interactive() -> bool:
    """Return True if stdin and stderr are terminals, so that a question can be answered."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def check_ask_again(
    folder: RunFolder, known: Mapping[str, Any] | None, ask_again: str | None
) -> None:
    """Check that an existing extension was begun with the given choice of items to ask again.

    Args:
        folder: Its folder.
        known: What its provenance says of the run that it extends, or None.
        ask_again: The choice; None takes that of the extension.

    Raises:
        ConfigurationError: It was begun with another one.
    """
    if known is None or ask_again is None or known.get("ask_again", ask_again) == ask_again:
        return
    begun = "without --ask-again"
    if known["ask_again"] is not None:
        begun = f"with --ask-again {known['ask_again']}"
    msg = f"{folder.path}: this run exists and was begun {begun}; choose another --out"
    raise ConfigurationError(msg)


def make_confirmation(yes: bool, interactive: bool) -> Callable[[ExtensionPlan], Awaitable[None]]:
    """Return a function that shows a plan and asks whether to go on.

    Args:
        yes: Go on without asking.
        interactive: Whether there is a terminal to ask on.
    """

    async def confirm(plan: ExtensionPlan) -> None:
        print_messages(plan_lines(plan))
        if plan.asked and not yes:
            await _ask(interactive, f"{plan.asked:,} to ask")

    return confirm


def make_pipeline_confirmation(
    loaded: LoadedConfig, yes: bool, interactive: bool
) -> Callable[[PipelinePlan], Awaitable[None]]:
    """Return a function that shows the plan of a pipeline and asks whether to go on.

    Args:
        loaded: The settings of the pipeline.
        yes: Go on without asking.
        interactive: Whether there is a terminal to ask on.
    """

    async def confirm(plan: PipelinePlan) -> None:
        print_messages(await asyncio.to_thread(list, pipeline_plan_lines(plan, loaded)))
        if not yes:
            await _ask(interactive, "what later stages ask depends on the answers")

    return confirm


async def _ask(interactive: bool, what: str) -> None:
    """Ask whether the run may begin; return if it may.

    Raises:
        ConfigurationError: There is no terminal to ask on.
        FanfoldError: The answer is no.
    """
    if not interactive:
        msg = "no terminal to ask on; nothing was written: add --yes to begin"
        raise ConfigurationError(msg)
    sys.stderr.write(f"Continue? {what} [y/N] ")
    sys.stderr.flush()
    if (await _read_line()).strip().casefold() not in {"y", "yes"}:
        raise FanfoldError("declined; nothing was written")


async def _read_line() -> str:
    """Return a line from the terminal; a signal ends the wait, unlike with a blocking read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline()
