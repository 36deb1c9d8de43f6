"""An item that must avoid the free endpoint delays no other item: whole fleets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web

from fanfold.backends.core.errors import EndpointError, PromptTooLongError, RequestRefusedError
from fanfold.backends.core.types import Reply
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)

from .conftest import completion, serving, text_of, until

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", max_tokens=16)
POLICY = FleetPolicy(
    streams=32,
    retry=RetryPolicy(backoff_s=0.01, backoff_max_s=0.05),
    timeout=TimeoutPolicy(request_s=120.0),
    breaker=BreakerPolicy(failures=99, open_s=0.01),
    limit=AdaptiveLimitPolicy(settle_s=0.01),
    hedge=None,
)


@dataclass
class Pair:
    """A healthy endpoint that fails some items, and another one that is not free.

    Attributes:
        mood: What the other one does: ``rests``, ``hangs``, ``refuses``, ``lost``, or ``good``.
        asked: Calls by endpoint and kind of item.
        over: Set at the end, to let go of what hangs.
    """

    mood: str = "rests"
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    retry_after: str = "60"

    async def healthy(self, _: web.Request, body: Any) -> web.StreamResponse:
        kind = text_of(body).partition(" ")[0]
        self.asked["healthy", kind] += 1
        await asyncio.sleep(0.002)
        if kind == "bad":
            return web.json_response({"error": {"message": "boom"}}, status=500)
        if kind == "flagged":
            return web.json_response({"error": {"message": "flagged"}}, status=403)
        if kind == "long":
            error = {"message": "too long", "param": "input_tokens"}
            return web.json_response({"error": error}, status=400)
        return web.json_response(completion())

    async def other(self, request: web.Request, body: Any) -> web.StreamResponse:
        self.asked["other", text_of(body).partition(" ")[0]] += 1
        if self.mood == "hangs":
            await self.over.wait()
        if self.mood == "lost":
            assert request.transport is not None
            request.transport.close()
        if self.mood == "rests":
            return web.Response(status=429, headers={"Retry-After": self.retry_after})
        if self.mood == "refuses":
            return web.Response(status=429)
        return web.json_response(completion())


@asynccontextmanager
async def fleet_of(pair: Pair, policy: FleetPolicy = POLICY, **other: Any) -> AsyncIterator[Fleet]:
    async with (
        asyncio.timeout(20),
        serving(pair.healthy) as first,
        serving(pair.other) as second_,
    ):
        members = [
            EndpointSpec(first, max_model_len=1000),
            EndpointSpec(second_, max_model_len=2000, weight=9.0, **other),
        ]
        async with Fleet(members, policy) as fleet:
            try:
                yield fleet
            finally:
                pair.over.set()


def ask(fleet: Fleet, text: str) -> Any:
    return FleetClient(fleet, PARAMS).ask([{"role": "user", "content": text}])


@asynccontextmanager
async def working(
    fleet: Fleet, texts: list[str], places: int = 32
) -> AsyncIterator[dict[str, asyncio.Task[Reply]]]:
    """Begin items in order, with so many in flight at most, as a run does; cancel them after."""
    gate = asyncio.Semaphore(places)

    async def one(text: str) -> Reply:
        async with gate:
            return await ask(fleet, text)  # type: ignore[no-any-return]

    tasks = {text: asyncio.create_task(one(text)) for text in texts}
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def mixed(good: int, bad: int, kind: str = "bad") -> list[str]:
    """Return items of which the bad ones come early, among others."""
    return [
        *(f"good {n}" for n in range(10)),
        *(f"{kind} {n}" for n in range(bad)),
        *(f"good {n}" for n in range(10, good)),
    ]


async def all_done(tasks: dict[str, asyncio.Task[Reply]], kind: str, but: int = 0) -> None:
    mine = [task for text, task in tasks.items() if text.startswith(kind)]
    await until(lambda: sum(task.done() for task in mine) >= len(mine) - but)


def second(fleet: Fleet) -> Any:
    return fleet.endpoints[1]


async def rest(fleet: Fleet, pair: Pair) -> None:
    """Send requests until the other endpoint has asked for a pause."""
    while not second(fleet).resting:
        await asyncio.gather(*(ask(fleet, "good") for _ in range(4)))
    pair.asked.clear()


@pytest.mark.parametrize("kind", ["bad", "long"])
async def test_others_go_on_while_the_other_endpoint_rests(kind: str) -> None:
    pair = Pair("rests")
    async with fleet_of(pair) as fleet:
        await rest(fleet, pair)
        async with working(fleet, mixed(200, 6, kind)) as tasks:
            await all_done(tasks, "good")
            assert second(fleet).resting
            assert fleet.health().waiting == 6
            assert pair.asked == {("healthy", "good"): 200, ("healthy", kind): 6}


async def test_others_go_on_while_the_other_endpoint_hangs() -> None:
    pair = Pair("hangs")
    async with fleet_of(pair, max_in_flight=1) as fleet, working(fleet, mixed(200, 6)) as tasks:
        await all_done(tasks, "good", but=1)
        assert second(fleet).in_flight == 1
        assert fleet.health().waiting >= 5


async def test_others_go_on_while_the_other_endpoint_is_busy() -> None:
    """It has room for one more request now and then, and refuses the others."""
    pair = Pair("refuses")
    policy = replace(POLICY, retry=RetryPolicy(refusal_pause_s=30.0))
    async with fleet_of(pair, policy, max_in_flight=2) as fleet:
        await rest(fleet, pair)
        async with working(fleet, mixed(200, 6)) as tasks:
            await all_done(tasks, "good")
            assert fleet.health().waiting == 6


@pytest.mark.parametrize("quota", [{"requests_per_s": 0.01}, {"tokens_per_min": 124}], ids=str)
async def test_others_go_on_while_the_quota_of_the_other_endpoint_is_used_up(
    quota: dict[str, Any],
) -> None:
    pair = Pair("good")
    async with fleet_of(pair, **quota) as fleet:
        while not pair.asked["other", "good"]:  # its first request uses the quota up
            await asyncio.gather(*(ask(fleet, "good") for _ in range(4)))
        pair.asked.clear()
        async with working(fleet, mixed(200, 6)) as tasks:
            await all_done(tasks, "good")
            assert fleet.health().waiting == 6
            assert pair.asked == {("healthy", "good"): 200, ("healthy", "bad"): 6}


async def test_others_go_on_while_the_other_endpoint_is_tried_with_one_request() -> None:
    pair = Pair("lost")
    policy = replace(POLICY, breaker=BreakerPolicy(failures=1, open_s=0.01))
    bad_only = ["bad 0", "bad 1", "bad 2"]
    async with fleet_of(pair, policy) as fleet:
        healthy = fleet.endpoints[0]
        healthy.breaker._policy = BreakerPolicy(failures=10**6)
        while not second(fleet).breaker.times_opened:
            await asyncio.gather(*(ask(fleet, "good") for _ in range(4)))
        pair.mood = "hangs"
        await until(lambda: second(fleet).breaker.state.name == "HALF_OPEN")
        async with working(fleet, bad_only):
            await until(lambda: fleet.health().waiting == 2)
            assert second(fleet).in_flight == 1
            async with working(fleet, [f"good {n}" for n in range(200)]) as more:
                await all_done(more, "good")
                assert second(fleet).in_flight == 1


async def test_those_that_waited_are_served_first_when_it_is_back() -> None:
    pair = Pair("rests", retry_after="1")
    async with fleet_of(pair) as fleet:
        await rest(fleet, pair)
        async with working(fleet, mixed(60, 6)) as tasks:
            await all_done(tasks, "good")
            pair.mood = "good"
            got = await asyncio.gather(*tasks.values())
    assert [reply.content for reply in got] == ["hello"] * 66
    assert pair.asked["other", "bad"] == 6


async def test_items_that_wait_for_the_other_endpoint_never_take_all_places() -> None:
    """They are half of what is in flight: then they are asked again where they failed."""
    pair = Pair("rests")
    spread = [t for n in range(30) for t in (f"bad {n}", *(f"good {n}.{i}" for i in range(3)))]
    async with fleet_of(pair, replace(POLICY, streams=8)) as fleet:
        await rest(fleet, pair)
        async with working(fleet, spread, places=8) as tasks:
            await all_done(tasks, "good")
            assert second(fleet).resting
            ended = [t for text, t in tasks.items() if text.startswith("bad") and t.done()]
            assert len(ended) >= 30 - 8
            assert all(isinstance(t.exception(), EndpointError) for t in ended)


async def test_a_long_rest_is_a_reason_to_ask_again_where_the_item_failed() -> None:
    pair = Pair("rests", retry_after="3000")
    async with fleet_of(pair) as fleet:
        await rest(fleet, pair)
        async with working(fleet, mixed(20, 6)) as tasks:
            got = await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert sum(isinstance(end, EndpointError) for end in got) == 6
            assert pair.asked == {("healthy", "good"): 20, ("healthy", "bad"): 24}


@pytest.mark.parametrize("kind", ["bad", "flagged"])
@pytest.mark.parametrize("mood", ["rests", "refuses"])
async def test_an_item_does_not_ask_a_full_endpoint_for_ever(mood: str, kind: str) -> None:
    """The other endpoint never has room: an item that fails at the healthy one ends there."""
    pair = Pair(mood, retry_after="0.02")
    policy = replace(POLICY, retry=replace(POLICY.retry, refusal_pause_s=0.01))
    async with fleet_of(pair, policy) as fleet:
        await ask(fleet, "good first")  # else two refusals of a new endpoint eject it
        async with working(fleet, mixed(40, 3, kind)) as tasks:
            got = await asyncio.gather(*tasks.values(), return_exceptions=True)
    failed = [end for end in got if isinstance(end, EndpointError)]
    assert len(failed) == 3
    assert {type(end) is RequestRefusedError for end in failed} == {kind == "flagged"}
    assert pair.asked["healthy", kind] <= 3 * 4
    assert pair.asked["other", kind] <= 3 * 8


async def test_one_place_is_not_held_for_an_endpoint_that_rests() -> None:
    pair = Pair("rests")
    async with fleet_of(pair, replace(POLICY, streams=1)) as fleet:
        await rest(fleet, pair)
        async with working(fleet, mixed(20, 3), places=1) as tasks:
            await all_done(tasks, "good")
            assert second(fleet).resting


async def test_long_prompts_wait_for_the_only_endpoint_that_holds_them() -> None:
    """However many they are: where they do not fit they would only fail."""
    pair = Pair("rests", retry_after="1")
    async with fleet_of(pair, replace(POLICY, streams=4)) as fleet:
        await rest(fleet, pair)
        async with working(fleet, [f"long {n}" for n in range(6)], places=4) as tasks:
            await until(lambda: fleet.health().waiting == 4)
            pair.mood = "good"
            got = await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert not any(isinstance(end, PromptTooLongError) for end in got)
    assert pair.asked["other", "long"] == 6


async def test_order_holds_among_equals() -> None:
    """Calls that accept any endpoint, and calls that exclude the same, are served in order."""
    pair = Pair("good")
    order: list[str] = []
    async with fleet_of(pair, replace(POLICY, streams=1)) as fleet:

        async def one(text: str) -> None:
            await ask(fleet, text)
            order.append(text)

        await asyncio.gather(*(one(f"good {n}") for n in range(20)))
    assert order == [f"good {n}" for n in range(20)]
