"""``fanfold run --from``: the plan of an extended run, shown before anything is asked."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator

from ...backends.core.errors import ConfigurationError, FanfoldError
from ..run.console import print_messages
from ..run.extend import ExtensionPlan
from .format import budget_lines, cost_lines


def plan_lines(plan: ExtensionPlan) -> Iterator[str]:
    """Yield what a run takes over, asks and drops, and what the asked items may cost."""
    mark = "SIMULATED: " if plan.simulated else ""
    yield f"{mark}extends run {plan.run} in {plan.path}"
    if plan.only is not None:
        yield f"  only items with: {plan.only}"
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
    if plan.forecast is not None and plan.plan is not None:
        found = plan.forecast
        like = f", as in {found.measured}" if found.measured else ""
        yield f"estimate for what is asked{like}:"
        for line in (*cost_lines(found, plan.plan), *budget_lines(found, plan.plan)):
            yield f"  {line}"


def make_confirmation(yes: bool, interactive: bool) -> Callable[[ExtensionPlan], Awaitable[None]]:
    """Return a function that shows a plan and asks whether to go on.

    Args:
        yes: Go on without asking.
        interactive: Whether there is a terminal to ask on.
    """

    async def confirm(plan: ExtensionPlan) -> None:
        """Show a plan; return if the run may begin.

        Raises:
            ConfigurationError: There is no terminal to ask on.
            FanfoldError: The answer is no.
        """
        print_messages(plan_lines(plan))
        if yes or not plan.asked:
            return
        if not interactive:
            msg = "no terminal to ask on; nothing was written: add --yes to begin"
            raise ConfigurationError(msg)
        sys.stderr.write(f"Continue? {plan.asked:,} to ask [y/N] ")
        sys.stderr.flush()
        if (await _read_line()).strip().casefold() not in {"y", "yes"}:
            raise FanfoldError("declined; nothing was written")

    return confirm


async def _read_line() -> str:
    """Return a line from the terminal; a signal ends the wait, unlike with a blocking read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline()
