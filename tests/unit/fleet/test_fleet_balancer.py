from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import RunStoppedError
from fanfold.backends.core.protocols import CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.balancer import Affinity, LoadBalancer
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    AffinityPolicy,
    RateLimitPolicy,
)
from fanfold.backends.fleet.rate_limit import Quota, RateLimiter, TokenNeed


def members(count: int, width: int = 4) -> list[Endpoint]:
    lane = AdaptiveLimitPolicy(start=width)
    return [Endpoint(EndpointSpec(f"http://n{i}:1"), lane) for i in range(count)]


def dispatcher(endpoints: list[Endpoint], streams: int = 100) -> LoadBalancer:
    return LoadBalancer(endpoints, streams, lambda *_: None, lambda: None)


async def test_idle_endpoints_are_filled_evenly() -> None:
    endpoints = members(4)
    dispatch = dispatcher(endpoints)
    taken = Counter([await dispatch.acquire() for _ in range(12)])
    assert set(taken.values()) == {3}


async def test_slow_endpoints_get_less() -> None:
    fast, slow = members(2, width=100)
    dispatch = dispatcher([fast, slow])
    for endpoint, seconds in ((fast, 1.0), (slow, 5.0)):
        endpoint.in_flight += 1
        dispatch.in_flight += 1
        dispatch.release(endpoint, seconds)
    taken = Counter([await dispatch.acquire() for _ in range(60)])
    assert (taken[fast], taken[slow]) == (50, 10)


async def test_known_weights_count_before_the_first_answer() -> None:
    quick = Endpoint(EndpointSpec("http://q:1", weight=3.0), AdaptiveLimitPolicy(start=100))
    plain = Endpoint(EndpointSpec("http://p:1"), AdaptiveLimitPolicy(start=100))
    dispatch = dispatcher([plain, quick])
    taken = Counter([await dispatch.acquire() for _ in range(40)])
    assert (taken[quick], taken[plain]) == (30, 10)


async def test_callers_are_served_in_order() -> None:
    dispatch = dispatcher(members(1, width=1))
    first = await dispatch.acquire()
    order: list[int] = []

    async def caller(number: int) -> None:
        endpoint = await dispatch.acquire()
        order.append(number)
        dispatch.release(endpoint)

    callers = [asyncio.create_task(caller(i)) for i in range(5)]
    await asyncio.sleep(0)
    assert dispatch.waiting == 5
    dispatch.release(first)
    await asyncio.gather(*callers)
    assert order == list(range(5))


async def test_a_cancelled_caller_returns_what_it_won() -> None:
    dispatch = dispatcher(members(1, width=1))
    first = await dispatch.acquire()
    caller = asyncio.create_task(dispatch.acquire())
    await asyncio.sleep(0)
    dispatch.release(first)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert dispatch.in_flight == 0
    assert await dispatch.acquire() is first


async def test_avoided_endpoints_are_used_when_no_other_is_alive() -> None:
    one, other = members(2)
    dispatch = dispatcher([one, other])
    assert await dispatch.acquire({one}) is other
    other.ejected = True
    dispatch.refresh(other)
    assert await dispatch.acquire({one}) is one


async def test_a_preferred_endpoint_is_taken_unless_it_is_loaded() -> None:
    home, *others = members(3, width=8)
    dispatch = dispatcher([home, *others])
    taken = [await dispatch.acquire(prefer=home) for _ in range(12)]
    assert taken[:2] == [home, home]
    assert Counter(taken)[home] == 6
    assert dispatch.in_flight == sum(e.in_flight for e in (home, *others)) == 12
    home.ejected = True
    dispatch.refresh(home)
    assert await dispatch.acquire(prefer=home) is not home


async def test_requests_of_others_count_as_load() -> None:
    busy, idle = members(2, width=100)
    dispatch = dispatcher([busy, idle])
    busy.foreign_load = 10
    dispatch.refresh(busy)
    taken = Counter([await dispatch.acquire() for _ in range(30)])
    assert (taken[idle], taken[busy]) == (20, 10)


def need(tokens: int) -> TokenNeed:
    return TokenNeed(RateLimiter(RateLimitPolicy()), Usage(0, tokens))


def limited(name: str, tokens: float, now: Callable[[], float]) -> Endpoint:
    quota = Quota(None, tokens, clock=now)
    return Endpoint(EndpointSpec(f"http://{name}:1"), AdaptiveLimitPolicy(start=99), quota=quota)


async def test_a_call_waits_for_the_quota_of_its_endpoint() -> None:
    now, waits = [0.0], list[float]()
    endpoint = limited("n", 100, lambda: now[0])
    dispatch = LoadBalancer([endpoint], 9, waits.append, lambda: None)
    await dispatch.acquire(need=need(60))
    waiter = asyncio.create_task(dispatch.acquire(need=need(60)))
    await asyncio.sleep(0)
    assert not waiter.done()
    assert waits == []  # only the end of the first request helps
    dispatch.release(endpoint, tokens=60, used=30)
    assert await waiter is endpoint
    waiter = asyncio.create_task(dispatch.acquire(need=need(20)))
    await asyncio.sleep(0)
    assert waits == [pytest.approx(60.6, abs=0.7)]
    dispatch.release(endpoint, tokens=60, used=60)
    now[0] = 61.3
    dispatch.retry_quotas()
    assert await waiter is endpoint
    assert endpoint.quota is not None
    assert endpoint.quota.reserve(80) == 0.0


async def test_a_call_passes_over_an_endpoint_whose_quota_is_used_up() -> None:
    endpoints = [limited("n", 100, lambda: 0.0), limited("m", 100, lambda: 0.0)]
    dispatch = LoadBalancer(endpoints, 99, lambda _: None, lambda: None)
    taken = Counter([await dispatch.acquire(need=need(50)) for _ in range(4)])
    assert taken == dict.fromkeys(endpoints, 2)
    assert dispatch.try_acquire((), need(50)) is None


async def test_a_cancelled_call_reserves_nothing() -> None:
    now = [0.0]
    endpoint = limited("n", 100, lambda: now[0])
    dispatch = LoadBalancer([endpoint], 9, lambda _: None, lambda: None)
    dispatch.quota = Quota(None, 1000, clock=lambda: now[0])
    await dispatch.acquire(need=need(60))
    waiting, next_one = (asyncio.create_task(dispatch.acquire(need=need(90))) for _ in range(2))
    await asyncio.sleep(0)
    dispatch.release(endpoint, tokens=60, used=0)
    waiting.cancel()  # it has its endpoint, and does not know it yet
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert await next_one is endpoint
    dispatch.release(endpoint, tokens=90, used=None)
    assert dispatch.quota.reserve(1000) == 0.0


async def test_an_unread_stream_does_not_block_the_next_call_of_its_item() -> None:
    item = CallLog()
    endpoint = limited("n", 100, lambda: 0.0)
    dispatch = LoadBalancer([endpoint], 9, lambda _: None, lambda: None)
    await dispatch.acquire(need=need(80), item=item)
    dispatch.mark_stream_idle(item)
    assert await dispatch.acquire(need=need(80), item=item) is endpoint
    other = asyncio.create_task(dispatch.acquire(need=need(80), item=CallLog()))
    await asyncio.sleep(0)
    assert not other.done()
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)


async def test_the_quota_of_a_process_holds_over_all_endpoints() -> None:
    endpoints = members(3, width=99)
    dispatch = LoadBalancer(endpoints, 99, lambda _: None, lambda: None)
    dispatch.quota = Quota(None, 100)
    taken = [await dispatch.acquire(need=need(40)) for _ in range(2)]
    waiters = [asyncio.create_task(dispatch.acquire(need=need(40))) for _ in range(3)]
    await asyncio.sleep(0)
    assert [w.done() for w in waiters] == [False] * 3
    dispatch.release(taken[0], tokens=40, used=10)
    await waiters[0]
    await asyncio.sleep(0)
    assert [w.done() for w in waiters] == [True, False, False]
    for waiter in waiters[1:]:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_loops_that_share_a_quota_wake_each_other() -> None:
    quota = Quota(None, 100)
    (endpoint,) = members(1)
    dispatch = LoadBalancer([endpoint], 9, lambda _: None, lambda: None)
    dispatch.quota = quota
    assert quota.reserve(80) == 0.0
    waiter = asyncio.create_task(dispatch.acquire(need=need(80)))
    await asyncio.sleep(0)
    await asyncio.to_thread(quota.settle, 80, 20)
    assert await asyncio.wait_for(waiter, 30) is endpoint


def test_a_beginning_finds_its_home_again() -> None:
    one, other = members(2)
    affinity = Affinity(AffinityPolicy(prefix=10, keys=2))
    long = affinity.make_key({"messages": [{"role": "user", "content": "0123456789 a"}]})
    assert long == affinity.make_key({"messages": [{"role": "user", "content": "0123456789 b"}]})
    short = affinity.make_key({"messages": [{"role": "user", "content": "b"}]})
    assert long != short
    affinity.record(long, one)
    affinity.record(long, other)
    assert affinity.find_endpoint(long) is one
    one.ejected = True
    assert affinity.find_endpoint(long) is None
    affinity.record(long, other)
    assert affinity.find_endpoint(long) is other
    for key in (1, 2):
        affinity.record(key, other)
    assert affinity.find_endpoint(long) is None


class Homes:
    """Calls of several groups that wait for full endpoints with affinity."""

    def __init__(self, count: int = 2, width: int = 1) -> None:
        self.endpoints = members(count, width)
        affinity = Affinity(AffinityPolicy(prefix=10))
        self.dispatch = LoadBalancer(self.endpoints, 100, lambda *_: None, lambda: None, affinity)
        self.served = list[tuple[int, Endpoint]]()
        self.calls = list[asyncio.Task[None]]()

    async def ask(self, *groups: int) -> None:
        for group in groups:
            self.calls.append(asyncio.create_task(self._call(group)))
            await asyncio.sleep(0)

    async def _call(self, group: int) -> None:
        self.served.append((group, await self.dispatch.acquire(prefix=group)))

    async def end(self, endpoint: Endpoint) -> tuple[int, Endpoint]:
        """End a request of an endpoint; return the call that it serves next."""
        before = len(self.served)
        self.dispatch.release(endpoint)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (new,) = self.served[before:]
        return new


async def test_a_free_endpoint_takes_calls_of_its_own_groups_first() -> None:
    homes = Homes()
    one, two = homes.endpoints
    await homes.ask(1, 2)
    assert homes.served == [(1, one), (2, two)]
    await homes.ask(2, 2, 1, 3, 1)
    assert await homes.end(one) == (1, one)  # the oldest is of the other's group
    assert await homes.end(one) == (1, one)
    assert await homes.end(one) == (3, one)  # a group without a home finds one
    assert await homes.end(one) == (2, one)  # nothing else waits: no endpoint is left idle
    assert await homes.end(two) == (2, two)
    assert homes.dispatch.waiting == 0


async def test_calls_of_a_dead_endpoint_and_cancelled_ones_do_not_hold_up_others() -> None:
    homes = Homes()
    one, two = homes.endpoints
    await homes.ask(1, 2, 1, 1, 2, 2)
    homes.calls[4].cancel()
    one.ejected = True
    homes.dispatch.refresh(one)
    assert await homes.end(two) == (2, two)
    assert await homes.end(two) == (1, two)
    assert await homes.end(two) == (1, two)
    await homes.ask(1)
    assert await homes.end(two) == (1, two)  # which is its home now
    assert homes.dispatch.waiting == 0


async def test_a_quota_keeps_the_order_of_the_calls() -> None:
    homes = Homes()
    one, _ = homes.endpoints
    homes.dispatch.quota = Quota(None, 1000)
    await homes.ask(1, 2)
    await homes.ask(2, 1)
    assert await homes.end(one) == (2, one)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 4))
def test_all_calls_are_served_whatever_their_groups(groups: list[int], width: int) -> None:
    async def run() -> None:
        homes = Homes(3, width)
        await homes.ask(*groups)
        while homes.dispatch.in_flight:
            homes.dispatch.release(max(homes.endpoints, key=lambda one: one.in_flight))
            await asyncio.sleep(0)
        await asyncio.gather(*homes.calls)
        assert sorted(group for group, _ in homes.served) == sorted(groups)
        assert homes.dispatch.waiting == 0

    asyncio.run(run())


async def test_a_stop_reaches_every_waiting_call() -> None:
    dispatch = dispatcher(members(1, width=1))
    await dispatch.acquire()
    callers = [asyncio.create_task(dispatch.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    dispatch.fail_all(lambda: RunStoppedError("over"))
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(r) for r in results] == [RunStoppedError] * 3


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=300), st.integers(1, 5))
def test_the_heap_stays_small_and_the_counts_right(times: list[float], count: int) -> None:
    endpoints = members(count)
    dispatch = dispatcher(endpoints, streams=2 * count)

    async def run() -> None:
        for seconds in times:
            endpoint = await dispatch.acquire()
            assert sum(e.in_flight for e in endpoints) == dispatch.in_flight == 1
            dispatch.release(endpoint, seconds)

    asyncio.run(run())
    assert dispatch.in_flight == 0
    assert len(dispatch._heap) <= 8 * count + 9
