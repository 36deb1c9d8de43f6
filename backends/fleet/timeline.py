"""Record what a fleet's endpoints do over time, from their statistics; no work per call."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from ..core.timeline import BASE_MS, BinCounts, TimelineDelta
from .endpoint import Endpoint

_MOST_STEP_MS: Final = 1_000
_COST: Final = 500
"""One update takes at most one part in so many of the loop's time, however many endpoints."""
_MOST_PAUSE_S: Final = 10.0
_NO_FAILURES: Final = Counter[str]()


@dataclass(slots=True)
class _Seen:
    """Totals of an endpoint at the last update."""

    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    latency_s: float = 0.0
    flight_s: float = 0.0


class TimelineRecorder:
    """Turns the changes of endpoint statistics into a report for the timeline.

    Args:
        endpoints: Returns the fleet's members, present and past.
        width_ms: Width of the bins of the first report.
        clock: Returns a monotonic time in seconds.
        wall: Returns the time in seconds since 1970.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[Endpoint]],
        width_ms: int = BASE_MS,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._endpoints, self._clock, self._wall = endpoints, clock, wall
        self._delta = TimelineDelta(width_ms)
        self._width_ms = width_ms
        self._seen: dict[Endpoint, _Seen] = {}
        self._updated_at = clock()

    def update(self) -> None:
        """Add what the endpoints did since the last update."""
        now, wall_ms = self._clock(), 1000 * self._wall()
        passed_ms = 1000 * (now - self._updated_at)
        self._updated_at = now
        for endpoint in self._endpoints():
            calls, flight_s = endpoint.stats.calls, endpoint.flight.total_s(now)
            seen = self._seen.get(endpoint)
            if seen is None:
                if not calls and not endpoint.flight.count and not flight_s:
                    continue
                seen = self._seen[endpoint] = _Seen()
            if calls != seen.calls:
                self._add_calls(endpoint, seen, int(wall_ms - passed_ms / 2))
            if (flown_s := flight_s - seen.flight_s) > 1e-6:  # noqa: PLR2004 - more than rounding
                seen.flight_s = flight_s
                lo_ms = max(0.0, wall_ms - passed_ms)
                self._delta.add_flight(lo_ms, wall_ms, endpoint.label, flown_s)

    def _add_calls(self, endpoint: Endpoint, seen: _Seen, at_ms: int) -> None:
        stats = endpoint.stats
        counts = BinCounts(
            calls=stats.calls - seen.calls,
            input_tokens=stats.prompt_tokens - seen.input_tokens,
            output_tokens=stats.completion_tokens - seen.output_tokens,
            latency_s=stats.latency_sum_s - seen.latency_s,
        )
        failed = stats.failures.total()
        if failed != seen.failed:
            counts.failures = dict(stats.failures - seen.failures)
            seen.failures, seen.failed = stats.failures.copy(), failed
        seen.calls, seen.latency_s = stats.calls, stats.latency_sum_s
        seen.input_tokens, seen.output_tokens = stats.prompt_tokens, stats.completion_tokens
        self._delta.add(max(0, at_ms), endpoint.label, counts)

    def take(self, width_ms: int = BASE_MS) -> TimelineDelta:
        """Return what the endpoints did since the last report, and begin the next one.

        Args:
            width_ms: Width of the next report's bins, unless that is below the recorder's own.
        """
        self.update()
        delta, self._delta = self._delta, TimelineDelta(max(width_ms, self._width_ms))
        return delta

    def put_back(self, delta: TimelineDelta) -> None:
        """Add a report that could not be sent to the next one."""
        self._delta.merge(delta)

    async def follow(self) -> None:
        """Update at the end of each bin, less often for thousands of endpoints; never returns."""
        took_s = 0.0
        while True:
            step_ms = min(self._delta.width_ms, _MOST_STEP_MS)
            pause_s = (step_ms - 1000 * self._wall() % step_ms) / 1000
            least_s = min(_COST * took_s, _MOST_PAUSE_S)
            while self._delta.width_ms < 1000 * least_s:
                self._delta.widen()
            await asyncio.sleep(max(pause_s, least_s))
            began = time.thread_time()
            self.update()
            took_s = time.thread_time() - began


@asynccontextmanager
async def open_recorder(
    endpoints: Callable[[], Sequence[Endpoint]], width_ms: int = BASE_MS
) -> AsyncIterator[TimelineRecorder]:
    """Open a recorder that follows a fleet's endpoints while the block runs.

    Args:
        endpoints: Returns the fleet's members, present and past.
        width_ms: Width of the bins, at least.
    """
    recorder = TimelineRecorder(endpoints, width_ms)
    following = asyncio.create_task(recorder.follow())
    try:
        yield recorder
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
