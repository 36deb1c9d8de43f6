from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.contract.errors import RunStoppedError
from fanfold.backends.fleet import Endpoint, EndpointSpec, LanePolicy
from fanfold.backends.fleet.dispatch import Dispatcher


def members(count: int, width: int = 4) -> list[Endpoint]:
    lane = LanePolicy(start=width)
    return [Endpoint(EndpointSpec(f"http://n{i}:1"), lane) for i in range(count)]


def dispatcher(endpoints: list[Endpoint], streams: int = 100) -> Dispatcher:
    return Dispatcher(endpoints, streams, lambda _: None, lambda: None)


async def test_idle_endpoints_are_filled_evenly() -> None:
    endpoints = members(4)
    dispatch = dispatcher(endpoints)
    taken = Counter([await dispatch.take() for _ in range(12)])
    assert set(taken.values()) == {3}


async def test_slow_endpoints_get_less() -> None:
    fast, slow = members(2, width=100)
    dispatch = dispatcher([fast, slow])
    for endpoint, seconds in ((fast, 1.0), (slow, 5.0)):
        endpoint.outstanding += 1
        dispatch.in_flight += 1
        dispatch.give(endpoint, seconds)
    taken = Counter([await dispatch.take() for _ in range(60)])
    assert (taken[fast], taken[slow]) == (50, 10)


async def test_known_weights_count_before_the_first_answer() -> None:
    quick = Endpoint(EndpointSpec("http://q:1", weight=3.0), LanePolicy(start=100))
    plain = Endpoint(EndpointSpec("http://p:1"), LanePolicy(start=100))
    dispatch = dispatcher([plain, quick])
    taken = Counter([await dispatch.take() for _ in range(40)])
    assert (taken[quick], taken[plain]) == (30, 10)


async def test_callers_are_served_in_order() -> None:
    dispatch = dispatcher(members(1, width=1))
    first = await dispatch.take()
    order: list[int] = []

    async def caller(number: int) -> None:
        endpoint = await dispatch.take()
        order.append(number)
        dispatch.give(endpoint)

    callers = [asyncio.create_task(caller(i)) for i in range(5)]
    await asyncio.sleep(0)
    assert dispatch.waiting == 5
    dispatch.give(first)
    await asyncio.gather(*callers)
    assert order == list(range(5))


async def test_a_cancelled_caller_returns_what_it_won() -> None:
    dispatch = dispatcher(members(1, width=1))
    first = await dispatch.take()
    caller = asyncio.create_task(dispatch.take())
    await asyncio.sleep(0)
    dispatch.give(first)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert dispatch.in_flight == 0
    assert await dispatch.take() is first


async def test_avoided_endpoints_are_used_when_no_other_is_alive() -> None:
    one, other = members(2)
    dispatch = dispatcher([one, other])
    assert await dispatch.take({one}) is other
    other.ejected = True
    dispatch.refresh(other)
    assert await dispatch.take({one}) is one


async def test_a_stop_reaches_every_waiting_call() -> None:
    dispatch = dispatcher(members(1, width=1))
    await dispatch.take()
    callers = [asyncio.create_task(dispatch.take()) for _ in range(3)]
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
            endpoint = await dispatch.take()
            assert sum(e.outstanding for e in endpoints) == dispatch.in_flight == 1
            dispatch.give(endpoint, seconds)

    asyncio.run(run())
    assert dispatch.in_flight == 0
    assert len(dispatch._heap) <= 8 * count + 9
