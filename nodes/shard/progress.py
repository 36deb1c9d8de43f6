"""Counts of a run in progress, and their stream."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from ...backends.core.money import NANO_PER_USD, NodeTime, UsageTotals

_LEAST_TIMES: Final = 20
"""Items after which their times are an estimate for others."""
_MOST_TIMES: Final = 256
"""Latest items that are the estimate: times change with the load."""


class ItemTimes:
    """How long items take, from their start to their record, learnt from the latest of them."""

    def __init__(self) -> None:
        self._latest = deque[float](maxlen=_MOST_TIMES)
        self._own = 0

    def add(self, record: Mapping[str, Any], is_earlier: bool = False) -> None:
        """Learn from the record of an item, if a model answered it.

        Args:
            record: The record.
            is_earlier: Whether an earlier session wrote it.
        """
        seconds = record.get("latency_s")
        if record["status"] == "done" and record["requests"] and isinstance(seconds, int | float):
            self._latest.append(seconds)
            self._own += not is_earlier
            if self._own == _LEAST_TIMES and not is_earlier:  # these alone show how it goes now
                own = list(self._latest)[-_LEAST_TIMES:]
                self._latest.clear()
                self._latest.extend(own)

    @property
    def is_current(self) -> bool:
        """Return True if enough items of this session have ended."""
        return self._own >= _LEAST_TIMES

    @property
    def mean_s(self) -> float | None:
        """Return the mean in seconds; None if too few items have ended."""
        latest = self._latest
        return math.fsum(latest) / len(latest) if len(latest) >= _LEAST_TIMES else None

    def quantile_s(self, share: float) -> float | None:
        """Return the seconds in which a share of the items end; None if too few have ended."""
        ordered = sorted(self._latest)
        if len(ordered) < _LEAST_TIMES:
            return None
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Progress:
    """Counts of a run.

    Attributes:
        total: Items of the run.
        done: Items answered.
        failed: Items that ended without an answer.
        ended_before: Items of both kinds that an earlier session finished.
        usage: Usage of ended items, over all sessions.
        node_time: Node time over all sessions.
        times: How long items take.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    ended_before: int = 0
    usage: UsageTotals = field(default_factory=UsageTotals)
    node_time: NodeTime = field(default_factory=NodeTime)
    times: ItemTimes = field(default_factory=ItemTimes)

    def to_json(self, *, simulated: bool, priced: bool) -> dict[str, Any]:
        """Return the counts as the run's state and ``--json`` contain them.

        Args:
            simulated: Whether the answers are simulated.
            priced: Whether tokens have a price; without one the cost is unknown.
        """
        usage = self.usage
        return {
            "items": self.total,
            "done": self.done,
            "failed": self.failed,
            "requests": usage.requests,
            "reused": usage.reused,
            "tokens": {
                "prompt": usage.prompt_tokens,
                "cached": usage.cached_tokens,
                "completion": usage.completion_tokens,
                "wasted": usage.wasted_tokens,
            },
            "usd": usage.nano_usd / NANO_PER_USD if priced else None,
            "simulated": simulated,
        }

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Count an item that just ended, from its journal record."""
        self.done += record["status"] == "done"
        self.failed += record["status"] == "failed"
        self.usage.add(record)
        self.times.add(record)

    def add_counts(self, done: int, failed: int, spent: Mapping[str, int]) -> None:
        """Count items that just ended.

        Args:
            done: Number of answered items.
            failed: Number of items without an answer.
            spent: Sums over their records, by the names of :class:`UsageTotals`.
        """
        self.done += done
        self.failed += failed
        self.usage.merge(UsageTotals(**spent))

    def add_node_time(self, further: NodeTime) -> None:
        """Add further node time."""
        self.node_time = self.node_time.plus(further)


EMIT_INTERVAL_S: Final = 1.0
_RATE_S: Final = 10.0

ReadCounts = Callable[[], dict[str, Any]]
"""Returns the counts of a run as JSON, including ``done`` and ``failed``."""

WriteEvent = Callable[[Any], None]
"""LangGraph's stream writer; it does nothing without a consumer."""


class ProgressStream:
    """Stream of counts and a rate, at most once a second over all shards of a run."""

    def __init__(self) -> None:
        self._seen = deque[tuple[float, int]]()
        self._writers = dict[object, tuple[ReadCounts, WriteEvent]]()
        self._ticking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def stream_counts(self, counts: ReadCounts, write: WriteEvent) -> AsyncIterator[None]:
        """Emit counts repeatedly while the block runs; arguments as for :meth:`emit`.

        One task emits for all blocks, to the latest writer: thousands of shards wait at a time.
        """
        key = object()
        self._writers[key] = counts, write
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._emit_loop())
        try:
            yield
        finally:
            del self._writers[key]
            if not self._writers:
                self._ticking.cancel()
                self._ticking = None

    async def _emit_loop(self) -> None:
        while True:
            self.emit(*next(reversed(self._writers.values())))
            await asyncio.sleep(EMIT_INTERVAL_S)

    def emit(self, counts: ReadCounts, write: WriteEvent, *, last: bool = False) -> None:
        """Write the counts of the run, unless they were written within the last second.

        Args:
            counts: Returns the counts.
            write: Takes the counts as JSON, marked ``"type": "progress"`` and ``"v": 1``, with
                the ``rate`` in items per second over the last ten.
            last: Write in any case: the run is at its end.
        """
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < EMIT_INTERVAL_S and not last:
            return
        event = counts()
        ended = event["done"] + event["failed"]
        self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_S:  # noqa: PLR2004 - a rate needs two points
            self._seen.popleft()
        then, before = self._seen[0]
        rate = (ended - before) / (now - then) if now > then else 0.0
        write({"type": "progress", "v": 1, **event, "rate": round(rate, 2)})
