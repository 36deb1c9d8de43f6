"""Which endpoint gets the next request, and who waits for how long.

Endpoints stand in a heap by ``(outstanding + 1) x smoothed latency / weight``, the expected time
to an answer; where endpoints tell their load, the requests of others count as outstanding. An
entry is never moved: a change of rank pushes a new entry, and entries of an older rank are dropped
when they surface, so that a choice costs O(log n) amortised.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from .endpoint import Endpoint

_STALE: Final = 8
"""Entries per endpoint in the heap before the old ones are swept out."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits for an endpoint."""

    future: asyncio.Future[Endpoint]
    avoid: Collection[Endpoint]
    prefer: Endpoint | None
    tokens: int


class Dispatcher:
    """Hands out endpoints, first come first served.

    Args:
        endpoints: All members.
        streams: Most requests in flight over all endpoints.
        paced: Called with an endpoint that has a quota of its own, and a request's tokens, when
            it is taken.
        starved: Called when a call must wait although ``streams`` would allow it.
        slack: A preferred endpoint is passed over when its expected time to an answer is more
            than this factor above the best one's.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        streams: int,
        paced: Callable[[Endpoint, int], None],
        starved: Callable[[], None],
        slack: float = 2.0,
    ) -> None:
        self._streams = streams
        self._slack = slack
        self._paced = paced
        self._starved = starved
        self._tick = itertools.count()
        self._ranks: dict[Endpoint, int] = {}
        self._heap: list[tuple[float, int, Endpoint]] = []
        self._queue: deque[_Waiter] = deque()
        self._mean_s = 0.0
        self.in_flight = 0
        self.alive: set[Endpoint] = set()
        for endpoint in endpoints:
            self.refresh(endpoint)

    @property
    def hungry(self) -> bool:
        """Whether calls wait that ``streams`` would allow."""
        return bool(self._queue) and self.in_flight < self._streams

    @property
    def waiting(self) -> int:
        """Calls that wait for an endpoint."""
        return len(self._queue)

    async def take(
        self,
        avoid: Collection[Endpoint] = (),
        prefer: Endpoint | None = None,
        tokens: int = 0,
    ) -> Endpoint:
        """Wait for the best endpoint and count one request in flight to it.

        Args:
            avoid: Endpoints to pass over while any other is alive.
            prefer: An endpoint to take when it is free and not much busier than the best.
            tokens: The request's tokens, for endpoints with a quota of their own.
        """
        if not self._queue and (endpoint := self._choose(avoid, prefer)) is not None:
            return self._start(endpoint, tokens)
        future = asyncio.get_running_loop().create_future()
        waiter = _Waiter(future, avoid, prefer, tokens)
        self._queue.append(waiter)
        if self.hungry:
            self._starved()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter) -> None:
        """Undo what a cancelled call holds: its place in the queue, or the endpoint it won."""
        if waiter.future.done() and not waiter.future.cancelled():
            if waiter.future.exception() is None:
                self.give(waiter.future.result())
        elif waiter in self._queue:
            self._queue.remove(waiter)

    def give(self, endpoint: Endpoint, seconds: float | None = None) -> None:
        """Count one request less in flight.

        Args:
            endpoint: The endpoint that was taken.
            seconds: How long its answer took, or None when it gave none.
        """
        self.in_flight -= 1
        endpoint.outstanding -= 1
        if seconds is not None:
            endpoint.observe(seconds)
            self._mean_s += (seconds - self._mean_s) * (0.02 if self._mean_s else 1.0)
        self.refresh(endpoint)

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint anew after its state changed, and serve who waits."""
        (self.alive.add if endpoint.alive else self.alive.discard)(endpoint)
        self._rank(endpoint)
        self._serve()

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Raise a new error in every waiting call."""
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(error())

    def _rank(self, endpoint: Endpoint) -> None:
        tick = next(self._tick)
        self._ranks[endpoint] = tick
        if endpoint.free:
            heapq.heappush(self._heap, (self._score(endpoint), tick, endpoint))
        if len(self._heap) > _STALE * len(self._ranks) + _STALE:
            # Entries of older ranks that never surface are swept out.
            self._heap = [e for e in self._heap if self._ranks[e[2]] == e[1]]
            heapq.heapify(self._heap)

    def _score(self, endpoint: Endpoint) -> float:
        latency = endpoint.latency_s or self._mean_s or 1.0
        return (endpoint.outstanding + endpoint.foreign + 1) * latency / endpoint.spec.weight

    def _choose(
        self, avoid: Collection[Endpoint], prefer: Endpoint | None = None
    ) -> Endpoint | None:
        if self.in_flight >= self._streams:
            return None
        if avoid and self.alive.issubset(avoid):
            avoid = ()
        passed: list[tuple[float, int, Endpoint]] = []
        chosen: Endpoint | None = None
        while self._heap and chosen is None:
            entry = heapq.heappop(self._heap)
            if self._ranks[entry[2]] != entry[1] or not entry[2].free:
                continue
            if entry[2] in avoid:
                passed.append(entry)
            else:
                chosen = entry[2]
        if (
            prefer is not None
            and prefer is not chosen
            and chosen is not None
            and prefer.free
            and prefer not in avoid
            and self._score(prefer) <= self._slack * self._score(chosen)
        ):
            self._rank(chosen)
            chosen = prefer
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return chosen

    def _start(self, endpoint: Endpoint, tokens: int = 0) -> Endpoint:
        self.in_flight += 1
        endpoint.outstanding += 1
        if endpoint.bucket is not None or endpoint.tokens is not None:
            self._paced(endpoint, tokens)
        self._rank(endpoint)
        return endpoint

    def take_now(self, avoid: Collection[Endpoint], tokens: int = 0) -> Endpoint | None:
        """Take the quickest endpoint that is free, or None when none is, or somebody waits.

        The load is looked at less than in ``take``: what is free would idle otherwise.
        """
        if self._queue or self.in_flight >= self._streams:
            return None
        free = (e for e in self.alive if e.free and e not in avoid)
        best = min(free, key=self._expected_s, default=None)
        return None if best is None else self._start(best, tokens)

    def _expected_s(self, endpoint: Endpoint) -> float:
        latency = endpoint.latency_s or self._mean_s
        return latency * (1.0 + endpoint.outstanding / endpoint.width)

    def _serve(self) -> None:
        """Hand free endpoints to the calls that wait, oldest first."""
        while self._queue and self.in_flight < self._streams:
            waiter = self._queue[0]
            if waiter.future.done():
                self._queue.popleft()
                continue
            endpoint = self._choose(waiter.avoid, waiter.prefer)
            if endpoint is None:
                return
            self._queue.popleft()
            waiter.future.set_result(self._start(endpoint, waiter.tokens))
