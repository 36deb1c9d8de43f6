"""The command ``run --pilot``: some items first, then a question, then the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ...backends.core.money import NANO
from ..pilot import Piloted
from .format import budget_lines, cost_lines, dollars, duration


def pilot_lines(found: Piloted) -> Iterator[str]:
    """Yield what a pilot measured, and what the run will take going by it."""
    kind = "SIMULATED: " if found.simulated else ""
    seen = found.seen
    yield (
        f"{kind}pilot: {found.items:,} of {found.total:,} items, spread over the input: "
        f"{found.done:,} done, {found.failed:,} failed"
    )
    if seen is None or found.forecast is None:
        yield "  no model was asked for any of them"
        return
    for name, count in sorted(seen.failed.items(), key=lambda pair: -pair[1]):
        yield f"  {count:,} x {name}"
    if seen.unreported:
        yield f"  tokens of {seen.unreported:,} items were not reported"
    usage = seen.usage
    requests = round(seen.requests.likely * seen.items)
    yield (
        f"  {requests:,} requests, {usage.prompt or 0:,} prompt + {usage.completion or 0:,} "
        "completion tokens"
    )
    if lost := round(seen.lost.likely * seen.items):
        yield f"  {lost:,} tokens of requests without an answer may have been paid as well"
    yield from _paid(found)
    median, late = map(duration, seen.latencies)
    yield f"  latency: median {median}, 95 % within {late}"
    yield f"all {found.total:,} items, going by these:"
    for line in (
        *cost_lines(found.forecast, found.plan),
        *budget_lines(found.forecast, found.plan),
    ):
        yield f"  {line}"


def _paid(found: Piloted) -> Iterator[str]:
    """Yield what the answers of the pilot have cost, if there is a price of tokens."""
    price, seen = found.plan.price, found.seen
    if price is not None and price.prompt is not None and seen is not None:
        yield f"  cost: {dollars(seen.nano_usd / NANO)}, at {price}"


def asks() -> bool:
    """Say whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agreed(left: int) -> bool:
    """Ask whether to go on with the other items; no answer is no."""
    try:  # Ctrl-C may come before the question is out
        sys.stderr.write(f"Go on with the other {left:,} items? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().casefold() in {"y", "yes"}
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return False
