"""Forecast requests, tokens, cost and time, with ranges, from prompts and measured items."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from ...backends.budget.price import Price
from ...backends.core.errors import ConfigurationError, TruncatedAnswerError
from ...backends.core.money import MS_PER_HOUR, NANO_PER_USD, BudgetLimits
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Usage
from ...backends.storage.run_folder import get_run_ids, open_folder

if TYPE_CHECKING:
    from ...backends.storage.journal import Journal

_SIGMAS: Final = 2.0
"""Standard errors on either side: about 95 of 100 such ranges contain the true mean."""


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate with its range.

    Attributes:
        low: Lower bound.
        likely: Best estimate.
        high: Upper bound.
    """

    low: float
    likely: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Self:
        """Return an exact value."""
        return cls(value, value, value)

    @classmethod
    def from_sample(cls, values: Sequence[float], total: int) -> Self:
        """Estimate the mean of a population from a sample.

        Args:
            values: The sample; empty means 0.
            total: Size of the population; a sample of that size is exact.
        """
        count = len(values)
        if not count:
            return cls.exact(0.0)
        mean = math.fsum(values) / count
        if count >= total:
            return cls.exact(mean)
        if count == 1:
            return cls(0.0, mean, 2 * mean)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        left = (total - count) / max(1, total - 1)
        error = _SIGMAS * math.sqrt(variance / count * left)
        return cls(max(0.0, mean - error), mean, mean + error)

    def map(self, change: Callable[[float], float]) -> Self:
        """Return the range under a non-decreasing function."""
        return type(self)(change(self.low), change(self.likely), change(self.high))

    def __add__(self, other: Range) -> Range:
        """Add two ranges."""
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, other: Range) -> Range:
        """Multiply two non-negative ranges."""
        return Range(self.low * other.low, self.likely * other.likely, self.high * other.high)

    def maximum(self, other: Range) -> Range:
        """Return the element-wise maximum."""
        return Range(
            max(self.low, other.low), max(self.likely, other.likely), max(self.high, other.high)
        )

    def to_json(self, digits: int | None = 0) -> dict[str, float]:
        """Return the range as plain data, rounded; with 0 digits, to whole numbers."""
        figures = {"low": self.low, "likely": self.likely, "high": self.high}
        if digits == 0:
            return {name: round(value) for name, value in figures.items()}
        return {name: round(value, digits) for name, value in figures.items()}


_UNSEEN: Final = 3.0
"""With a chance of 1 in 20, a sample of n items misses an event that has a rate of 3 in n."""
_READ: Final = 5000
"""Number of records that is sufficient for statistics."""


@dataclass(frozen=True, slots=True)
class AnswerLimit:
    """The limit of answers for which measured items are an estimate.

    Attributes:
        max_tokens: Most tokens of an answer.
        truncated: Share of the items to estimate whose answers were truncated when they were
            measured; None: the same share as of the measured items.
    """

    max_tokens: int
    truncated: float | None = None

    def estimate_completion(self, records: Sequence[dict[str, Any]], measured: Range) -> Range:
        """Return the completion tokens per item under this limit.

        A truncated answer has at least the tokens that it had, and at most those of the limit.
        Likely the lengths are spread as evenly beyond the old limit as up to it, so that the share
        of truncated answers says how far they go; half a whole answer is the least, because few
        distributions of lengths end at a limit.

        Args:
            records: The measured items.
            measured: Their completion tokens per item.
        """
        cut, others = list[dict[str, Any]](), list[float]()
        for one in records:
            if one["error_class"] == TruncatedAnswerError.__name__:
                cut.append(one)
            else:
                others.append(one["completion_tokens"])
        share = len(cut) / max(1, len(records)) if self.truncated is None else self.truncated
        if not cut or not share:
            return measured
        whole = [one["completion_tokens"] for one in records if one["status"] == "done"]
        rest = math.inf
        if whole:
            mean, old = sum(whole) / len(whole), sum(o["completion_tokens"] for o in cut) / len(cut)
            rest = max(mean / 2, (old - mean) * len(cut) / len(whole))
        most = [one["requests"] * self.max_tokens for one in cut]
        least = [min(one["completion_tokens"], m) for one, m in zip(cut, most, strict=True)]
        likely = [min(one + rest, m) for one, m in zip(least, most, strict=True)]
        low, middle, high = (math.fsum(values) / len(cut) for values in (least, likely, most))
        kept = Range.from_sample(others, sys.maxsize)
        return Range(low, middle, high) * Range.exact(share) + kept * Range.exact(1 - share)


@dataclass(frozen=True, slots=True)
class ItemStats:
    """Measurements of a number of items.

    Attributes:
        items: Number of items.
        failed: Number of failed items, by error class.
        requests: Requests per item.
        repairs: Repaired answers per item.
        prompt: Prompt tokens per item, over all its requests.
        completion: Completion tokens per item.
        lost: Tokens per item of requests without an answer that may have been charged.
        dollars: Cost per item, including lost requests, at the price of the run.
        latency: Seconds per item.
        in_flight: Average number of items in flight.
        latencies: (median, 95th percentile) of the latency.
        usage: Tokens of all items.
        nano_usd: Nano-dollars of all items.
        unreported: Items whose tokens were not reported.
        source: Source of the measurements.
    """

    items: int
    failed: dict[str, int]
    requests: Range
    repairs: Range
    prompt: Range
    completion: Range
    lost: Range
    dollars: Range
    latency: Range
    in_flight: float
    latencies: tuple[float, float]
    usage: Usage
    nano_usd: int
    unreported: int
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return the object as plain data."""
        return {
            "items": self.items,
            "failed": self.failed,
            "requests": self.requests.to_json(3),
            "repairs": self.repairs.to_json(3),
            "prompt_tokens": self.prompt.to_json(1),
            "completion_tokens": self.completion.to_json(1),
            "lost_tokens": self.lost.to_json(1),
            "usd": self.dollars.to_json(9),
            "latency_s": self.latency.to_json(4),
            "in_flight": round(self.in_flight, 1),
            "latency_median_s": self.latencies[0],
            "latency_p95_s": self.latencies[1],
            "unreported": self.unreported,
            "source": self.source,
        }

    @classmethod
    def from_records(
        cls,
        records: Iterable[dict[str, Any]],
        total: int,
        source: str,
        step: int = 1,
        limit: AnswerLimit | None = None,
    ) -> ItemStats | None:
        """Summarize journal records; return None if none of the items had a request.

        Args:
            records: The records; items without a request are ignored.
            total: Size of the population that they are a sample of.
            source: Description of their source.
            step: Number of items that each record represents.
            limit: The limit of answers to estimate for; None is that of the records.
        """
        called = [record for record in records if record["requests"]]
        if not called:
            return None
        reported = [record for record in called if record["completion_tokens"] is not None]
        latencies = sorted(record["latency_s"] for record in called)

        def mean(name: str, of: Sequence[dict[str, Any]]) -> Range:
            return Range.from_sample([record.get(name) or 0 for record in of], total)

        completion = mean("completion_tokens", reported)
        completion = _widen_rare(completion, len(reported), total)
        latency = Range.from_sample(latencies, total)
        if limit is not None:
            measured = completion
            completion = limit.estimate_completion(reported, measured)
            if completion != measured and measured.likely:  # a longer answer takes longer
                latency *= completion.map(lambda tokens: tokens / measured.likely)
        return cls(
            items=len(called),
            failed=dict(Counter(r["error_class"] for r in called if r["status"] == "failed")),
            requests=_widen_rare(mean("requests", called), len(called), total),
            repairs=_widen_rare(mean("repairs", called), len(called), total, 1.0),
            prompt=_widen_rare(mean("prompt_tokens", reported), len(reported), total),
            completion=completion,
            lost=mean("lost_tokens", called),
            dollars=_widen_rare(
                mean("nano_usd", called).map(lambda n: n / NANO_PER_USD), len(called), total
            ),
            latency=latency,
            in_flight=step * _flight(called),
            latencies=(_quantile(latencies, 0.5), _quantile(latencies, 0.95)),
            usage=_sum(reported),
            nano_usd=sum(record.get("nano_usd") or 0 for record in called),
            unreported=len(called) - len(reported),
            source=source,
        )


def _widen_rare(mean: Range, count: int, total: int, least: float = 0.0) -> Range:
    """Widen a range for events too rare to occur in the sample, such as repairs."""
    if not count or count >= total:
        return mean
    once = (mean.likely or least) * _UNSEEN / count
    return Range(mean.low, mean.likely, max(mean.high, mean.likely + once))


def _flight(records: Sequence[dict[str, Any]]) -> float:
    """Return the average number of items in flight while any was."""
    spans = list[tuple[float, float]]()
    for record in records:
        end = datetime.fromisoformat(record["finished_at"]).timestamp()
        spans.append((end - record["latency_s"], end))
    busy, until = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return max(1.0, math.fsum(end - begin for begin, end in spans) / max(busy, 1e-3))


def _sum(records: Sequence[dict[str, Any]]) -> Usage:
    return Usage(
        sum(record["prompt_tokens"] or 0 for record in records),
        sum(record["completion_tokens"] or 0 for record in records),
        sum(record.get("cached_tokens") or 0 for record in records),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def read_item_stats(path: Path, simulated: bool, limit: AnswerLimit) -> ItemStats:
    """Return measurements of the finished items of a run; blocks.

    Args:
        path: The run's folder; the run need not be finished.
        simulated: Require simulated answers if True, real ones if False.
        limit: The limit of answers to estimate for.

    Raises:
        ConfigurationError: There is no run or no finished item, or the answers are of the other
            kind.
    """
    from ...backends.storage.journal import Journal  # noqa: PLC0415 - few estimates read a run

    folder = open_folder(path)
    about = folder.read_provenance()
    if bool(about["simulated"]) is not simulated:
        kinds = ("real", "simulated")
        msg = (
            f"--like {path}: its answers are {kinds[about['simulated']]}, and these endpoints are "
            f"{kinds[simulated]}; use a run of the same kind"
        )
        raise ConfigurationError(msg)
    total = about["input"]["items"]
    with Journal(folder.journal, get_run_ids(about), total) as journal:
        found = measure_items(journal, total, path, limit)
    if found is None:
        msg = f"--like {path}: no item of this run has a request yet"
        raise ConfigurationError(msg)
    return found


def measure_items(journal: Journal, total: int, path: Path, limit: AnswerLimit) -> ItemStats | None:
    """Return measurements of finished items; None if none of them had a request.

    Args:
        journal: The journal of their run.
        total: Number of items of the run.
        path: The run's folder.
        limit: The limit of answers to estimate for.

    Raises:
        JournalError: The journal is damaged.
    """
    ended = [index for index in range(total) if journal.is_finished(index)]
    step = max(1, len(ended) // _READ)
    records = [journal.read_record(index) for index in ended[::step]]
    source = f"{count_nouns(len(ended), 'item')} of {path}"
    return ItemStats.from_records(records, sys.maxsize, source, step, limit)


_REPAIR: Final = 60
"""Tokens of the request to repair an answer."""
_MILLION: Final = 1_000_000
_PROMPT_MARGIN: Final = 1.25
"""Tokens that are reserved for a prompt, per token that it has."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The requests of a run and its limits.

    Attributes:
        items: Number of items.
        first: Tokens of an item's first prompt.
        max_tokens: Most tokens of an answer.
        repairs: Most repairs per item.
        streams: Most items in flight.
        requests_per_s: Most requests per second, or None.
        tokens_per_min: Most tokens per minute, or None.
        window_s: Length in seconds of the windows in which tokens count.
        is_gateway: Whether the endpoints are behind a gateway, which has such limits.
        nodes: Nodes held during the run, or None if unknown.
        price: Price of the model, or None.
        caps: Budget limits.
    """

    items: int
    first: Range
    max_tokens: int
    repairs: int
    streams: int
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    window_s: float = 60.0
    is_gateway: bool = False
    nodes: int | None = None
    price: Price | None = None
    caps: BudgetLimits = field(default_factory=BudgetLimits)

    @property
    def reserved(self) -> float:
        """Return the tokens that a request reserves in a window until its answer comes."""
        return _PROMPT_MARGIN * self.first.likely + self.max_tokens

    @property
    def most_in_flight(self) -> int | None:
        """Return how many requests the limit of tokens lets run at a time; None: it is none."""
        if self.tokens_per_min is None:
            return None
        window = self.tokens_per_min * self.window_s / 60
        return max(1, math.floor(window / max(1.0, self.reserved)))


@dataclass(frozen=True, slots=True)
class BudgetReach:
    """The share of the items that a budget covers.

    Attributes:
        limit: The limit reached first: ``usd``, ``tokens``, ``requests`` or ``node_hours``.
        worst_limit: The limit reached first in the most expensive case.
        share: Share of the items that all limits cover; above 1 if some budget remains.
    """

    limit: str
    worst_limit: str
    share: Range


@dataclass(frozen=True, slots=True)
class RateBound:
    """The least time of a run under its rate limits.

    Attributes:
        limit: The limit that takes longest: ``requests_per_s`` or ``tokens_per_min``.
        seconds: Time that it allows.
        slowdown: By what factor it is longer than the time without such limits; None if that is
            unknown.
    """

    limit: str
    seconds: Range
    slowdown: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the object as plain data."""
        slowdown = None if self.slowdown is None else round(self.slowdown, 2)
        return {"limit": self.limit, "seconds": self.seconds.to_json(3), "slowdown": slowdown}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast for a whole run.

    Attributes:
        rate_bound: How the rate limits bound its time, or None without such limits.
        requests: Requests.
        prompt: Prompt tokens.
        completion: Completion tokens.
        usd: Dollars, or None without a price.
        seconds: Wall time, or None without a latency; the upper bound assumes that the fleet
            processes no more items at a time than measured.
        node_hours: Hours times nodes, or None without a time or nodes.
        budget_reach: Share of the items that the budget covers; None without a budget or without
            an estimate for it.
        unknown_limits: Limits without an estimate.
        measured: Source of the measured lengths and times, or None.
    """

    requests: Range
    prompt: Range
    completion: Range
    usd: Range | None
    seconds: Range | None
    node_hours: Range | None
    budget_reach: BudgetReach | None
    unknown_limits: tuple[str, ...] = ()
    measured: str | None = None
    rate_bound: RateBound | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object as plain data."""
        reach = self.budget_reach
        return {
            "requests": self.requests.to_json(),
            "prompt_tokens": self.prompt.to_json(),
            "completion_tokens": self.completion.to_json(),
            "usd": None if self.usd is None else self.usd.to_json(6),
            "seconds": None if self.seconds is None else self.seconds.to_json(3),
            "node_hours": None if self.node_hours is None else self.node_hours.to_json(6),
            "budget": None
            if reach is None
            else {
                "cap": reach.limit,
                "worst": reach.worst_limit,
                "carries": reach.share.to_json(4),
            },
            "unknown_caps": list(self.unknown_limits),
            "measured": self.measured,
            "rate_limit": None if self.rate_bound is None else self.rate_bound.to_json(),
        }


def forecast(plan: RunPlan, stats: ItemStats | None, own: bool = False) -> Forecast:
    """Forecast requests, tokens, cost and time of a run.

    Args:
        plan: The requests of the run.
        stats: Measurements of items; None assumes answers of any allowed length.
        own: The measured items belong to the run, so their prompt tokens are used directly.
    """
    items = Range.exact(plan.items)
    if stats is None:
        requests, prompt, completion = _bound_tokens(plan)
    elif stats.unreported == stats.items:
        _, prompt, completion = _bound_tokens(plan)
        requests = items * stats.requests
    else:
        requests = items * stats.requests
        completion = items * stats.completion
        prompt = items * (stats.prompt if own else _prompts(plan.first, stats))
    tokens = prompt + completion
    if stats is not None:
        tokens += items * stats.lost
    seconds = None if stats is None else _seconds(plan, stats)
    held = None if stats is None else items * stats.latency
    bound = _rate_bound(plan, requests, tokens, seconds, held)
    if seconds is not None and bound is not None:
        seconds = seconds.maximum(bound.seconds)
    hours = None
    if seconds is not None and plan.nodes is not None:
        nodes = plan.nodes
        hours = seconds.map(lambda s: s / 3600 * nodes)
    paid = items * stats.dollars if own and stats is not None and stats.nano_usd else None
    usd = _usd(
        plan.price,
        paid or _token_dollars(plan.price, prompt, completion, _cached_share(stats)),
        hours,
    )
    reach, unknown = _budget_reach(plan.caps, requests, tokens, usd, hours)
    source = None if stats is None else stats.source
    return Forecast(
        requests, prompt, completion, usd, seconds, hours, reach, unknown, source, bound
    )


def _bound_tokens(plan: RunPlan) -> tuple[Range, Range, Range]:
    """Return bounds of requests, prompt and completion tokens without measured answers."""
    n, rounds, longest = plan.items, 1 + plan.repairs, plan.max_tokens
    again = plan.repairs * (longest + _REPAIR)
    first = plan.first
    return (
        Range(n, n, n * rounds),
        Range(n * first.low, n * first.likely, n * (first.high * rounds + again)),
        Range(n, n * longest, n * longest * rounds),
    )


def _prompts(first: Range, stats: ItemStats) -> Range:
    """Return the prompt tokens of an item: a repair sends prompt and answer again."""
    repairs = stats.repairs
    answer = stats.completion.map(lambda tokens: tokens + _REPAIR)
    return first * repairs.map(lambda r: 1 + r) + repairs * answer


def _seconds(plan: RunPlan, stats: ItemStats) -> Range:
    """Return the time with as many items in flight as allowed; at most, with as many as measured.

    A fleet below its limit does not show where its limit is.
    """
    streams = max(1, min(plan.streams, plan.items))
    seconds = stats.latency.map(lambda latency: plan.items * latency / streams)
    slow = max(1.0, streams / stats.in_flight)
    return Range(seconds.low, seconds.likely, seconds.high * slow)


def _rate_bound(
    plan: RunPlan,
    requests: Range,
    tokens: Range,
    unlimited: Range | None,
    held: Range | None,
) -> RateBound | None:
    """Return the least time under the rate limits, or None without such limits.

    A window holds the tokens that were used within its length, and those that requests in flight
    have reserved: the longer a request runs, and the higher ``max_tokens``, the fewer fit.

    Args:
        plan: The requests and the limits.
        requests: Number of requests.
        tokens: Tokens that are used.
        unlimited: Seconds without these limits, or None if unknown.
        held: Seconds of all items in flight together, or None if unknown.
    """
    times = dict[str, Range]()
    if plan.requests_per_s is not None:
        rate = plan.requests_per_s
        times["requests_per_s"] = requests.map(lambda r: r / rate)
    if plan.tokens_per_min is not None:
        flow = plan.tokens_per_min / 60
        times["tokens_per_min"] = tokens.map(lambda t: t / flow)
        if held is not None:
            per_second = plan.reserved / (flow * plan.window_s)
            times["tokens_per_min"] += held.map(lambda s: s * per_second)
    if not times:
        return None
    limit = max(times, key=lambda name: times[name].likely)
    seconds = times[limit]
    for other in times.values():
        seconds = seconds.maximum(other)
    known = unlimited is not None and unlimited.likely > 0
    slowdown = seconds.likely / unlimited.likely if known and unlimited is not None else None
    return RateBound(limit, seconds, slowdown)


def _cached_share(stats: ItemStats | None) -> float:
    """Return the share of prompt tokens that were cached."""
    if stats is None or not stats.usage.prompt:
        return 0.0
    return min(1.0, (stats.usage.cached or 0) / stats.usage.prompt)


def _token_dollars(price: Price | None, prompt: Range, completion: Range, cached: float) -> Range:
    """Return the dollars of tokens; the cached share may be as measured, or zero."""
    if price is None or price.prompt is None:
        return Range.exact(0.0)
    full = price.prompt
    less = full if price.cached_prompt is None else price.cached_prompt
    likely = (1 - cached) * full + cached * less
    rate = Range(likely, likely, full).map(lambda r: r / _MILLION)
    return rate * prompt + Range.exact((price.completion or 0.0) / _MILLION) * completion


def _usd(price: Price | None, answers: Range, hours: Range | None) -> Range | None:
    """Return the dollars of tokens and nodes, or None if unknown."""
    if price is None:
        return None
    if price.node_hour is None:
        return answers
    return None if hours is None else answers + Range.exact(price.node_hour) * hours


def _budget_reach(
    caps: BudgetLimits, requests: Range, tokens: Range, usd: Range | None, hours: Range | None
) -> tuple[BudgetReach | None, tuple[str, ...]]:
    """Return the limit that is reached first, and the limits without an estimate."""
    needs: dict[str, tuple[int | None, Range | None]] = {
        "requests": (caps.requests, requests),
        "tokens": (caps.tokens, tokens),
        "usd": (caps.nano_usd, None if usd is None else usd.map(lambda d: d * NANO_PER_USD)),
        "node_hours": (
            caps.node_ms,
            None if hours is None else hours.map(lambda h: h * MS_PER_HOUR),
        ),
    }
    given = {name: (cap, need) for name, (cap, need) in needs.items() if cap is not None}
    shares = {name: _share(cap, need) for name, (cap, need) in given.items() if need is not None}
    unknown = tuple(name for name in given if name not in shares)
    if not shares:
        return None, unknown
    first = min(shares, key=lambda name: shares[name].likely)
    worst = min(shares, key=lambda name: (shares[name].low, name != first))
    every = shares.values()
    share = Range(min(s.low for s in every), shares[first].likely, min(s.high for s in every))
    return BudgetReach(first, worst, share), unknown


def _share(cap: int, need: Range) -> Range:
    high, likely, low = (cap / max(figure, 1.0) for figure in (need.low, need.likely, need.high))
    return Range(low, likely, high)
