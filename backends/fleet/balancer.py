"""Load balancer: which endpoint a request goes to, who waits, and prefix affinity."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

from ..core.images import drop_images
from ..core.parsing import join_messages
from ..core.protocols import CallLog
from .endpoint import BreakerState, Endpoint
from .policy import AffinityPolicy
from .rate_limit import Quota, TokenNeed

_STALE: Final = 8
"""Entries per endpoint in the heap above which outdated ones are removed."""
_IDLE_S: Final = 0.02
"""A stream that is not read for so many seconds waits for another call of its item."""


class Affinity:
    """Remembers which endpoint first served a prompt prefix, in an LRU cache.

    Args:
        policy: Length of a prefix, and how many are remembered.
    """

    def __init__(self, policy: AffinityPolicy) -> None:
        self.policy = policy
        self._endpoints: OrderedDict[int, Endpoint] = OrderedDict()

    def make_key(self, body: Mapping[str, Any]) -> int:
        """Return a hash of a request's prefix, valid in this process."""
        return hash(join_messages(drop_images(body["messages"]), self.policy.prefix))

    def find_endpoint(self, key: int) -> Endpoint | None:
        """Return the endpoint that first served a prefix and is still alive, or None."""
        endpoint = self._endpoints.get(key)
        if endpoint is None or not endpoint.alive:
            return None
        self._endpoints.move_to_end(key)
        return endpoint

    def record(self, key: int, endpoint: Endpoint) -> None:
        """Record the endpoint of a prefix; one that is only busy keeps its prefixes."""
        home = self._endpoints.get(key)
        if home is None or not home.alive:
            self._endpoints[key] = endpoint
            if len(self._endpoints) > self.policy.keys:
                self._endpoints.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits for an endpoint."""

    future: asyncio.Future[Endpoint]
    avoid: Collection[Endpoint]
    unfit: Collection[Endpoint]
    prefer: Endpoint | None
    need: TokenNeed | None
    item: CallLog | None
    turn: int
    queue: deque[_Waiter]
    prefix: int | None = None


class _HomeQueues:
    """Waiting calls by the endpoint that has their prefix in its cache.

    The calls stay in the balancer's own queue; those that have left it are dropped here later.

    Args:
        affinity: Knows the endpoints of prefixes.
    """

    def __init__(self, affinity: Affinity) -> None:
        self._affinity = affinity
        self._by_home: dict[Endpoint, deque[_Waiter]] = {}
        self._new: deque[_Waiter] = deque()
        self._size = 0

    def add(self, waiter: _Waiter, waiting: int) -> None:
        """Add a call.

        Args:
            waiter: The call.
            waiting: Number of calls in the balancer's queue.
        """
        self._size += 1
        if self._size > 2 * waiting + _STALE:
            self._drop_served()
        if waiter.prefer is None:
            self._new.append(waiter)
        else:
            self._by_home.setdefault(waiter.prefer, deque()).append(waiter)

    def pop(self, endpoint: Endpoint) -> _Waiter | None:
        """Remove and return the call that fits an endpoint best.

        Returns:
            The oldest call whose prefix it has; or else the oldest one whose prefix no endpoint
            has; None if there is neither.
        """
        homed = self._by_home.get(endpoint)
        while homed:
            waiter = homed.popleft()
            self._size -= 1
            if not waiter.future.done():
                return waiter
        while self._new:
            waiter = self._new.popleft()
            if waiter.future.done() or waiter.prefix is None:
                self._size -= 1
                continue
            home = self._affinity.find_endpoint(waiter.prefix)
            if home is None or home is endpoint:
                self._size -= 1
                return waiter
            self._by_home.setdefault(home, deque()).append(waiter)
        return None

    def _drop_served(self) -> None:
        queues = {home: _keep_waiting(queue) for home, queue in self._by_home.items()}
        self._by_home = {home: queue for home, queue in queues.items() if queue}
        self._new = _keep_waiting(self._new)
        self._size = len(self._new) + sum(map(len, self._by_home.values()))


def _keep_waiting(queue: deque[_Waiter]) -> deque[_Waiter]:
    return deque(waiter for waiter in queue if not waiter.future.done())


class LoadBalancer:
    """Assigns endpoints to calls, first come first served.

    With affinity, an endpoint that becomes free gets the oldest waiting call whose prefix it has in
    its cache, or else one whose prefix no endpoint has, or else the oldest one: an endpoint is
    never left idle for the sake of a cache.

    Args:
        endpoints: All members.
        streams: Limit of requests in flight over all endpoints; a call that uses its item's slot is
            not counted.
        on_quota: Called if a call waits for a quota, with the seconds after which ``retry_quotas``
            must be called.
        on_limited: Called when a call must wait although ``streams`` would allow it, and when the
            limit of an endpoint keeps it below its share of the requests.
        affinity: Endpoints by prompt prefix, or None.

    Attributes:
        affinity: The same.
        quota: The quota of the whole process, or None.
        in_flight: Requests in flight.
        long_resting: Endpoints that rest for so long that another endpoint is the better choice.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        streams: int,
        on_quota: Callable[[float], None],
        on_limited: Callable[[], None],
        affinity: Affinity | None = None,
    ) -> None:
        self.quota: Quota | None = None
        self._over_quota: dict[Endpoint, None] = {}
        self._streams = streams
        self.affinity = affinity
        self._slack = (affinity.policy if affinity else AffinityPolicy()).slack
        self._homes = _HomeQueues(affinity) if affinity else None
        self._on_quota = on_quota
        self._on_limited = on_limited
        self._tick = itertools.count()
        self._ranks: dict[Endpoint, int] = {}
        self._heap: list[tuple[float, int, Endpoint]] = []
        self._queue: deque[_Waiter] = deque()
        self._urgent: deque[_Waiter] = deque()
        self._excluding: dict[frozenset[Endpoint], deque[_Waiter]] = {}
        known = [endpoint.latency_s for endpoint in endpoints if endpoint.latency_s]
        self._mean_s = sum(known) / len(known) if known else 0.0
        self._idle = 0
        self._extra = 0
        self._extra_of: dict[int, int] = {}
        self.in_flight = 0
        self._alive: dict[Endpoint, None] = {}
        self.long_resting: set[Endpoint] = set()
        for endpoint in endpoints:
            self.refresh(endpoint)

    @property
    def alive(self) -> Set[Endpoint]:
        """Return the endpoints that are in use, in the order in which they came into use."""
        return self._alive.keys()

    @property
    def is_starved(self) -> bool:
        """Return True if calls wait although ``streams`` would allow them."""
        waits = self._queue or self._excluding or self._urgent
        return bool(waits) and self.in_flight - self._extra < self._streams

    def is_behind(self, endpoint: Endpoint) -> bool:
        """Return True if only its initial limit keeps an endpoint below the mean of all.

        It has come back, or joined, while the others had all requests in flight: no call waits,
        which would raise its limit.
        """
        return (
            endpoint.in_flight * len(self._alive) < self.in_flight
            and endpoint.in_flight >= endpoint.width
            and endpoint.limit.is_exploring
        )

    @property
    def contended(self) -> bool:
        """Return True if calls wait that any endpoint could serve."""
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        """Return the number of calls that wait for an endpoint."""
        queues = (self._queue, self._urgent, *self._excluding.values())
        return sum(map(len, queues))

    @property
    def is_idle(self) -> bool:
        """Return True if no request in flight progresses on its own, and none waits to be sent."""
        return self.in_flight == self._idle and not self.waiting

    @property
    def has_endpoint(self) -> bool:
        """Return True if an endpoint is alive and does not pause for long."""
        return not self.alive <= self.long_resting

    @property
    def is_deadlocked(self) -> bool:
        """Return True if all requests in flight are unread streams, and time does not help."""
        return (
            0 < self.in_flight == self._idle
            and bool(self.alive)
            and not any(endpoint.resting for endpoint in self.alive)
        )

    async def acquire(  # noqa: PLR0913, PLR0917 - an object for them costs time in each call
        self,
        avoid: Collection[Endpoint] = (),
        prefer: Endpoint | None = None,
        need: TokenNeed | None = None,
        item: CallLog | None = None,
        unfit: Collection[Endpoint] = (),
        prefix: int | None = None,
    ) -> Endpoint:
        """Wait for the best endpoint and count one request in flight to it.

        Args:
            avoid: Endpoints to pass over while any other is alive.
            prefer: An endpoint to acquire if it is free and not much busier than the best.
            need: The request's tokens at most, for quotas; None: none counts tokens.
            item: The item that the request belongs to, if any.
            unfit: Those of ``avoid`` that cannot serve the request at all.
            prefix: Key of the prefix of its prompt, with affinity.
        """
        if prefix is not None and prefer is None and self.affinity is not None:
            prefer = self.affinity.find_endpoint(prefix)
        if item is not None and item.in_flight and item.stalled:
            endpoint = self._choose_for_stalled(avoid, prefer, unfit, need)
        else:
            endpoint = None if self._queue else self._choose(avoid, prefer, unfit, need)
        if endpoint is not None:
            return self._start(endpoint, item, prefix)
        waiter = self._enqueue(avoid, prefer, need, item, unfit, prefix)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._cancel_waiter(waiter)
            raise
        finally:
            if item is not None:
                item.queued -= 1

    def _enqueue(  # noqa: PLR0913, PLR0917 - as above
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None,
        need: TokenNeed | None,
        item: CallLog | None,
        unfit: Collection[Endpoint],
        prefix: int | None,
    ) -> _Waiter:
        stalled = item is not None and item.in_flight > 0 and item.stalled
        if stalled:
            queue = self._urgent
        else:
            queue = self._excluding.setdefault(frozenset(avoid), deque()) if avoid else self._queue
        future = asyncio.get_running_loop().create_future()
        turn = next(self._tick)
        waiter = _Waiter(future, avoid, unfit, prefer, need, item, turn, queue, prefix)
        queue.append(waiter)
        if prefix is not None and self._homes is not None and queue is self._queue:
            self._homes.add(waiter, len(queue))
        if item is not None:
            item.queued += 1
            item.queue = self
        if self.is_starved:
            self._on_limited()
        if avoid:
            self._serve_waiters()  # if too many calls exclude endpoints, they drop their exclusions
        return waiter

    def _cancel_waiter(self, waiter: _Waiter) -> None:
        """Release what a cancelled call holds: its queue position, or an acquired endpoint."""
        if waiter.future.done() and not waiter.future.cancelled():
            if waiter.future.exception() is None:
                tokens = waiter.need.tokens if waiter.need is not None else 0
                self.release(waiter.future.result(), None, waiter.item, tokens, None)
        elif waiter in waiter.queue:
            waiter.queue.remove(waiter)
            self._drop_empty(waiter)

    def release(
        self,
        endpoint: Endpoint,
        seconds: float | None = None,
        item: CallLog | None = None,
        tokens: int = 0,
        used: int | None = 0,
    ) -> None:
        """Count one request less in flight.

        Args:
            endpoint: The acquired endpoint.
            seconds: How long its answer took, or None if it gave none.
            item: The item for which it was acquired.
            tokens: The tokens with which it was acquired.
            used: Those that it used, at most; None if it was never sent.
        """
        if self.quota is not None:
            _settle(self.quota, tokens, used)
        if endpoint.quota is not None:
            _settle(endpoint.quota, tokens, used)
            self._over_quota.pop(endpoint, None)
            endpoint.over_quota = False
        self.in_flight -= 1
        endpoint.in_flight -= 1
        endpoint.flight.end()
        if item is not None:
            item.in_flight -= 1
            if self._extra_of:
                self._release_extra(item)
        if seconds is not None:
            endpoint.record_latency(seconds)
            self._mean_s += (seconds - self._mean_s) * (0.02 if self._mean_s else 1.0)
        self.refresh(endpoint)
        if item is not None and item.queued and item.in_flight:
            self._serve_item(item)

    def _release_extra(self, item: CallLog) -> None:
        """Count a request beyond ``streams`` as ended; the item's open requests keep its slot."""
        count = self._extra_of.get(id(item), 0)
        if count:
            self._extra -= 1
            if count == 1:
                del self._extra_of[id(item)]
            else:
                self._extra_of[id(item)] = count - 1

    def mark_stream_idle(self, item: CallLog | None) -> None:
        """Record that a stream of an item is not being read."""
        self._idle += 1
        if item is None:
            return
        item.idle_streams += 1
        if item.queued and item.stalled:
            asyncio.get_running_loop().call_later(_IDLE_S, self._check_idle_item, item)

    def mark_stream_read(self, item: CallLog | None) -> None:
        """Record that a stream of an item is read again, or has ended."""
        self._idle -= 1
        if item is not None:
            item.idle_streams -= 1

    def _check_idle_item(self, item: CallLog) -> None:
        """Serve an item whose streams have waited for a while."""
        if item.in_flight and item.queued:
            self._serve_item(item)

    def lend(self) -> None:
        """Serve the oldest waiting call, although unread streams hold all slots."""
        queues = (self._urgent, self._queue, *self._excluding.values())
        waiting = [w for queue in queues for w in queue if not w.future.done()]
        if waiting:
            self._serve_stalled(min(waiting, key=lambda waiter: waiter.turn))

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint again after its state changed, and serve waiting calls."""
        if endpoint.alive:
            self._alive[endpoint] = None
        else:
            self._alive.pop(endpoint, None)
        self._rank(endpoint)
        self._serve_waiters()

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Raise a new error in every waiting call."""
        queues = [self._queue, self._urgent, *self._excluding.values()]
        self._excluding.clear()
        for queue in queues:
            while queue:
                waiter = queue.popleft()
                if not waiter.future.done():
                    waiter.future.set_exception(error())

    def _rank(self, endpoint: Endpoint) -> None:
        tick = next(self._tick)
        self._ranks[endpoint] = tick
        if endpoint.free:
            heapq.heappush(self._heap, (self._score(endpoint), tick, endpoint))
        if len(self._heap) > _STALE * len(self._ranks) + _STALE:
            # Remove entries of older ranks that never reach the top.
            self._heap = [e for e in self._heap if self._ranks[e[2]] == e[1]]
            heapq.heapify(self._heap)

    def _score(self, endpoint: Endpoint) -> float:
        latency = endpoint.latency_s or self._mean_s or 1.0
        return (endpoint.in_flight + endpoint.foreign_load + 1) * latency / endpoint.spec.weight

    def _find_excluded(
        self, avoid: Collection[Endpoint], unfit: Collection[Endpoint]
    ) -> Collection[Endpoint]:
        """Return the endpoints that a call passes over, depending on which others are alive."""
        near = self.alive - self.long_resting if self.long_resting else self.alive
        if any(endpoint not in avoid for endpoint in near):
            return avoid
        return () if all(endpoint in unfit for endpoint in self.alive) else unfit

    def _choose(
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None = None,
        unfit: Collection[Endpoint] = (),
        need: TokenNeed | None = None,
    ) -> Endpoint | None:
        """Choose the best endpoint whose quota covers a request, and reserve it there."""
        while (endpoint := self._find_best(avoid, prefer, unfit)) is not None:
            if self._reserve(endpoint, need):
                return endpoint
            self._rank(endpoint)
            if not endpoint.over_quota:
                return None  # the quota of the process does not cover it
        return None

    def _reserve(
        self,
        endpoint: Endpoint,
        need: TokenNeed | None,
        *,
        count_reserved: bool = True,
        waits: bool = True,
    ) -> bool:
        """Reserve a request with the quotas that apply to it; return False if they do not cover it.

        Args:
            endpoint: Where it would be sent.
            need: Its tokens at most; they are estimated now.
            count_reserved: Whether open reservations count.
            waits: Whether it is tried again later.
        """
        own, shared = endpoint.quota, self.quota
        if own is None and shared is None:
            return True
        tokens = need.estimate() if need is not None else 0
        if own is not None and (wait := own.reserve(tokens, count_reserved=count_reserved)):
            if waits:
                endpoint.over_quota = True
                self._over_quota[endpoint] = None
                self._await_quota(own, wait)
            return False
        if shared is not None and (wait := shared.reserve(tokens, count_reserved=count_reserved)):
            if own is not None:
                own.cancel(tokens)
            if waits:
                self._await_quota(shared, wait)
            return False
        return True

    def _await_quota(self, quota: Quota, seconds: float) -> None:
        quota.on_free(self.retry_quotas)
        if seconds < math.inf:
            self._on_quota(seconds)

    def retry_quotas(self) -> None:
        """Serve calls that waited for a quota, as far as it covers them now."""
        for endpoint in self._over_quota:
            endpoint.over_quota = False
            self._rank(endpoint)
        self._over_quota.clear()
        self._serve_waiters()

    def _find_best(
        self, avoid: Collection[Endpoint], prefer: Endpoint | None, unfit: Collection[Endpoint]
    ) -> Endpoint | None:
        if self.in_flight - self._extra >= self._streams:
            return None
        if avoid:
            avoid = self._find_excluded(avoid, unfit)
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
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None,
        unfit: Collection[Endpoint],
        need: TokenNeed | None,
    ) -> Endpoint | None:
        """Choose for a call that uses its item's slot: it ignores limits but not pauses.

        Quotas must cover it, but what is reserved for open requests does not count: they may wait
        for this one.
        """
        endpoint = self._choose(avoid, prefer, unfit, need)
        if endpoint is not None:
            return endpoint
        excluded = self._find_excluded(avoid, unfit)
        able = [e for e in self.alive if not e.resting and e not in excluded]
        if not able:
            return None

        def rank(one: Endpoint) -> tuple[bool, bool, float]:
            return not one.free, one.breaker.state is not BreakerState.CLOSED, self._score(one)

        for one in sorted(able, key=rank):
            if self._reserve(one, need, count_reserved=False):
                return one
        return None

    def _start(
        self, endpoint: Endpoint, item: CallLog | None, prefix: int | None = None
    ) -> Endpoint:
        if prefix is not None and self.affinity is not None:
            self.affinity.record(prefix, endpoint)
        if item is not None:
            item.in_flight += 1
            if self.in_flight - self._extra >= self._streams:
                self._extra += 1
                self._extra_of[id(item)] = self._extra_of.get(id(item), 0) + 1
        self.in_flight += 1
        endpoint.in_flight += 1
        endpoint.flight.begin()
        self._rank(endpoint)
        if self.is_behind(endpoint):
            self._on_limited()
        return endpoint

    def try_acquire(
        self,
        avoid: Collection[Endpoint],
        need: TokenNeed | None = None,
        item: CallLog | None = None,
    ) -> Endpoint | None:
        """Acquire the fastest free endpoint; return None if none is free or a call waits.

        Load weighs less than in ``acquire``: free endpoints would otherwise idle.
        """
        if self._queue or self.in_flight - self._extra >= self._streams:
            return None
        free = (e for e in self.alive if e.free and e not in avoid)
        best = min(free, key=self._expected_s, default=None)
        if best is None or not self._reserve(best, need, waits=False):
            return None
        return self._start(best, item)

    def _expected_s(self, endpoint: Endpoint) -> float:
        latency = endpoint.latency_s or self._mean_s
        return latency * (1.0 + endpoint.in_flight / endpoint.width)

    def _serve_waiters(self) -> None:
        """Assign free endpoints to the waiting calls, oldest first."""
        if self._urgent:
            self._serve_urgent()
        while (self._queue or self._excluding) and self.in_flight - self._extra < self._streams:
            if self._excluding:
                if not self._serve_oldest():
                    return
                continue
            waiter = self._queue[0]
            if waiter.future.done():
                self._queue.popleft()
                continue
            endpoint = self._choose((), waiter.prefer, (), waiter.need)
            if endpoint is None:
                return
            self._grant(self._find_better(waiter, endpoint), endpoint)

    def _find_better(self, oldest: _Waiter, endpoint: Endpoint) -> _Waiter:
        """Return the waiting call that an endpoint serves best, else the oldest one.

        With a quota it is the oldest one, whose tokens are reserved already.
        """
        reserved = self.quota is not None or endpoint.quota is not None
        if self._homes is None or reserved or oldest.prefer is endpoint:
            return oldest
        found = self._homes.pop(endpoint)
        return found if found is not None and found.queue is self._queue else oldest

    def _serve_oldest(self) -> bool:
        """Serve the oldest call that fits a free endpoint; return whether there is one."""
        for key, queue in list(self._excluding.items()):
            while queue and queue[0].future.done():
                queue.popleft()
            if not queue:
                del self._excluding[key]
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        heads = [queue[0] for queue in (self._queue, *self._excluding.values()) if queue]
        heads.sort(key=lambda waiter: waiter.turn)
        for waiter in heads:
            endpoint = self._choose(waiter.avoid, waiter.prefer, waiter.unfit, waiter.need)
            if endpoint is not None:
                self._grant(waiter, endpoint)
                return True
            if not waiter.avoid:
                break  # nothing is free
        return self._drop_exclusions(heads)

    def _drop_exclusions(self, heads: Sequence[_Waiter]) -> bool:
        """Serve a call by an endpoint that it excludes, once such calls take half of all slots.

        The number of items in flight is limited: other items would soon have no slot left.
        """
        if 2 * sum(map(len, self._excluding.values())) < self._streams:
            return False
        for waiter in heads:
            if waiter.avoid and len(waiter.avoid) > len(waiter.unfit):
                endpoint = self._choose(waiter.unfit, waiter.prefer, waiter.unfit, waiter.need)
                if endpoint is not None:
                    self._grant(waiter, endpoint)
                    return True
        return False

    def _serve_urgent(self) -> None:
        """Serve calls that use their items' slots, as soon as an endpoint accepts requests."""
        for waiter in list(self._urgent):
            self._serve_stalled(waiter)

    def _serve_item(self, item: CallLog) -> None:
        """Serve the oldest waiting call of an item whose open requests wait for it."""
        if not item.stalled:
            return
        queues = (self._urgent, self._queue, *self._excluding.values())
        mine = [w for queue in queues for w in queue if w.item is item and not w.future.done()]
        if mine:
            self._serve_stalled(min(mine, key=lambda waiter: waiter.turn))

    def _serve_stalled(self, waiter: _Waiter) -> None:
        if waiter.future.done():
            waiter.queue.remove(waiter)
            return
        endpoint = self._choose_for_stalled(waiter.avoid, waiter.prefer, waiter.unfit, waiter.need)
        if endpoint is not None:
            self._grant(waiter, endpoint)
        elif waiter.queue is not self._urgent:
            waiter.queue.remove(waiter)
            self._drop_empty(waiter)
            waiter.queue = self._urgent
            self._urgent.append(waiter)

    def _grant(self, waiter: _Waiter, endpoint: Endpoint) -> None:
        if waiter.queue[0] is waiter:
            waiter.queue.popleft()
        else:
            waiter.queue.remove(waiter)
        self._drop_empty(waiter)
        waiter.future.set_result(self._start(endpoint, waiter.item, waiter.prefix))

    def _drop_empty(self, waiter: _Waiter) -> None:
        """Remove a queue of calls with exclusions when it is empty."""
        if waiter.avoid and not waiter.queue and waiter.queue is not self._urgent:
            self._excluding.pop(frozenset(waiter.avoid), None)


def _settle(quota: Quota, tokens: int, used: int | None) -> None:
    if used is None:
        quota.cancel(tokens)
    else:
        quota.settle(tokens, used)
