"""What the servers of a node work on, by their own counts, noted in the node's record.

Every server that is ready is asked for vLLM's ``/metrics``, every few seconds and in the first
minutes more often, and one line tells of all of them when something has changed, or once a minute.
Nobody's health depends on it: a server that refuses is not asked again, and one that is slow is
left out of a line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..core.parsing import Gauges, read_metrics
from .events import Record
from .look import fetch
from .plan import NodePlan
from .server import Server

_METRICS: Final = "/metrics"
_OK: Final = 200
_REFUSED: Final = range(400, 500)
_LONGEST_S: Final = 60.0
"""So long nothing is noted where nothing changes."""

_FINE: Final = 32
"""A change is noted from this part of the most that a server ever worked on."""

_LEAST_S: Final = 0.5
_PART: Final = 60
"""Looks are at most this part of the time apart for which the node is served: jobs of a minute
have too few of them else."""

_LAST_S: Final = 1.0


class LoadNotes:
    """Asks a node's servers what they work on, and notes it.

    Args:
        plan: The node's plan.
        servers: Its servers, in the order of their numbers.
        record: Where it is noted.
    """

    def __init__(self, plan: NodePlan, servers: Sequence[Server], record: Record) -> None:
        self._plan, self._servers, self._record = plan, servers, record
        self._mute = set[int]()
        self._most = 0
        self._noted: list[tuple[int, Gauges] | None] = [None] * len(servers)
        self._when = float("-inf")

    async def run(self) -> None:
        """Look again and again."""
        begun = time.monotonic()
        while True:
            await self.look()
            pause = max(_LEAST_S, (time.monotonic() - begun) / _PART)
            await asyncio.sleep(min(self._plan.watching.every_s, pause))

    async def look(self) -> None:
        """Ask all servers that are ready, and note what they say if it is news."""
        told = await asyncio.gather(*map(self._ask, self._servers))
        if not any(told):
            return
        self._most = max(self._most, *(one.running or 0 for one in told if one))
        both = zip(self._servers, told, strict=True)
        now = [None if one is None else (server.starts, one) for server, one in both]
        pairs = zip(self._noted, now, strict=True)
        if time.monotonic() - self._when < _LONGEST_S and not any(self._news(*p) for p in pairs):
            return
        self._when = time.monotonic()
        self._noted = [this or before for before, this in zip(self._noted, now, strict=True)]
        self._record.note(
            "load",
            running=[one and one.running for one in told],
            waiting=[one and one.waiting for one in told],
        )

    async def last(self) -> None:
        """Look once more before the servers end; waits for a second at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await self.look()

    async def _ask(self, server: Server) -> Gauges | None:
        number, watching = server.plan.instance, self._plan.watching
        if not server.ready or number in self._mute:
            return None
        address, key = self._plan.address, self._plan.key
        answer = await fetch(address, server.plan.port, _METRICS, watching.answer_s, key)
        if answer is None:
            return None
        status, body = answer
        if status in _REFUSED:
            self._mute.add(number)
        gauges = read_metrics(body) if status == _OK else None
        return gauges if gauges is not None and gauges.running is not None else None

    def _news(self, before: tuple[int, Gauges] | None, now: tuple[int, Gauges] | None) -> bool:
        """Say whether a server does notably more or less than was noted of this start of it."""
        if now is None:
            return False
        if before is None or before[0] != now[0]:
            return True
        was, this = before[1], now[1]
        change = abs((this.running or 0) - (was.running or 0))
        return (
            bool(was.running) != bool(this.running)
            or bool(was.waiting) != bool(this.waiting)
            or change >= max(1, self._most / _FINE)
        )
