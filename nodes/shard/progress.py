"""Counts of a running run, and their stream."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from ...backends.core.money import NANO, Held


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        total: Items of the run.
        done: Items answered.
        failed: Items that ended without an answer.
        before: Of both, those that an earlier life of the run had finished.
        requests: Requests sent over all lives for items that ended.
        prompt_tokens: Their prompt tokens, as far as reported.
        cached_tokens: Those of them that prefix caches held.
        completion_tokens: Their completion tokens, as far as reported.
        lost_tokens: The most tokens of requests that may have been paid and brought no answer.
        useful_tokens: Tokens of the answers that count.
        nano_usd: Nano-dollars that all these tokens cost.
        useful_nano_usd: Nano-dollars of the answers that count.
        reused: Answers that cost nothing, for they were given to an equal request before.
        held: How long nodes were held over all lives.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    before: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    useful_tokens: int = 0
    nano_usd: int = 0
    useful_nano_usd: int = 0
    reused: int = 0
    held: Held = field(default_factory=Held)

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
            "usd": self.nano_usd / NANO if priced else None,
            "simulated": simulated,
        }

    def count(self, record: Mapping[str, Any]) -> None:
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

    def count_all(self, done: int, failed: int, spent: Mapping[str, int]) -> None:
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

    def hold(self, further: Held) -> None:
        """Count that nodes were held for a further while."""
        self.held = self.held.plus(further)


EVERY_S: Final = 1.0
_RATE_S: Final = 10.0

Counts = Callable[[], dict[str, Any]]
"""Returns a run's counts as JSON, ``done`` and ``failed`` among them."""

Write = Callable[[Any], None]
"""LangGraph's stream writer; it does nothing where nobody listens."""


class Meter:
    """Tells counts and a rate at most once a second, whichever shard of the run asks first."""

    def __init__(self) -> None:
        self._seen = deque[tuple[float, int]]()
        self._tellers = dict[object, tuple[Counts, Write]]()
        self._ticking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def telling(self, counts: Counts, write: Write) -> AsyncIterator[None]:
        """Tell again and again while the block runs; arguments as of :meth:`tell`.

        One task tells for all blocks, to whoever came last: thousands of shards wait at a time.
        """
        key = object()
        self._tellers[key] = counts, write
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._again())
        try:
            yield
        finally:
            del self._tellers[key]
            if not self._tellers:
                self._ticking.cancel()
                self._ticking = None

    async def _again(self) -> None:
        while True:
            self.tell(*next(reversed(self._tellers.values())))
            await asyncio.sleep(EVERY_S)

    def tell(self, counts: Counts, write: Write, *, last: bool = False) -> None:
        """Write how far the run is, unless it was told within the last second.

        Args:
            counts: Returns its counts.
            write: Takes the counts as JSON, marked ``"type": "progress"`` and ``"v": 1``, with
                their ``rate`` in items per second over the last ten.
            last: Tell in any case: the run is at its end.
        """
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < EVERY_S and not last:
            return
        said = counts()
        ended = said["done"] + said["failed"]
        self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_S:  # noqa: PLR2004 - a span has two ends
            self._seen.popleft()
        then, before = self._seen[0]
        rate = (ended - before) / (now - then) if now > then else 0.0
        write({"type": "progress", "v": 1, **said, "rate": round(rate, 2)})
