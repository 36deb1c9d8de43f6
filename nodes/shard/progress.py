"""Counts of a run in progress, and their stream."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from ...backends.core.money import NANO_PER_USD, NodeTime


@dataclass(slots=True)
class Progress:
    """Counts of a run.

    Attributes:
        total: Items of the run.
        done: Items answered.
        failed: Items that ended without an answer.
        ended_before: Items of both kinds that an earlier session finished.
        requests: Requests of ended items, over all sessions.
        prompt_tokens: Their prompt tokens, as far as reported.
        cached_tokens: Prompt tokens that prefix caches contained.
        completion_tokens: Their completion tokens, as far as reported.
        lost_tokens: Maximum tokens of requests that may have been paid without an answer.
        useful_tokens: Tokens of the answers that count.
        nano_usd: Cost of all these tokens in nano-dollars.
        useful_nano_usd: Cost of the answers that count in nano-dollars.
        reused: Answers without cost, because an equal request was answered before.
        node_time: Node time over all sessions.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    ended_before: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    useful_tokens: int = 0
    nano_usd: int = 0
    useful_nano_usd: int = 0
    reused: int = 0
    node_time: NodeTime = field(default_factory=NodeTime)

    @property
    def wasted_tokens(self) -> int:
        """Return tokens that may have been paid for nothing: failed, hedged, sent back."""
        paid = self.prompt_tokens + self.completion_tokens + self.lost_tokens
        return paid - self.useful_tokens

    def to_json(self, *, simulated: bool, priced: bool) -> dict[str, Any]:
        """Return the counts as the run's state and ``--json`` contain them.

        Args:
            simulated: Whether the answers are simulated.
            priced: Whether tokens have a price; without one the cost is unknown.
        """
        return {
            "items": self.total,
            "done": self.done,
            "failed": self.failed,
            "requests": self.requests,
            "reused": self.reused,
            "tokens": {
                "prompt": self.prompt_tokens,
                "cached": self.cached_tokens,
                "completion": self.completion_tokens,
                "wasted": self.wasted_tokens,
            },
            "usd": self.nano_usd / NANO_PER_USD if priced else None,
            "simulated": simulated,
        }

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Count an item that just ended, from its journal record."""
        self.done += record["status"] == "done"
        self.failed += record["status"] == "failed"
        self.requests += record["requests"]
        self.prompt_tokens += record["prompt_tokens"] or 0
        self.cached_tokens += record["cached_tokens"] or 0
        self.completion_tokens += record["completion_tokens"] or 0
        self.lost_tokens += record["lost_tokens"]
        self.useful_tokens += record["useful_tokens"]
        self.nano_usd += record["nano_usd"]
        self.reused += record.get("reused") or 0
        self.useful_nano_usd += record["useful_nano_usd"]

    def add_counts(self, done: int, failed: int, spent: Mapping[str, int]) -> None:
        """Count items that just ended.

        Args:
            done: Number of answered items.
            failed: Number of items without an answer.
            spent: Sums over their records, by the names of these counts.
        """
        self.done += done
        self.failed += failed
        for name, further in spent.items():
            setattr(self, name, getattr(self, name) + further)

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
