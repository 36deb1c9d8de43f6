"""Figures that are not known exactly, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from ..forecast import Forecast, Plan
from ..spans import Span

_CENT: Final = 0.01


def dollars(amount: float) -> str:
    """Return an amount with as many digits as it deserves: ``$1,234.50``, ``$0.0032``."""
    if amount == 0 or amount >= 1:
        return f"${amount:,.2f}"
    if amount >= _CENT:
        return f"${amount:.3f}"
    return f"${amount:.2g}" if amount >= _CENT**3 else "$0.000001"


def duration(seconds: float) -> str:
    """Return a time in the largest units that fit: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 0.1:  # noqa: PLR2004 - a tenth of a second has digits enough
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:  # noqa: PLR2004 - below, minutes say too little
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = round(seconds / 60)
    if minutes < 90:  # noqa: PLR2004 - as above
        return f"{minutes} min"
    if minutes >= 48 * 60:
        return f"{seconds / 3600:,.0f} h"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def spanned(span: Span, write: Callable[[float], str]) -> str:
    """Return a figure with its range, or alone where the range says nothing."""
    low, likely, high = map(write, (span.low, span.likely, span.high))
    return likely if low == high else f"{low} to {high}, likely {likely}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"  # noqa: PLR2004 - two digits


def whole(number: float) -> str:
    """Return a whole number."""
    return f"{number:,.0f}"


def cost_lines(found: Forecast, plan: Plan) -> Iterator[str]:
    """Yield what a run takes: requests, tokens, dollars, time, node-hours."""
    yield f"requests: {_requests(found, plan)}"
    yield f"prompt tokens: {spanned(found.prompt, whole)}"
    if found.measured is None:
        most = whole(found.completion.high)
        at = f"answers of {plan.max_tokens:,}" + (" and every repair" if plan.repairs else "")
        yield f"completion tokens: at most {most} ({at})"
    else:
        yield f"completion tokens: {spanned(found.completion, whole)}"
    if found.usd is not None:
        if found.measured is None:
            yield f"dollars: {dollars(found.usd.low)} to {dollars(found.usd.high)}"
        else:
            yield f"dollars: {spanned(found.usd, dollars)}"
    yield from _times(found, plan)


def _requests(found: Forecast, plan: Plan) -> str:
    if found.measured is not None:
        return spanned(found.requests, whole)
    low, high = whole(found.requests.low), whole(found.requests.high)
    return f"{low} to {high} (with every repair)" if plan.repairs else low


def _times(found: Forecast, plan: Plan) -> Iterator[str]:
    streams = f"{min(plan.streams, max(1, plan.items)):,} streams"
    if found.seconds is None:
        yield (
            "time: not known without a latency; 'fanfold run --pilot 20', or --like DIR "
            "of a run alike, tells it"
        )
        return
    likely, high = duration(found.seconds.likely), duration(found.seconds.high)
    yield f"time at {streams}: {likely} if latency stays as seen, {high} at most"
    if found.node_hours is not None and plan.nodes is not None:
        nodes = f"{plan.nodes:,} node{'s' if plan.nodes > 1 else ''}"
        yield f"node-hours: {spanned(found.node_hours, _hours)} on {nodes}"


def budget_lines(found: Forecast, plan: Plan) -> Iterator[str]:
    """Yield whether the budget carries the run."""
    if not plan.caps.any:
        yield "budget: none"
        return
    for cap in found.unknown:
        yield f"budget.{cap}: nothing can be said yet ({_missing(cap)})"
    if found.carried is not None:
        yield f"budget: {carried(found)}"


def _missing(cap: str) -> str:
    needs = {"usd": "node-hours need a time", "node_hours": "it needs a time, and the nodes"}
    return needs.get(cap, "nothing is known of it")


def carried(found: Forecast) -> str:
    """Return how far the budget reaches, in words; there must be one."""
    assert found.carried is not None
    cap, worst, share = found.carried.cap, found.carried.worst, found.carried.share
    name, binds = f"budget.{cap}", f"budget.{cap} binds"
    binds += f", at worst budget.{worst}" if worst != cap else ""
    if share.low >= 1:
        spare = 100 / share.low
        return f"carries all items; {name} is nearest, {spare:.0f} % of it at most are needed"
    low, likely, high = (_percent(value) for value in (share.low, share.likely, share.high))
    if found.measured is None:
        if share.high < 1:
            return f"carries {low} to {high} % of the items; {binds}"
        return f"carries at least {low} % of the items, all of them if answers are short; {binds}"
    if share.likely >= 1:
        return f"likely carries all items, at least {low} %; {name} is nearest"
    span = "" if low == high else f" ({low} to {high} %)"
    return f"carries about {likely} % of the items{span}; {binds}"


def _percent(share: float) -> str:
    """Return a share in per cent, never rounded up to all."""
    if share >= 1:
        return "100"
    value = min(99.0, 100 * share)
    return f"{value:.0f}" if value >= 1 else f"{value:.1g}"
