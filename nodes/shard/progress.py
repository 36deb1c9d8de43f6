"""Counts of a running run, and their stream."""

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
    """How far a run is.

    Attributes:
        total: Items of the run.
        done: Items answered.
        failed: Items that ended without an answer.
        ended_before: Of both, those that an earlier life of the run had finished.
        requests: Requests sent over all lives for items that ended.
        prompt_tokens: Their prompt tokens, as far as reported.
        cached_tokens: Those of them that prefix caches held.
        completion_tokens: Their completion tokens, as far as reported.
        lost_tokens: The most tokens of requests that may have been paid and brought no answer.
        useful_tokens: Tokens of the answers that count.
        nano_usd: Nano-dollars that all these tokens cost.
        useful_nano_usd: Nano-dollars of the answers that count.
        reused: Answers that cost nothing, for they were given to an equal request before.
        node_time: How long nodes were held over all lives.
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
        """Tokens that may have been paid for nothing: failed, hedged, sent back."""
        paid = self.prompt_tokens + self.completion_tokens + self.lost_tokens
        return paid - self.useful_tokens

    def to_json(self, *, simulated: bool, priced: bool) -> dict[str, Any]:
        """Return the counts as a run's state and its ``--json`` tell them.

        Args:
            simulated: Whether the answers are simulated.
            priced: Whether tokens have a price; else nobody knows what they cost.
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
        """Count an item that has just ended, by its journal record."""
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
        """Count items that have just ended.

        Args:
            done: How many were answered.
            failed: How many ended without an answer.
            spent: What their records add up to, by the names of these counts.
        """
        self.done += done
        self.failed += failed
        for name, further in spent.items():
            setattr(self, name, getattr(self, name) + further)

    def add_node_time(self, further: NodeTime) -> None:
        """Count that nodes were held for a further while."""
        self.node_time = self.node_time.plus(further)


EMIT_INTERVAL_S: Final = 1.0
_RATE_S: Final = 10.0

ReadCounts = Callable[[], dict[str, Any]]
"""Returns a run's counts as JSON, ``done`` and ``failed`` among them."""

WriteEvent = Callable[[Any], None]
"""LangGraph's stream writer; it does nothing where nobody listens."""


class ProgressStream:
    """Tells counts and a rate at most once a second, whichever shard of the run asks first."""

    def __init__(self) -> None:
        self._seen = deque[tuple[float, int]]()
        self._writers = dict[object, tuple[ReadCounts, WriteEvent]]()
        self._ticking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def stream_counts(self, counts: ReadCounts, write: WriteEvent) -> AsyncIterator[None]:
        """Tell again and again while the block runs; arguments as of :meth:`emit`.

        One task tells for all blocks, to whoever came last: thousands of shards wait at a time.
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
        """Write how far the run is, unless it was told within the last second.

        Args:
            counts: Returns its counts.
            write: Takes the counts as JSON, marked ``"type": "progress"`` and ``"v": 1``, with
                their ``rate`` in items per second over the last ten.
            last: Tell in any case: the run is at its end.
        """
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < EMIT_INTERVAL_S and not last:
            return
        said = counts()
        ended = said["done"] + said["failed"]
        self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_S:  # noqa: PLR2004 - a span has two ends
            self._seen.popleft()
        then, before = self._seen[0]
        rate = (ended - before) / (now - then) if now > then else 0.0
        write({"type": "progress", "v": 1, **said, "rate": round(rate, 2)})
