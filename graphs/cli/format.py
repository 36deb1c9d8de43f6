"""Format numbers, ranges, durations and forecasts for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ...backends.core.terminal import count_nouns

if TYPE_CHECKING:
    from ..run.forecast import Forecast, Range, RunPlan

_CENT: Final = 0.01


def format_usd_amount(amount: float) -> str:
    """Return an amount with two significant digits or more: ``$1,234.50``, ``$0.0032``."""
    if amount == 0 or amount >= 1:
        return f"${amount:,.2f}"
    if amount >= _CENT:
        return f"${amount:.3f}"
    return f"${amount:.2g}" if amount >= _CENT**3 else "$0.000001"


def format_duration(seconds: float) -> str:
    """Return a time in the largest units that fit: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 0.1:  # noqa: PLR2004 - from 0.1 s, one decimal is enough
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:  # noqa: PLR2004 - below 90 s, minutes are too coarse
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = round(seconds / 60)
    if minutes < 90:  # noqa: PLR2004 - as above
        return f"{minutes} min"
    if minutes >= 48 * 60:
        return f"{seconds / 3600:,.0f} h"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_range(span: Range, write: Callable[[float], str]) -> str:
    """Return a figure with its range, or the figure alone if the range is empty."""
    low, likely, high = map(write, (span.low, span.likely, span.high))
    return likely if low == high else f"{low} to {high}, likely {likely}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"  # noqa: PLR2004 - two digits


def format_whole(number: float) -> str:
    """Return a whole number."""
    return f"{number:,.0f}"


def cost_lines(found: Forecast, plan: RunPlan) -> Iterator[str]:
    """Yield a forecast of requests, tokens, dollars, time and node-hours."""
    yield f"requests: {_requests(found, plan)}"
    yield f"prompt tokens: {format_range(found.prompt, format_whole)}"
    if found.measured is None:
        most = format_whole(found.completion.high)
        at = f"answers of {plan.max_tokens:,}" + (" and every repair" if plan.repairs else "")
        yield f"completion tokens: at most {most} ({at})"
    else:
        yield f"completion tokens: {format_range(found.completion, format_whole)}"
    if found.usd is not None:
        if found.measured is None:
            low, high = map(format_usd_amount, (found.usd.low, found.usd.high))
            yield f"dollars: {low} to {high}"
        else:
            yield f"dollars: {format_range(found.usd, format_usd_amount)}"
    yield from _times(found, plan)


def _requests(found: Forecast, plan: RunPlan) -> str:
    if found.measured is not None:
        return format_range(found.requests, format_whole)
    low, high = format_whole(found.requests.low), format_whole(found.requests.high)
    return f"{low} to {high} (with every repair)" if plan.repairs else low


def _times(found: Forecast, plan: RunPlan) -> Iterator[str]:
    yield from _measured_times(found, plan)
    yield from _rate_lines(found, plan)


_RATE_LIMITS: Final = {
    "requests_per_s": "{:g} requests per second",
    "tokens_per_min": "{:,.0f} tokens per minute",
}
_SLOW: Final = 1.5
"""A run that limits slow down by this factor should be run in another way."""
_LONG_S: Final = 3600.0


def _rate_lines(found: Forecast, plan: RunPlan) -> Iterator[str]:
    """Yield how long a run takes under its rate limits, and what to do if that is long."""
    bound = found.rate_bound
    if bound is None:
        return
    name = _RATE_LIMITS[bound.limit].format(getattr(plan, bound.limit))
    if found.measured is None:
        low, high = format_duration(bound.seconds.low), format_duration(bound.seconds.high)
        yield f"time under the limit of {name}: {low} to {high}"
    else:
        yield f"time under the limit of {name}: {format_range(bound.seconds, format_duration)}"
    most = plan.most_in_flight
    if most is not None and most < min(plan.streams, plan.items):
        yield (
            f"requests in flight under this limit: {most:,} at most, because each one reserves "
            f"about {plan.reserved:,.0f} tokens (prompt and max_tokens) until it is answered; a "
            "lower model.max_tokens allows more"
        )
    slow = bound.slowdown is not None and bound.slowdown >= _SLOW
    long = bound.slowdown is None and bound.seconds.likely >= _LONG_S
    factor = "" if bound.slowdown is None else f" ({bound.slowdown:.1f} times as long as without)"
    if plan.is_gateway and (slow or long):
        yield (
            f"advice: this limit decides how long the run takes{factor}; the gateway's batch mode "
            "and model servers of your own on nodes do not have it (docs/first.md)"
        )
    elif slow:
        yield f"advice: this limit decides how long the run takes{factor}; raise it if you may"


def _measured_times(found: Forecast, plan: RunPlan) -> Iterator[str]:
    streams = f"{min(plan.streams, max(1, plan.items)):,} streams"
    if found.seconds is None:
        yield (
            "time: unknown without a measured latency; use 'fanfold run --pilot 20', or --like DIR"
        )
        return
    likely, high = format_duration(found.seconds.likely), format_duration(found.seconds.high)
    yield f"time at {streams}: {likely} at the measured latency, {high} at most"
    if found.node_hours is not None and plan.nodes is not None:
        nodes = count_nouns(plan.nodes, "node")
        yield f"node-hours: {format_range(found.node_hours, _hours)} on {nodes}"


def budget_lines(found: Forecast, plan: RunPlan) -> Iterator[str]:
    """Yield how much of the run the budget covers."""
    if not plan.caps.has_any:
        yield "budget: none"
        return
    for cap in found.unknown_limits:
        yield f"budget.{cap}: cannot be estimated yet ({_missing(cap, plan)})"
    if found.budget_reach is not None:
        yield f"budget: {format_budget_reach(found)}"


def _missing(cap: str, plan: RunPlan) -> str:
    if cap == "usd" and plan.price is None:
        return "the price is unknown"
    needs = {"usd": "node-hours require a time", "node_hours": "requires a time and the nodes"}
    return needs.get(cap, "no measurements")


def format_budget_reach(found: Forecast) -> str:
    """Return which share of the items the budget covers; requires a budget."""
    assert found.budget_reach is not None
    cap, worst, share = (
        found.budget_reach.limit,
        found.budget_reach.worst_limit,
        found.budget_reach.share,
    )
    binds = f"limited by budget.{cap}"
    binds += f", in the worst case by budget.{worst}" if worst != cap else ""
    if share.low >= 1:
        spare = 100 / share.low
        return f"covers all items; needs at most {spare:.0f} % of budget.{cap}, the tightest limit"
    low, likely, high = (_percent(value) for value in (share.low, share.likely, share.high))
    if found.measured is None:
        if share.high < 1:
            return f"covers {low} to {high} % of the items; {binds}"
        return f"covers at least {low} % of the items, all of them if answers are short; {binds}"
    if share.likely >= 1:
        return f"likely covers all items, at least {low} %; tightest limit: budget.{cap}"
    span = "" if low == high else f" ({low} to {high} %)"
    return f"covers about {likely} % of the items{span}; {binds}"


def _percent(share: float) -> str:
    """Return a share in per cent; only a full share becomes 100."""
    if share >= 1:
        return "100"
    value = min(99.0, 100 * share)
    return f"{value:.0f}" if value >= 1 else f"{value:.1g}"


def describe_items(items: int, samples: int) -> str:
    """Return the number of items, and how many of them each row has if it is not one."""
    if samples == 1:
        return count_nouns(items, "item")
    rows = count_nouns(items // samples, "row")
    return f"{count_nouns(items, 'item')} ({rows}, {samples:,} samples of each)"


_NAMED: Final = 10
"""Skipped items that one line names."""


def input_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield which rows of the input are skipped, and how many items are invalid.

    Args:
        found: The entry ``input`` of a provenance.
    """
    if skipped := found["skipped"]:
        names = ", ".join(one["id"] for one in skipped[:_NAMED])
        more = ", …" if len(skipped) > _NAMED else ""
        yield f"skipped {found['skipped_total']:,}: {names}{more}"
        yield f"  {skipped[0]['id']}: {skipped[0]['reason']}; all reasons: provenance.json"
    if found["invalid"]:
        yield f"{count_nouns(found['invalid'], 'invalid item')} will fail without a call"
