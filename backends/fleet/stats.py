"""Statistics of one endpoint for reports: counts and a histogram, no list of calls."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from ..core.types import Usage

_PER_DOUBLING: Final = 8
"""Histogram cells per doubling of the latency: quantiles are within 9 %."""
QUANTILES: Final = {"latency_p50_s": 0.5, "latency_p90_s": 0.9, "latency_p99_s": 0.99}
_TOKENS: Final = (
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "lost_prompt_tokens",
    "lost_completion_tokens",
    "useful_tokens",
)
_SUMS: Final = ("calls", *_TOKENS, "hedges")


class FlightTime:
    """Time that requests to an endpoint are in flight, summed over them.

    Attributes:
        count: Requests in flight now.
    """

    __slots__ = ("_sum_s", "count")

    def __init__(self) -> None:
        self.count, self._sum_s = 0, 0.0

    def begin(self) -> None:
        """Count a request as begun."""
        self.count += 1
        self._sum_s -= time.monotonic()

    def end(self) -> None:
        """Count a request as ended."""
        self.count -= 1
        self._sum_s += time.monotonic()

    def total_s(self, now: float) -> float:
        """Return the seconds in flight of all requests until now.

        Args:
            now: Monotonic time in seconds.
        """
        return self._sum_s + self.count * now


@dataclass(slots=True)
class EndpointStats:
    """Totals of one endpoint.

    Attributes:
        calls: Requests that ended, successfully or not.
        failures: Failed ones by class of error.
        prompt_tokens: Prompt tokens, as far as reported.
        completion_tokens: Completion tokens, as far as reported.
        cached_tokens: Prompt tokens from its prefix cache, as far as reported.
        lost_prompt_tokens: The most prompt tokens of requests that may have been paid and brought
            no answer.
        lost_completion_tokens: The same for their completions.
        useful_tokens: Tokens of its answers that were used, of items that have ended.
        hedges: Second requests that were sent to it.
        latency_sum_s: Seconds to its answers, summed.
    """

    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    lost_prompt_tokens: int = 0
    lost_completion_tokens: int = 0
    useful_tokens: int = 0
    hedges: int = 0
    latency_sum_s: float = 0.0
    _cells: Counter[int] = field(default_factory=Counter)

    def add_answer(self, seconds: float, usage: Usage) -> None:
        """Count a good answer."""
        self.calls += 1
        self.prompt_tokens += usage.prompt or 0
        self.completion_tokens += usage.completion or 0
        self.cached_tokens += usage.cached or 0
        self.latency_sum_s += seconds
        self._cells[math.ceil(math.log2(max(seconds, 1e-4)) * _PER_DOUBLING)] += 1

    def add_failure(self, error: str) -> None:
        """Count a failure by the name of its class."""
        self.calls += 1
        self.failures[error] += 1

    def add_lost(self, usage: Usage) -> None:
        """Count the maximum cost of a request that brought no answer."""
        self.lost_prompt_tokens += usage.prompt or 0
        self.lost_completion_tokens += usage.completion or 0

    def add_useful(self, usage: Usage) -> None:
        """Count tokens of answers that were used: their item has ended well."""
        self.useful_tokens += usage.tokens

    def merge(self, other: EndpointStats) -> None:
        """Add other totals to these."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for error, count in other.failures.items():
            self.failures[error] += count
        for cell, count in other._cells.items():
            self._cells[cell] += count

    def __add__(self, other: EndpointStats) -> EndpointStats:
        """Return the sums of both."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return EndpointStats(
            failures=self.failures + other.failures, _cells=self._cells + other._cells, **sums
        )

    def __sub__(self, before: EndpointStats) -> EndpointStats:
        """Return the difference from an earlier state of the same endpoint."""
        sums = {name: getattr(self, name) - getattr(before, name) for name in _SUMS}
        return EndpointStats(
            failures=self.failures - before.failures, _cells=self._cells - before._cells, **sums
        )

    def to_json(self) -> dict[str, Any]:
        """Return the totals as plain data, the latencies as cells of a histogram."""
        sums = {name: getattr(self, name) for name in _SUMS}
        cells = {str(cell): count for cell, count in self._cells.items()}
        return {**sums, "failures": dict(self.failures), "cells": cells}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Parse plain data; other keys are ignored."""
        cells = Counter({int(cell): count for cell, count in data["cells"].items()})
        sums = {name: data[name] for name in _SUMS}
        return cls(failures=Counter(data["failures"]), _cells=cells, **sums)

    def latency_s(self, quantile: float) -> float | None:
        """Return a quantile of the answers' times in seconds, or None if there are none."""
        wanted = quantile * self._cells.total()
        seen = 0
        for cell in sorted(self._cells):
            seen += self._cells[cell]
            if seen >= wanted:
                return float(2.0 ** ((cell - 0.5) / _PER_DOUBLING))
        return None


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint as a report shows it.

    Attributes:
        endpoint: Label.
        state: In words.
        in_flight: Requests in flight.
        width: Requests in flight allowed.
        calls: Requests that ended.
        failures: Failed ones by class.
        prompt_tokens: Prompt tokens.
        completion_tokens: Completion tokens.
        cached_tokens: Prompt tokens from its prefix cache.
        lost_prompt_tokens: The most prompt tokens of requests that may have been paid and brought
            no answer.
        lost_completion_tokens: The same for their completions.
        useful_tokens: Tokens of its answers that were used, of items that have ended.
        latency_p50_s: Median time to an answer in seconds, or None.
        latency_p90_s: 90 % quantile, or None.
        latency_p99_s: 99 % quantile, or None.
        opened: Times that its breaker opened.
        hedges: Second requests that were sent to it.
    """

    endpoint: str
    state: str
    in_flight: int
    width: int
    calls: int
    failures: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    lost_prompt_tokens: int
    lost_completion_tokens: int
    useful_tokens: int
    latency_p50_s: float | None
    latency_p90_s: float | None
    latency_p99_s: float | None
    opened: int
    hedges: int


@dataclass(frozen=True, slots=True)
class FleetHealth:
    """Summary of the fleet's state, for a live line.

    Attributes:
        healthy: Endpoints in use.
        total: All endpoints.
        in_flight: Requests in flight.
        waiting: Calls that wait for an endpoint.
        refusals: Times that an endpoint refused for now (429, 503).
        paused: Why no request can be sent, or None.
    """

    healthy: int
    total: int
    in_flight: int
    waiting: int
    refusals: int
    paused: str | None
