"""Which endpoint gets the next request, and who waits for how long.

Endpoints stand in a heap by ``(outstanding + 1) x smoothed latency / weight``, the expected time
to an answer; where endpoints tell their load, the requests of others count as outstanding. An
entry is never moved: a change of rank pushes a new entry, and entries of an older rank are dropped
when they surface, so that a choice costs O(log n) amortised.

Calls wait in three kinds of lines. A call that accepts every endpoint waits in one queue. Calls
that exclude endpoints wait in one line per set of exclusions, so that a call whose only free
endpoints are excluded delays no other call. A call of an item whose other requests are all streams
that nobody reads uses the item's own slot: those streams may wait for this very call, and would
never end.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from ..core.protocols import CallLog
from .breaker import State
from .endpoint import Endpoint

_STALE: Final = 8
"""Entries per endpoint in the heap before the old ones are swept out."""
_IDLE_S: Final = 0.02
"""A stream that is not read for so many seconds waits for something else of its item."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits for an endpoint."""

    future: asyncio.Future[Endpoint]
    avoid: Collection[Endpoint]
    unfit: Collection[Endpoint]
    prefer: Endpoint | None
    tokens: int
    item: CallLog | None
    turn: int
    line: deque[_Waiter]


class Dispatcher:
    """Hands out endpoints, first come first served.

    Args:
        endpoints: All members.
        streams: Most requests in flight over all endpoints; a call that uses its item's slot is
            not counted.
        paced: Called with an endpoint that has a quota of its own, and a request's tokens, when
            it is taken.
        starved: Called when a call must wait although ``streams`` would allow it.
        slack: A preferred endpoint is passed over when its expected time to an answer is more
            than this factor above the best one's.

    Attributes:
        in_flight: Requests in flight.
        alive: Endpoints that are in use.
        far: Endpoints that rest for so long that it is better to go elsewhere.
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
        self._urgent: deque[_Waiter] = deque()
        self._picky: dict[frozenset[Endpoint], deque[_Waiter]] = {}
        self._mean_s = 0.0
        self._idle = 0
        self._extra = 0
        self._extra_of: dict[int, int] = {}
        self.in_flight = 0
        self.alive: set[Endpoint] = set()
        self.far: set[Endpoint] = set()
        for endpoint in endpoints:
            self.refresh(endpoint)

    @property
    def hungry(self) -> bool:
        """Whether calls wait that ``streams`` would allow."""
        waits = self._queue or self._picky or self._urgent
        return bool(waits) and self.in_flight - self._extra < self._streams

    @property
    def contended(self) -> bool:
        """Whether calls wait that any endpoint could serve."""
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        """Calls that wait for an endpoint."""
        lines = (self._queue, self._urgent, *self._picky.values())
        return sum(map(len, lines))

    @property
    def quiet(self) -> bool:
        """Whether no request goes on by itself, and none waits to be sent."""
        return self.in_flight == self._idle and not self.waiting

    @property
    def jammed(self) -> bool:
        """Whether all requests in flight are streams that nobody reads, and no time helps."""
        return (
            0 < self.in_flight == self._idle
            and bool(self.alive)
            and not any(endpoint.resting for endpoint in self.alive)
        )

    async def take(
        self,
        avoid: Collection[Endpoint] = (),
        prefer: Endpoint | None = None,
        tokens: int = 0,
        item: CallLog | None = None,
        unfit: Collection[Endpoint] = (),
    ) -> Endpoint:
        """Wait for the best endpoint and count one request in flight to it.

        Args:
            avoid: Endpoints to pass over while any other is alive.
            prefer: An endpoint to take when it is free and not much busier than the best.
            tokens: The request's tokens, for endpoints with a quota of their own.
            item: The item on whose behalf the request is made, if any.
            unfit: Those of ``avoid`` that cannot serve the request at all.
        """
        if item is not None and item.open and item.stalled:
            endpoint = self._choose_for_stalled(avoid, prefer, unfit)
        else:
            endpoint = None if self._queue else self._choose(avoid, prefer, unfit)
        if endpoint is not None:
            return self._start(endpoint, tokens, item)
        waiter = self._enqueue(avoid, prefer, tokens, item, unfit)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        finally:
            if item is not None:
                item.queued -= 1

    def _enqueue(
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None,
        tokens: int,
        item: CallLog | None,
        unfit: Collection[Endpoint],
    ) -> _Waiter:
        stalled = item is not None and item.open > 0 and item.stalled
        if stalled:
            line = self._urgent
        else:
            line = self._picky.setdefault(frozenset(avoid), deque()) if avoid else self._queue
        future = asyncio.get_running_loop().create_future()
        turn = next(self._tick)
        waiter = _Waiter(future, avoid, unfit, prefer, tokens, item, turn, line)
        line.append(waiter)
        if item is not None:
            item.queued += 1
            item.line = self
        if self.hungry:
            self._starved()
        if avoid:
            self._serve()  # too many calls that exclude endpoints give their exclusions up
        return waiter

    def _withdraw(self, waiter: _Waiter) -> None:
        """Undo what a cancelled call holds: its place in the queue, or the endpoint it won."""
        if waiter.future.done() and not waiter.future.cancelled():
            if waiter.future.exception() is None:
                self.give(waiter.future.result(), item=waiter.item)
        elif waiter in waiter.line:
            waiter.line.remove(waiter)
            self._drop_empty(waiter)

    def give(
        self, endpoint: Endpoint, seconds: float | None = None, item: CallLog | None = None
    ) -> None:
        """Count one request less in flight.

        Args:
            endpoint: The endpoint that was taken.
            seconds: How long its answer took, or None when it gave none.
            item: The item on whose behalf it was taken.
        """
        self.in_flight -= 1
        endpoint.outstanding -= 1
        if item is not None:
            item.open -= 1
            if self._extra_of:
                self._give_extra(item)
        if seconds is not None:
            endpoint.observe(seconds)
            self._mean_s += (seconds - self._mean_s) * (0.02 if self._mean_s else 1.0)
        self.refresh(endpoint)
        if item is not None and item.queued and item.open:
            self._serve_item(item)

    def _give_extra(self, item: CallLog) -> None:
        """Take a request beyond ``streams`` back; what the item still has open keeps its slot."""
        count = self._extra_of.get(id(item), 0)
        if count:
            self._extra -= 1
            if count == 1:
                del self._extra_of[id(item)]
            else:
                self._extra_of[id(item)] = count - 1

    def pause(self, item: CallLog | None) -> None:
        """Take note that nobody reads a stream of an item at the moment."""
        self._idle += 1
        if item is None:
            return
        item.idle += 1
        if item.queued and item.stalled:
            asyncio.get_running_loop().call_later(_IDLE_S, self._look_at, item)

    def resume(self, item: CallLog | None) -> None:
        """Take note that a stream of an item is read again, or has ended."""
        self._idle -= 1
        if item is not None:
            item.idle -= 1

    def _look_at(self, item: CallLog) -> None:
        """Let an item go on whose streams have waited for a while."""
        if item.open and item.queued:
            self._serve_item(item)

    def lend(self) -> None:
        """Serve the oldest waiting call, though streams that nobody reads hold all slots."""
        lines = (self._urgent, self._queue, *self._picky.values())
        waiting = [w for line in lines for w in line if not w.future.done()]
        if waiting:
            self._serve_stalled(min(waiting, key=lambda waiter: waiter.turn))

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint anew after its state changed, and serve who waits."""
        (self.alive.add if endpoint.alive else self.alive.discard)(endpoint)
        self._rank(endpoint)
        self._serve()

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Raise a new error in every waiting call."""
        lines = [self._queue, self._urgent, *self._picky.values()]
        self._picky.clear()
        for line in lines:
            while line:
                waiter = line.popleft()
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

    def _excluded(
        self, avoid: Collection[Endpoint], unfit: Collection[Endpoint]
    ) -> Collection[Endpoint]:
        """Return which endpoints a call passes over, given which others there are."""
        near = self.alive - self.far if self.far else self.alive
        if not near.issubset(avoid):
            return avoid
        return () if self.alive.issubset(unfit) else unfit

    def _choose(
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None = None,
        unfit: Collection[Endpoint] = (),
    ) -> Endpoint | None:
        if self.in_flight - self._extra >= self._streams:
            return None
        if avoid:
            avoid = self._excluded(avoid, unfit)
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

    def _choose_for_stalled(
        self, avoid: Collection[Endpoint], prefer: Endpoint | None, unfit: Collection[Endpoint]
    ) -> Endpoint | None:
        """Choose for a call that uses its item's slot: full lanes do not stop it, pauses do."""
        endpoint = self._choose(avoid, prefer, unfit)
        if endpoint is not None:
            return endpoint
        excluded = self._excluded(avoid, unfit)
        able = [e for e in self.alive if not e.resting and e not in excluded]
        if not able:
            return None

        def rank(one: Endpoint) -> tuple[bool, bool, float]:
            return not one.free, one.breaker.state is not State.CLOSED, self._score(one)

        return min(able, key=rank)

    def _start(self, endpoint: Endpoint, tokens: int, item: CallLog | None) -> Endpoint:
        if item is not None:
            item.open += 1
            if self.in_flight - self._extra >= self._streams:
                self._extra += 1
                self._extra_of[id(item)] = self._extra_of.get(id(item), 0) + 1
        self.in_flight += 1
        endpoint.outstanding += 1
        if endpoint.bucket is not None or endpoint.tokens is not None:
            self._paced(endpoint, tokens)
        self._rank(endpoint)
        return endpoint

    def take_now(
        self, avoid: Collection[Endpoint], tokens: int = 0, item: CallLog | None = None
    ) -> Endpoint | None:
        """Take the quickest endpoint that is free, or None when none is, or somebody waits.

        The load is looked at less than in ``take``: what is free would idle otherwise.
        """
        if self._queue or self.in_flight - self._extra >= self._streams:
            return None
        free = (e for e in self.alive if e.free and e not in avoid)
        best = min(free, key=self._expected_s, default=None)
        return None if best is None else self._start(best, tokens, item)

    def _expected_s(self, endpoint: Endpoint) -> float:
        latency = endpoint.latency_s or self._mean_s
        return latency * (1.0 + endpoint.outstanding / endpoint.width)

    def _serve(self) -> None:
        """Hand free endpoints to the calls that wait, oldest first."""
        if self._urgent:
            self._serve_urgent()
        while (self._queue or self._picky) and self.in_flight - self._extra < self._streams:
            if self._picky:
                if not self._serve_lines():
                    return
                continue
            waiter = self._queue[0]
            if waiter.future.done():
                self._queue.popleft()
                continue
            endpoint = self._choose((), waiter.prefer)
            if endpoint is None:
                return
            self._grant(waiter, endpoint)

    def _serve_lines(self) -> bool:
        """Serve the oldest call that a free endpoint suits; say whether there is one."""
        for key, line in list(self._picky.items()):
            while line and line[0].future.done():
                line.popleft()
            if not line:
                del self._picky[key]
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        heads = [line[0] for line in (self._queue, *self._picky.values()) if line]
        heads.sort(key=lambda waiter: waiter.turn)
        for waiter in heads:
            endpoint = self._choose(waiter.avoid, waiter.prefer, waiter.unfit)
            if endpoint is not None:
                self._grant(waiter, endpoint)
                return True
            if not waiter.avoid:
                break  # nothing is free
        return self._give_up_exclusions(heads)

    def _give_up_exclusions(self, heads: Sequence[_Waiter]) -> bool:
        """Serve a call by an endpoint that it excludes, once such calls take half of all places.

        The number of items in flight is bounded: other items would soon have no place left.
        """
        if 2 * sum(map(len, self._picky.values())) < self._streams:
            return False
        for waiter in heads:
            if waiter.avoid and len(waiter.avoid) > len(waiter.unfit):
                endpoint = self._choose(waiter.unfit, waiter.prefer, waiter.unfit)
                if endpoint is not None:
                    self._grant(waiter, endpoint)
                    return True
        return False

    def _serve_urgent(self) -> None:
        """Serve calls that use their items' slots, as soon as an endpoint takes requests."""
        for waiter in list(self._urgent):
            self._serve_stalled(waiter)

    def _serve_item(self, item: CallLog) -> None:
        """Serve the oldest waiting call of an item whose open requests wait for it."""
        if not item.stalled:
            return
        lines = (self._urgent, self._queue, *self._picky.values())
        mine = [w for line in lines for w in line if w.item is item and not w.future.done()]
        if mine:
            self._serve_stalled(min(mine, key=lambda waiter: waiter.turn))

    def _serve_stalled(self, waiter: _Waiter) -> None:
        if waiter.future.done():
            waiter.line.remove(waiter)
            return
        endpoint = self._choose_for_stalled(waiter.avoid, waiter.prefer, waiter.unfit)
        if endpoint is not None:
            self._grant(waiter, endpoint)
        elif waiter.line is not self._urgent:
            waiter.line.remove(waiter)
            self._drop_empty(waiter)
            waiter.line = self._urgent
            self._urgent.append(waiter)

    def _grant(self, waiter: _Waiter, endpoint: Endpoint) -> None:
        if waiter.line[0] is waiter:
            waiter.line.popleft()
        else:
            waiter.line.remove(waiter)
        self._drop_empty(waiter)
        waiter.future.set_result(self._start(endpoint, waiter.tokens, waiter.item))

    def _drop_empty(self, waiter: _Waiter) -> None:
        """Forget a line of exclusions when nobody is left in it."""
        if waiter.avoid and not waiter.line and waiter.line is not self._urgent:
            self._picky.pop(frozenset(waiter.avoid), None)
