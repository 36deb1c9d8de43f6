"""Load balancer with prefix affinity, and the health monitor that drives it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from ..core.errors import EndpointError, PromptTooLongError, RunStoppedError
from ..core.protocols import CallLog
from .endpoint import BreakerState, Endpoint
from .failures import BreakerEffect, Failure, RetryAction, make_refused_item_error
from .policy import AffinityPolicy, FleetPolicy
from .transport import Transport

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
    queue: deque[_Waiter]


class LoadBalancer:
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
        long_resting: Endpoints that rest for so long that it is better to go elsewhere.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        streams: int,
        on_quota: Callable[[Endpoint, int], None],
        on_starved: Callable[[], None],
        slack: float = 2.0,
    ) -> None:
        self._streams = streams
        self._slack = slack
        self._on_quota = on_quota
        self._on_starved = on_starved
        self._tick = itertools.count()
        self._ranks: dict[Endpoint, int] = {}
        self._heap: list[tuple[float, int, Endpoint]] = []
        self._queue: deque[_Waiter] = deque()
        self._urgent: deque[_Waiter] = deque()
        self._excluding: dict[frozenset[Endpoint], deque[_Waiter]] = {}
        self._mean_s = 0.0
        self._idle = 0
        self._extra = 0
        self._extra_of: dict[int, int] = {}
        self.in_flight = 0
        self.alive: set[Endpoint] = set()
        self.long_resting: set[Endpoint] = set()
        for endpoint in endpoints:
            self.refresh(endpoint)

    @property
    def is_starved(self) -> bool:
        """Whether calls wait that ``streams`` would allow."""
        waits = self._queue or self._excluding or self._urgent
        return bool(waits) and self.in_flight - self._extra < self._streams

    @property
    def contended(self) -> bool:
        """Whether calls wait that any endpoint could serve."""
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        """Calls that wait for an endpoint."""
        lines = (self._queue, self._urgent, *self._excluding.values())
        return sum(map(len, lines))

    @property
    def is_idle(self) -> bool:
        """Whether no request goes on by itself, and none waits to be sent."""
        return self.in_flight == self._idle and not self.waiting

    @property
    def is_deadlocked(self) -> bool:
        """Whether all requests in flight are streams that nobody reads, and no time helps."""
        return (
            0 < self.in_flight == self._idle
            and bool(self.alive)
            and not any(endpoint.resting for endpoint in self.alive)
        )

    async def acquire(
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
        if item is not None and item.in_flight and item.stalled:
            endpoint = self._choose_for_stalled(avoid, prefer, unfit)
        else:
            endpoint = None if self._queue else self._choose(avoid, prefer, unfit)
        if endpoint is not None:
            return self._start(endpoint, tokens, item)
        waiter = self._enqueue(avoid, prefer, tokens, item, unfit)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._cancel_waiter(waiter)
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
        stalled = item is not None and item.in_flight > 0 and item.stalled
        if stalled:
            line = self._urgent
        else:
            line = self._excluding.setdefault(frozenset(avoid), deque()) if avoid else self._queue
        future = asyncio.get_running_loop().create_future()
        turn = next(self._tick)
        waiter = _Waiter(future, avoid, unfit, prefer, tokens, item, turn, line)
        line.append(waiter)
        if item is not None:
            item.queued += 1
            item.queue = self
        if self.is_starved:
            self._on_starved()
        if avoid:
            self._serve_waiters()  # too many calls that exclude endpoints give their exclusions up
        return waiter

    def _cancel_waiter(self, waiter: _Waiter) -> None:
        """Undo what a cancelled call holds: its place in the queue, or the endpoint it won."""
        if waiter.future.done() and not waiter.future.cancelled():
            if waiter.future.exception() is None:
                self.release(waiter.future.result(), item=waiter.item)
        elif waiter in waiter.queue:
            waiter.queue.remove(waiter)
            self._drop_empty(waiter)

    def release(
        self, endpoint: Endpoint, seconds: float | None = None, item: CallLog | None = None
    ) -> None:
        """Count one request less in flight.

        Args:
            endpoint: The endpoint that was taken.
            seconds: How long its answer took, or None when it gave none.
            item: The item on whose behalf it was taken.
        """
        self.in_flight -= 1
        endpoint.in_flight -= 1
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
        """Take a request beyond ``streams`` back; what the item still has open keeps its slot."""
        count = self._extra_of.get(id(item), 0)
        if count:
            self._extra -= 1
            if count == 1:
                del self._extra_of[id(item)]
            else:
                self._extra_of[id(item)] = count - 1

    def mark_stream_idle(self, item: CallLog | None) -> None:
        """Take note that nobody reads a stream of an item at the moment."""
        self._idle += 1
        if item is None:
            return
        item.idle_streams += 1
        if item.queued and item.stalled:
            asyncio.get_running_loop().call_later(_IDLE_S, self._check_idle_item, item)

    def mark_stream_read(self, item: CallLog | None) -> None:
        """Take note that a stream of an item is read again, or has ended."""
        self._idle -= 1
        if item is not None:
            item.idle_streams -= 1

    def _check_idle_item(self, item: CallLog) -> None:
        """Let an item go on whose streams have waited for a while."""
        if item.in_flight and item.queued:
            self._serve_item(item)

    def lend(self) -> None:
        """Serve the oldest waiting call, though streams that nobody reads hold all slots."""
        lines = (self._urgent, self._queue, *self._excluding.values())
        waiting = [w for line in lines for w in line if not w.future.done()]
        if waiting:
            self._serve_stalled(min(waiting, key=lambda waiter: waiter.turn))

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint anew after its state changed, and serve who waits."""
        (self.alive.add if endpoint.alive else self.alive.discard)(endpoint)
        self._rank(endpoint)
        self._serve_waiters()

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Raise a new error in every waiting call."""
        lines = [self._queue, self._urgent, *self._excluding.values()]
        self._excluding.clear()
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
        return (endpoint.in_flight + endpoint.foreign_load + 1) * latency / endpoint.spec.weight

    def _find_excluded(
        self, avoid: Collection[Endpoint], unfit: Collection[Endpoint]
    ) -> Collection[Endpoint]:
        """Return which endpoints a call passes over, given which others there are."""
        near = self.alive - self.long_resting if self.long_resting else self.alive
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
        self, avoid: Collection[Endpoint], prefer: Endpoint | None, unfit: Collection[Endpoint]
    ) -> Endpoint | None:
        """Choose for a call that uses its item's slot: full lanes do not stop it, pauses do."""
        endpoint = self._choose(avoid, prefer, unfit)
        if endpoint is not None:
            return endpoint
        excluded = self._find_excluded(avoid, unfit)
        able = [e for e in self.alive if not e.resting and e not in excluded]
        if not able:
            return None

        def rank(one: Endpoint) -> tuple[bool, bool, float]:
            return not one.free, one.breaker.state is not BreakerState.CLOSED, self._score(one)

        return min(able, key=rank)

    def _start(self, endpoint: Endpoint, tokens: int, item: CallLog | None) -> Endpoint:
        if item is not None:
            item.in_flight += 1
            if self.in_flight - self._extra >= self._streams:
                self._extra += 1
                self._extra_of[id(item)] = self._extra_of.get(id(item), 0) + 1
        self.in_flight += 1
        endpoint.in_flight += 1
        if endpoint.request_bucket is not None or endpoint.token_bucket is not None:
            self._on_quota(endpoint, tokens)
        self._rank(endpoint)
        return endpoint

    def try_acquire(
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
        return latency * (1.0 + endpoint.in_flight / endpoint.width)

    def _serve_waiters(self) -> None:
        """Hand free endpoints to the calls that wait, oldest first."""
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
            endpoint = self._choose((), waiter.prefer)
            if endpoint is None:
                return
            self._grant(waiter, endpoint)

    def _serve_oldest(self) -> bool:
        """Serve the oldest call that a free endpoint suits; say whether there is one."""
        for key, line in list(self._excluding.items()):
            while line and line[0].future.done():
                line.popleft()
            if not line:
                del self._excluding[key]
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        heads = [line[0] for line in (self._queue, *self._excluding.values()) if line]
        heads.sort(key=lambda waiter: waiter.turn)
        for waiter in heads:
            endpoint = self._choose(waiter.avoid, waiter.prefer, waiter.unfit)
            if endpoint is not None:
                self._grant(waiter, endpoint)
                return True
            if not waiter.avoid:
                break  # nothing is free
        return self._drop_exclusions(heads)

    def _drop_exclusions(self, heads: Sequence[_Waiter]) -> bool:
        """Serve a call by an endpoint that it excludes, once such calls take half of all places.

        The number of items in flight is bounded: other items would soon have no place left.
        """
        if 2 * sum(map(len, self._excluding.values())) < self._streams:
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
        lines = (self._urgent, self._queue, *self._excluding.values())
        mine = [w for line in lines for w in line if w.item is item and not w.future.done()]
        if mine:
            self._serve_stalled(min(mine, key=lambda waiter: waiter.turn))

    def _serve_stalled(self, waiter: _Waiter) -> None:
        if waiter.future.done():
            waiter.queue.remove(waiter)
            return
        endpoint = self._choose_for_stalled(waiter.avoid, waiter.prefer, waiter.unfit)
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
        waiter.future.set_result(self._start(endpoint, waiter.tokens, waiter.item))

    def _drop_empty(self, waiter: _Waiter) -> None:
        """Forget a line of exclusions when nobody is left in it."""
        if waiter.avoid and not waiter.queue and waiter.queue is not self._urgent:
            self._excluding.pop(frozenset(waiter.avoid), None)


class Affinity:
    """Remembers who met which beginning first; the least recently used is forgotten.

    Args:
        policy: How long a beginning is, and how many are remembered.
    """

    def __init__(self, policy: AffinityPolicy) -> None:
        self._policy = policy
        self._endpoints: OrderedDict[int, Endpoint] = OrderedDict()

    def make_key(self, body: Mapping[str, Any]) -> int:
        """Return what stands for a request's beginning; equal ones are equal in this process."""
        parts: list[str] = []
        room = self._policy.prefix
        for message in body["messages"]:
            text = f"{message.get('role')}:{message.get('content')}"
            parts.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        return hash(tuple(parts))

    def find_endpoint(self, key: int) -> Endpoint | None:
        """Return who met a beginning first and is still there, or None."""
        endpoint = self._endpoints.get(key)
        if endpoint is None or not endpoint.alive:
            return None
        self._endpoints.move_to_end(key)
        return endpoint

    def record(self, key: int, endpoint: Endpoint) -> None:
        """Note who was asked; a home that is only loaded stays home."""
        home = self._endpoints.get(key)
        if home is None or not home.alive:
            self._endpoints[key] = endpoint
            if len(self._endpoints) > self._policy.keys:
                self._endpoints.popitem(last=False)


_LOG: Final = logging.getLogger(__name__)
_UNREACHABLE_STATUSES: Final = frozenset({502, 503, 504})
"""Statuses of a proxy or a starting server; any other answer shows that somebody is there."""
_RECENT: Final = 200
"""Items of which a share may be refused as themselves at fault."""
_REFUSED_ITEMS: Final = 2
"""An endpoint that refuses so many items, and accepts none between them, is itself at fault."""
_LOOK_S: Final = 0.1
_QUIET_LOOKS: Final = 2
"""So many looks at a fleet without any request show that no other item comes."""


class HealthMonitor:
    """Watches over the endpoints of one fleet.

    Args:
        endpoints: All members.
        policy: When to do what.
        transport: For probes.

    Attributes:
        balancer: Who hands the endpoints out.
        stop_reason: Why no further request is sent, or None.
        pause_reason: Why nothing goes on at the moment, or None.
        answers: Good answers so far.
        refusals: Times that an endpoint said "not now".
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], policy: FleetPolicy, transport: Transport
    ) -> None:
        self._endpoints = endpoints
        self._policy = policy
        self._transport = transport
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = 0
        self._ended: deque[bool] = deque(maxlen=_RECENT)
        self._changed = asyncio.Event()
        slack = (policy.affinity or AffinityPolicy()).slack
        self._wakes: dict[Endpoint, asyncio.TimerHandle] = {}
        self.balancer = LoadBalancer(
            endpoints, policy.streams, self._pause_for_quota, self._schedule_widening, slack
        )
        self.stop_reason: str | None = None
        self.pause_reason: str | None = None
        self.answers = 0
        self.refusals = 0

    def close(self) -> None:
        """Cancel all timers and probes, so that nothing is left on the loop."""
        for handle in self._timers:
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        self._timers.clear()
        self._wakes.clear()
        self._sweeping = False
        self._deadline = None
        self.balancer.long_resting.clear()
        for endpoint in self._endpoints:
            endpoint.resting = False

    def record_success(self, endpoint: Endpoint, level: int, seconds: float) -> None:
        """Take note of a good answer, sent as one of ``level`` requests in flight."""
        now = time.monotonic()
        self.answers += 1
        endpoint.refusals = 0
        endpoint.limit.record_answer(level, seconds, now)
        if endpoint.breaker.record_success():
            endpoint.limit.reset(now)
            _LOG.info("endpoint %s is back", endpoint.label)
            self.refresh(endpoint)

    def clear_refusals(self, endpoint: Endpoint, item: CallLog | None) -> None:
        """Trust an endpoint again that has accepted another item than those that it refused."""
        if id(item) not in endpoint.refused_items:
            endpoint.refused_items.clear()
            self.refresh(endpoint)
            self._notify_changed()

    def count_answered(self, item: CallLog | None) -> None:
        """Count an item that was answered, once."""
        if item is None:
            self._ended.append(False)
        elif not item.counted:
            item.counted = True
            self._ended.append(False)

    def count_refused(self, failure: Failure, endpoints: int) -> EndpointError:
        """Count an item that is itself at fault, and return its error.

        Raises:
            RunStoppedError: So many items end this way that it looks like an outage.
        """
        error, share = make_refused_item_error(failure, endpoints), self._policy.retry.refused_share
        self._ended.append(True)
        count = sum(self._ended)
        if count <= share * _RECENT:
            return error
        self.stop(
            f"{count} of the last {len(self._ended)} items were refused by endpoints that answered "
            f"other items; more than {share:.0%} of {_RECENT} look like an outage: check the key "
            f"and the items, then resume the run; the last answer: {failure.error.message}"
        )
        raise RunStoppedError(self.stop_reason or "") from error

    async def resolve_fault(
        self, refusers: Mapping[Endpoint, Failure], item: CallLog | None
    ) -> bool:
        """Wait until it is known whether an item is at fault, or the endpoints that refuse it.

        Endpoints that accept another item meanwhile are in order. Those that refuse another one
        too, or that no other item is there to be sent to, are used no more. Streams of the item
        that wait for this call keep no other item away.

        Args:
            refusers: Endpoints that have refused the item, and how.
            item: The item.

        Returns:
            Whether the item is at fault.
        """
        if item is None:
            return await self._settled(refusers, item)
        item.queued += 1
        item.queue = self.balancer
        try:
            return await self._settled(refusers, item)
        finally:
            item.queued -= 1

    async def _settled(self, refusers: Mapping[Endpoint, Failure], item: CallLog | None) -> bool:
        quiet = 0
        while not any(e.is_proven(item, time.monotonic()) for e in refusers):
            if self.stop_reason is not None or all(e.ejected or e.retired for e in refusers):
                return False
            quiet = quiet + 1 if self.balancer.is_idle else 0
            if quiet > _QUIET_LOOKS:
                for endpoint, failure in refusers.items():
                    self._eject(endpoint, failure.error)
                    self.refresh(endpoint)
                continue
            if item is not None and item.idle_streams and self.balancer.is_deadlocked:
                self.balancer.lend()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
        return True

    def eject_refusers(self, refusers: Mapping[Endpoint, Failure]) -> None:
        """Use endpoints no more that have accepted nothing, and refused what another one answers.

        Those that have other requests in flight are judged by their ends.
        """
        for endpoint, failure in refusers.items():
            if endpoint.refused_items and endpoint.in_flight <= endpoint.streaming:
                self._eject(endpoint, failure.error)
                self.refresh(endpoint)

    def _notify_changed(self) -> None:
        """Wake those that wait for news of the endpoints."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _is_undecided(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> bool:
        """Tell whether a refusal says nothing of the endpoint: the item may be at fault."""
        if failure.accepts_others:
            return True
        if not failure.is_clear:
            return False
        endpoint.refused_items.add(id(failure if item is None else item))
        undecided = endpoint.in_flight - endpoint.streaming > 1
        return undecided or len(endpoint.refused_items) < _REFUSED_ITEMS

    def record_failure(
        self, endpoint: Endpoint, failure: Failure, item: CallLog | None = None
    ) -> None:
        """Do what a failure means; it may stop the run."""
        if failure.is_refusal and self._is_undecided(endpoint, failure, item):
            self.refresh(endpoint)
            return
        treatment, error = failure.rule, failure.error
        if treatment.action is RetryAction.WAIT and failure.accepts_others:
            # It refuses this item and answers others: the item waits, the endpoint works on.
            self.refusals += 1
            self.refresh(endpoint)
            return
        if treatment.action is RetryAction.STOP:
            self.stop(error.message)
        if treatment.action in {RetryAction.EJECT, RetryAction.REKEY}:
            self._eject(endpoint, error)
        if treatment.action is RetryAction.FAIL and not isinstance(error, PromptTooLongError):
            self._count_hopeless(endpoint, failure)
        if treatment.shrink:
            endpoint.limit.shrink(time.monotonic())
        if treatment.breaker_effect is not BreakerEffect.NO and endpoint.breaker.record_failure(
            treatment.breaker_effect is BreakerEffect.OPEN
        ):
            self._open(endpoint, error)
        if treatment.action is RetryAction.WAIT:
            self._record_refusal(endpoint, failure, item)
        self.refresh(endpoint)

    def _count_hopeless(self, endpoint: Endpoint, failure: Failure) -> None:
        """Stop a run that nobody accepts, or eject who alone accepts nothing."""
        self._refused += 1
        most = self._policy.retry.hopeless_after
        if not self.answers and (self._refused >= most or failure.rule.schema):
            self.stop(f"no request was accepted; the last answer: {failure.error.message}")
        elif self.answers and not endpoint.has_answered and endpoint.stats.calls >= most:
            self._eject(endpoint, failure.error)

    def _record_refusal(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> None:
        """Let an endpoint rest as long as it asked; all of its host, where the quota is shared."""
        self.refusals += 1
        endpoint.throttled += 1
        retry, treatment = self._policy.retry, failure.rule
        seconds = failure.error.retry_after or treatment.rest_s
        if seconds is None and treatment.long:
            # One that answers other items is asked again soon: the item may be at fault.
            first = endpoint.refusals == 0 and endpoint.is_proven(item, time.monotonic())
            seconds = retry.refusal_pause_s if first else retry.long_pause_s
        endpoint.limit.record_refusal(endpoint.in_flight)
        if seconds is None and endpoint.in_flight > 1:
            # It works at the others that it has: the narrower lane is answer enough.
            return
        endpoint.refusals += 1
        pause = retry.add_jitter(seconds or retry.rest(endpoint.refusals), random.random())
        host = endpoint.url.split("/")[2]
        for other in self._endpoints:
            if other is endpoint or (treatment.shared and other.url.split("/")[2] == host):
                self.pause_endpoint(other, pause)
        self._check_pause(failure.error)

    def _check_pause(self, error: EndpointError) -> None:
        seconds = error.retry_after or 0.0
        if seconds > max(self._policy.timeout.fleet_s, self._policy.retry.long_wait_s) and all(
            e.resting for e in self.balancer.alive
        ):
            self.stop(f"{error.message}; resume the run in {seconds:.0f} s")

    def pause_endpoint(self, endpoint: Endpoint, seconds: float) -> None:
        """Send an endpoint nothing for a while; of two pauses the later end counts."""
        pending = self._wakes.get(endpoint)
        if pending is not None:
            if pending.when() >= asyncio.get_running_loop().time() + seconds:
                return
            pending.cancel()
            self._timers.discard(pending)
        endpoint.resting = True
        if seconds > self._policy.retry.long_wait_s:
            self.balancer.long_resting.add(endpoint)
        self._wakes[endpoint] = self._later(seconds, lambda: self._resume_endpoint(endpoint))

    def _resume_endpoint(self, endpoint: Endpoint) -> None:
        self._wakes.pop(endpoint, None)
        endpoint.resting = False
        self.balancer.long_resting.discard(endpoint)
        self.refresh(endpoint)

    def _eject(self, endpoint: Endpoint, error: EndpointError) -> None:
        if endpoint.ejected:
            return
        endpoint.ejected = True
        self._notify_changed()
        _LOG.warning("endpoint %s is used no more: %s", endpoint.label, error.message)
        if all(e.ejected or e.retired for e in self._endpoints):
            self.stop(f"no endpoint is left; the last answer: {error.message}")

    def _open(self, endpoint: Endpoint, error: EndpointError) -> None:
        _LOG.warning("endpoint %s is left alone: %s", endpoint.label, error.message)
        self._later(endpoint.breaker.pause_s, lambda: self._spawn(self._probe(endpoint)))

    async def _probe(self, endpoint: Endpoint) -> None:
        """Ask an endpoint that was left alone whether it is there."""
        try:
            answer = await self._transport.get(
                f"{endpoint.url}/models",
                await endpoint.headers(),
                self._policy.breaker.probe_s,
                endpoint.spec.proxied,
            )
            there = answer.status not in _UNREACHABLE_STATUSES
        except (aiohttp.ClientError, TimeoutError):
            there = False
        if there:
            endpoint.breaker.half_open()
            self.refresh(endpoint)
        else:
            endpoint.breaker.record_missed_probe()
            self._later(endpoint.breaker.pause_s, lambda: self._spawn(self._probe(endpoint)))

    def _pause_for_quota(self, endpoint: Endpoint, tokens: int) -> None:
        """Let an endpoint with a quota of its own rest until the next request is due."""
        now, wait = time.monotonic(), 0.0
        if endpoint.request_bucket is not None:
            wait = endpoint.request_bucket.take(1.0, now, reserve=1.0)
        if endpoint.token_bucket is not None:
            wait = max(wait, endpoint.token_bucket.take(tokens, now, reserve=tokens))
        if wait > 0:
            self.pause_endpoint(endpoint, wait)

    def _schedule_widening(self) -> None:
        """Look for full lanes soon: calls wait although more could be in flight."""
        if not self._sweeping:
            self._sweeping = True
            self._later(self._policy.limit.settle_s, self._widen_limits)

    def _widen_limits(self) -> None:
        """Widen the lanes that are full, and go on while calls wait."""
        self._sweeping = False
        now = time.monotonic()
        for endpoint in list(self.balancer.alive) if self.balancer.is_starved else ():
            full = endpoint.in_flight >= endpoint.width
            if full and endpoint.breaker.state is BreakerState.CLOSED and endpoint.limit.widen(now):
                self.refresh(endpoint)
        if self.balancer.is_starved:
            self._schedule_widening()

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint anew, and watch whether any is alive."""
        self.balancer.refresh(endpoint)
        if self.balancer.alive:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = self.pause_reason = None
                _LOG.warning("an endpoint is back; the run goes on")
        elif self._deadline is None and self.stop_reason is None:
            seconds = self._policy.timeout.fleet_s
            self.pause_reason = (
                f"no endpoint is alive; waiting up to {seconds:g} s for one to return"
            )
            _LOG.warning("%s", self.pause_reason)
            self._deadline = self._later(seconds, self._stop_waiting)

    def _stop_waiting(self) -> None:
        seconds = self._policy.timeout.fleet_s
        self.stop(
            f"no endpoint came back within {seconds:g} s (limits.fleet_wait_s): start them again "
            "and resume the run"
        )

    def stop(self, message: str) -> None:
        """End the run: no further request is sent, and what waits fails."""
        if self.stop_reason is None:
            self.stop_reason = message
            self._notify_changed()
            _LOG.error("%s", message)
        self.balancer.fail_all(lambda: RunStoppedError(message))

    def _later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(handle)
            call()

        handle = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(handle)
        return handle

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
