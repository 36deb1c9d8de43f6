"""What a run will take: from its prompts, and from what items have taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from ...backends.budget.pricing import Price
from ...backends.core.money import HOUR_MS, NANO, Caps
from .seen import Seen
from .spans import Span

_REPAIR: Final = 60
"""Tokens of the request to mend an answer."""
_MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to ask.

    Attributes:
        items: Items that will be asked.
        first: Tokens of an item's first prompt.
        max_tokens: Most tokens of an answer.
        repairs: Most answers of an item that are sent back.
        streams: Most items in flight.
        requests_per_s: Most requests per second, or None.
        tokens_per_min: Most tokens per minute, or None.
        nodes: Nodes that are held meanwhile, or None when nobody knows.
        price: What it costs, or None.
        caps: What it may take.
    """

    items: int
    first: Span
    max_tokens: int
    repairs: int
    streams: int
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    nodes: int | None = None
    price: Price | None = None
    caps: Caps = field(default_factory=Caps)


@dataclass(frozen=True, slots=True)
class Carried:
    """How far a budget reaches.

    Attributes:
        cap: The cap that is reached first: ``usd``, ``tokens``, ``requests`` or ``node_hours``.
        worst: The one that is reached first when all is as dear as it may be.
        share: Share of the items that all of them carry; above 1 when something is left.
    """

    cap: str
    worst: str
    share: Span


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take, all of it.

    Attributes:
        requests: Requests.
        prompt: Prompt tokens.
        completion: Completion tokens.
        usd: Dollars, or None without a price.
        seconds: Wall time, or None without a latency; at most, if the fleet does no more at a time
            than it was seen to do.
        node_hours: Hours times nodes, or None without a time or nodes.
        carried: How far the budget reaches; None without one, or when nothing can be said of it.
        unknown: Caps of which nothing can be said.
        measured: Where answers' lengths and times were seen, or None.
    """

    requests: Span
    prompt: Span
    completion: Span
    usd: Span | None
    seconds: Span | None
    node_hours: Span | None
    carried: Carried | None
    unknown: tuple[str, ...] = ()
    measured: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        carried = self.carried
        return {
            "requests": self.requests.to_json(),
            "prompt_tokens": self.prompt.to_json(),
            "completion_tokens": self.completion.to_json(),
            "usd": None if self.usd is None else self.usd.to_json(6),
            "seconds": None if self.seconds is None else self.seconds.to_json(3),
            "node_hours": None if self.node_hours is None else self.node_hours.to_json(6),
            "budget": None
            if carried is None
            else {"cap": carried.cap, "worst": carried.worst, "carries": carried.share.to_json(4)},
            "unknown_caps": list(self.unknown),
            "measured": self.measured,
        }


def forecast(plan: Plan, seen: Seen | None, own: bool = False) -> Forecast:
    """Foretell what a run takes.

    Args:
        plan: What it is going to ask.
        seen: What items have taken; None: answers may be as long as they are allowed to be.
        own: Whether the items seen are the run's own, so that their prompts count as they are.
    """
    items = Span.of(plan.items)
    if seen is None:
        requests, prompt, completion = _unseen(plan)
    elif seen.unreported == seen.items:
        _, prompt, completion = _unseen(plan)
        requests = items * seen.requests
    else:
        requests = items * seen.requests
        completion = items * seen.completion
        prompt = items * (seen.prompt if own else _prompts(plan.first, seen))
    tokens = prompt + completion
    if seen is not None:
        tokens += items * seen.lost
    seconds = None if seen is None else _seconds(plan, seen, requests, tokens)
    hours = None
    if seconds is not None and plan.nodes is not None:
        nodes = plan.nodes
        hours = seconds.map(lambda s: s / 3600 * nodes)
    paid = items * seen.dollars if own and seen is not None and seen.nano_usd else None
    usd = _usd(plan.price, paid or _answers(plan.price, prompt, completion, _cached(seen)), hours)
    carried, unknown = _carried(plan.caps, requests, tokens, usd, hours)
    source = None if seen is None else seen.source
    return Forecast(requests, prompt, completion, usd, seconds, hours, carried, unknown, source)


def _unseen(plan: Plan) -> tuple[Span, Span, Span]:
    """Return requests, prompt and completion tokens when no answer has been seen."""
    n, rounds, longest = plan.items, 1 + plan.repairs, plan.max_tokens
    again = plan.repairs * (longest + _REPAIR)
    first = plan.first
    return (
        Span(n, n, n * rounds),
        Span(n * first.low, n * first.likely, n * (first.high * rounds + again)),
        Span(n, n * longest, n * longest * rounds),
    )


def _prompts(first: Span, seen: Seen) -> Span:
    """Return an item's prompt tokens: a repair sends prompt and answer again."""
    repairs = seen.repairs
    answer = seen.completion.map(lambda tokens: tokens + _REPAIR)
    return first * repairs.map(lambda r: 1 + r) + repairs * answer


def _seconds(plan: Plan, seen: Seen, requests: Span, tokens: Span) -> Span:
    """Return the time with as many in flight as allowed; at most, with as many as were seen.

    A fleet that was not driven to its limit does not show where that is.
    """
    streams = max(1, min(plan.streams, plan.items))
    seconds = seen.latency.map(lambda latency: plan.items * latency / streams)
    slow = max(1.0, streams / seen.flight)
    seconds = Span(seconds.low, seconds.likely, seconds.high * slow)
    if plan.requests_per_s is not None:
        rate = plan.requests_per_s
        seconds = seconds.most(requests.map(lambda r: r / rate))
    if plan.tokens_per_min is not None:
        flow = plan.tokens_per_min / 60
        seconds = seconds.most(tokens.map(lambda t: t / flow))
    return seconds


def _cached(seen: Seen | None) -> float:
    """Return the share of prompt tokens that caches held."""
    if seen is None or not seen.usage.prompt:
        return 0.0
    return min(1.0, (seen.usage.cached or 0) / seen.usage.prompt)


def _answers(price: Price | None, prompt: Span, completion: Span, cached: float) -> Span:
    """Return the dollars of tokens; a cache may hold as many as it did, or none."""
    if price is None or price.prompt is None:
        return Span.of(0.0)
    full = price.prompt
    less = full if price.cached_prompt is None else price.cached_prompt
    likely = (1 - cached) * full + cached * less
    rate = Span(likely, likely, full).map(lambda r: r / _MILLION)
    return rate * prompt + Span.of((price.completion or 0.0) / _MILLION) * completion


def _usd(price: Price | None, answers: Span, hours: Span | None) -> Span | None:
    """Return the dollars of tokens and nodes; None when nobody knows them."""
    if price is None:
        return None
    if price.node_hour is None:
        return answers
    return None if hours is None else answers + Span.of(price.node_hour) * hours


def _carried(
    caps: Caps, requests: Span, tokens: Span, usd: Span | None, hours: Span | None
) -> tuple[Carried | None, tuple[str, ...]]:
    """Return the cap that is reached first, and those of which nothing is known."""
    needs: dict[str, tuple[int | None, Span | None]] = {
        "requests": (caps.requests, requests),
        "tokens": (caps.tokens, tokens),
        "usd": (caps.nano_usd, None if usd is None else usd.map(lambda d: d * NANO)),
        "node_hours": (caps.node_ms, None if hours is None else hours.map(lambda h: h * HOUR_MS)),
    }
    given = {name: (cap, need) for name, (cap, need) in needs.items() if cap is not None}
    shares = {name: _share(cap, need) for name, (cap, need) in given.items() if need is not None}
    unknown = tuple(name for name in given if name not in shares)
    if not shares:
        return None, unknown
    first = min(shares, key=lambda name: shares[name].likely)
    worst = min(shares, key=lambda name: (shares[name].low, name != first))
    every = shares.values()
    share = Span(min(s.low for s in every), shares[first].likely, min(s.high for s in every))
    return Carried(first, worst, share), unknown


def _share(cap: int, need: Span) -> Span:
    high, likely, low = (cap / max(figure, 1.0) for figure in (need.low, need.likely, need.high))
    return Span(low, likely, high)
