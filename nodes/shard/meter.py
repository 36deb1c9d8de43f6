"""How a run goes on, for LangGraph's ``custom`` stream."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

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
