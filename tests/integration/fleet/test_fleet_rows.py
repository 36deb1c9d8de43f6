"""Rows of the failure table that need a state, a stream or a clock, on the simulated fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai
import orjson
import pytest

from fanfold.backends.core.errors import EndpointError, RequestRefusedError, RunStoppedError
from fanfold.backends.core.types import Reply
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

from .conftest import Canned, Stub, completion

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", max_tokens=64)
FAST = FleetPolicy(
    streams=16,
    retry=RetryPolicy(backoff_s=0.01, refusal_pause_s=0.01, long_pause_s=0.02),
    timeout=TimeoutPolicy(request_s=5.0, fleet_s=5.0),
    breaker=BreakerPolicy(open_s=0.02, open_max_s=0.1),
    limit=AdaptiveLimitPolicy(settle_s=0.01),
)


def fleet_of(urls: tuple[str, ...], policy: FleetPolicy = FAST) -> Fleet:
    return Fleet([EndpointSpec(url) for url in urls], policy)


async def ask_all(fleet: Fleet, count: int) -> list[Reply]:
    model = FleetClient(fleet, PARAMS)

    async def one(number: int) -> Reply:
        return await model.ask([{"role": "user", "content": f"item {number}"}])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(n)) for n in range(count)]
    return [task.result() for task in tasks]


def nodes(*faults: FaultRule, **changes: Any) -> SimulatedFleet:
    settings: dict[str, Any] = {"nodes": 3, "model": "m", **changes}
    return SimulatedFleet(SimulationSpec.fast(faults=faults, **settings))


async def test_a_cold_model_is_waited_for_without_counting() -> None:
    policy = replace(FAST, retry=replace(FAST.retry, attempts=1))
    async with (
        nodes(FaultRule("cold", value=0.2)) as servers,
        fleet_of(servers.urls, policy) as fleet,
    ):
        assert all(r.content for r in await ask_all(fleet, 30))
        assert fleet.health().refusals > 0
        assert sum(r.opened for r in fleet.report()) == 0


async def test_a_spent_quota_of_tokens_is_waited_for() -> None:
    rule = FaultRule("tpm", value=2000.0)
    policy = replace(FAST, retry=replace(FAST.retry, attempts=1))
    async with (
        nodes(rule, nodes=1, time_scale=100.0, ttft_s=0.5) as servers,
        fleet_of(servers.urls, policy) as fleet,
    ):
        assert len(await ask_all(fleet, 60)) == 60
        assert fleet.health().refusals > 0


async def test_an_expired_token_is_renewed_everywhere() -> None:
    tokens = ["old"]
    async with nodes(FaultRule("401_after", value=0.0), time_scale=1.0) as servers:
        specs = [EndpointSpec(url, lambda: tokens[0]) for url in servers.urls]
        async with Fleet(specs, FAST) as fleet:
            tokens[0] = "new"
            assert len(await ask_all(fleet, 20)) == 20


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("no_usage", lambda r: r.content and r.usage.prompt is None),
        ("content_filter", lambda r: r.finish_reason == "content_filter"),
        ("refusal", lambda r: r.refusal),
        ("empty_content", lambda r: not r.content),
        ("bad_schema", lambda r: r.finish_reason == "stop"),
    ],
)
async def test_odd_answers_are_handed_on_as_they_are(
    kind: str, check: Callable[[Reply], object]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with nodes(FaultRule(kind)) as servers, fleet_of(servers.urls) as fleet:
        model = FleetClient(fleet, replace(PARAMS, schema=schema))
        reply = await model.ask([{"role": "user", "content": "q"}])
        calls = sum(r.calls for r in fleet.report())
    assert check(reply)
    assert calls == (3 if kind == "empty_content" else 1)


async def test_empty_answers_now_and_then_cost_repetitions_only() -> None:
    rule = FaultRule("empty_content", p=0.1)
    async with nodes(rule) as servers, fleet_of(servers.urls) as fleet:
        replies = await ask_all(fleet, 60)
        assert sum(r.calls for r in fleet.report()) > 60
    assert all(r.content for r in replies)


async def test_slow_nodes_get_less() -> None:
    policy = replace(FAST, limit=AdaptiveLimitPolicy(start=2, ceiling=2), hedge=None)
    async with (
        nodes(speeds={0: 0.1}, ttft_s=0.02) as servers,
        fleet_of(servers.urls, policy) as fleet,
    ):
        await ask_all(fleet, 120)
        slow, *quick = (r.calls for r in fleet.report())
    assert slow < min(quick) / 2


async def test_connections_that_the_server_closes_cost_no_attempt() -> None:
    policy = replace(FAST, retry=replace(FAST.retry, attempts=1))
    race = FaultRule("keepalive_race", value=0.01)
    async with nodes(race, nodes=1) as servers, fleet_of(servers.urls, policy) as fleet:
        for _ in range(5):
            await ask_all(fleet, 2)
            await asyncio.sleep(0.011)


async def test_nodes_die_and_return_without_a_loss() -> None:
    faults = [FaultRule("die_at", nodes=(n,), value=0.05 + 0.05 * n) for n in range(2)]
    faults += [FaultRule("revive_at", nodes=(n,), value=0.3) for n in range(2)]
    async with (
        nodes(*faults, addressing="port", ttft_s=0.02) as servers,
        fleet_of(servers.urls) as fleet,
    ):
        replies = await ask_all(fleet, 300)
    assert all(r.content for r in replies)


async def test_nodes_that_shut_down_in_good_order_lose_nothing() -> None:
    rule = FaultRule("die_at", nodes=(0,), value=0.05, graceful=True)
    async with (
        nodes(rule, addressing="port", ttft_s=0.02) as servers,
        fleet_of(servers.urls) as fleet,
    ):
        replies = await ask_all(fleet, 300)
    assert all(r.finish_reason in {"stop", "length"} for r in replies)


async def stream(fleet: Fleet) -> str:
    chat = ChatFleet.of(fleet, PARAMS)
    return "".join([str(chunk.text) async for chunk in chat.astream("q")])


@pytest.mark.parametrize("kind", ["429", "500", "503_busy", "502_html", "drop", "reset"])
async def test_streams_move_on_while_nothing_has_come(kind: str) -> None:
    rule = FaultRule(kind, p=0.3)
    async with nodes(rule) as servers, fleet_of(servers.urls) as fleet:
        texts = await asyncio.gather(*(stream(fleet) for _ in range(20)))
        struck = sum(sum(r.failures.values()) for r in fleet.report())
    assert all(texts)
    assert struck > 0


@pytest.mark.parametrize("kind", ["stream_cut", "stream_error", "stream_api_error"])
async def test_streams_that_break_off_are_failures(kind: str) -> None:
    async with nodes(FaultRule(kind), nodes=1) as servers, fleet_of(servers.urls) as fleet:
        with pytest.raises((openai.APIError, EndpointError)):
            await stream(fleet)
        report = fleet.report()[0]
        assert (report.calls, sum(report.failures.values())) == (1, 1)
        assert fleet.in_flight == 0


async def test_a_stream_whose_end_names_no_reason_is_an_answer() -> None:
    rule = FaultRule("stream_no_finish")
    async with nodes(rule, nodes=1) as servers, fleet_of(servers.urls) as fleet:
        assert await stream(fleet)
        report = fleet.report()[0]
        assert (report.calls, sum(report.failures.values())) == (1, 0)
        assert fleet.in_flight == 0


def events(*chunks: dict[str, Any]) -> Canned:
    lines = b"".join(b"data: " + orjson.dumps(c) + b"\n\n" for c in chunks)
    return Canned(200, lines + b"data: [DONE]\n\n", {"Content-Type": "text/event-stream"})


def chunk(text: str, finish: str | None = None, name: str = "c") -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": name, "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


@pytest.mark.parametrize(
    "broken",
    [
        events(chunk("[ERROR] no", "stop", "chatcmpl-api-error")),
        events(chunk(""), {"error": {"message": "boom", "code": 500}}),
        events(chunk("")),
        events(),
        Canned(200, b"", {"Content-Type": "text/event-stream"}),
    ],
)
async def test_streams_that_fail_before_their_first_token_move_on(
    stub: Stub, broken: Canned
) -> None:
    stub.answers["m"] = [broken, events(chunk("he"), chunk("llo", "stop"))]
    async with Fleet([EndpointSpec(stub.url)], FAST) as fleet:
        assert await stream(fleet) == "hello"
        report = fleet.report()[0]
    assert (report.calls, sum(report.failures.values())) == (2, 1)


async def test_a_stream_that_the_server_gave_up_is_a_failure(stub: Stub) -> None:
    stub.answers["m"] = [events(chunk("he"), chunk("", "abort"))]
    async with Fleet([EndpointSpec(stub.url)], FAST) as fleet:
        with pytest.raises(openai.APIConnectionError):
            await stream(fleet)
        assert fleet.report()[0].failures == {"EndpointLostError": 1}


@pytest.mark.parametrize("status", [403, 404, 405])
async def test_an_endpoint_that_cannot_serve_is_left_for_good(
    make_stub: Callable[[], Stub], status: int
) -> None:
    bad, good = make_stub(), make_stub()
    bad.answers["m"] = [Canned(status, b"no")]
    good.answers["m"] = [Canned(200, completion())]
    members = [EndpointSpec(bad.url, weight=99), EndpointSpec(good.url)]
    async with Fleet(members, FAST) as fleet:
        assert len(await ask_all(fleet, 1)) == 1
        assert fleet.report()[0].state == "ejected"
    async with Fleet(members[:1], FAST) as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            await ask_all(fleet, 1)
    assert caught.group_contains(RunStoppedError)


async def test_a_long_refusal_sends_calls_elsewhere(make_stub: Callable[[], Stub]) -> None:
    busy, good = make_stub(), make_stub()
    busy.answers["m"] = [Canned(429, b"no", {"Retry-After": "9000"})]
    good.answers["m"] = [Canned(200, completion())]
    members = [EndpointSpec(busy.url, weight=99), EndpointSpec(good.url)]
    async with Fleet(members, FAST) as fleet:
        assert len(await ask_all(fleet, 8)) == 8
        assert fleet.report()[0].state == "resting"
    assert len(busy.bodies) <= AdaptiveLimitPolicy().start


@pytest.mark.parametrize("code", ["quota_exceeded", "batch_ongoing"])
async def test_a_quota_of_the_user_rests_the_whole_host(stub: Stub, code: str) -> None:
    refusal = Canned(400, {"error": {"code": code}})
    stub.answers["m"] = [refusal, Canned(200, completion())]
    other = stub.url.replace("/v1", "/other/v1")
    policy = replace(FAST, retry=replace(FAST.retry, attempts=1))
    async with Fleet([EndpointSpec(stub.url), EndpointSpec(other)], policy) as fleet:
        call = asyncio.create_task(ask_all(fleet, 1))
        async with asyncio.timeout(10):
            while not all(e.resting for e in fleet.endpoints):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
        assert len(await call) == 1
    assert len(stub.bodies) == 2


async def test_a_schema_that_one_endpoint_refuses_goes_elsewhere(
    make_stub: Callable[[], Stub],
) -> None:
    old, good = make_stub(), make_stub()
    old.answers["m"] = [Canned(400, {"error": {"message": "x", "param": "response_format"}})]
    good.answers["m"] = [Canned(200, completion())]
    async with Fleet([EndpointSpec(good.url)], FAST) as fleet:
        await ask_all(fleet, 1)
        fleet.update([EndpointSpec(good.url), EndpointSpec(old.url, weight=99)])
        assert len(await ask_all(fleet, 20)) == 20
        assert [r.state for r in fleet.report()] == ["in use", "ejected"]


async def test_who_alone_accepts_nothing_is_ejected(make_stub: Callable[[], Stub]) -> None:
    odd, good = make_stub(), make_stub()
    odd.answers["m"] = [Canned(400, {"error": {"message": "odd"}})]
    good.answers["m"] = [Canned(200, completion())]
    async with Fleet([EndpointSpec(good.url)], FAST) as fleet:
        await ask_all(fleet, 1)
        fleet.update([EndpointSpec(good.url), EndpointSpec(odd.url, weight=99)])
        for _ in range(FAST.retry.hopeless_after):
            with pytest.raises(ExceptionGroup) as caught:
                await ask_all(fleet, 1)
            assert caught.group_contains(RequestRefusedError)
        assert len(await ask_all(fleet, 10)) == 10
        assert fleet.report()[1].state == "ejected"


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    spec = SimulationSpec.fast(nodes=1, model="m", tpot_s=1.0)
    policy = replace(FAST, timeout=TimeoutPolicy(chunk_s=0.05))
    async with SimulatedFleet(spec) as servers, fleet_of(servers.urls, policy) as fleet:
        with pytest.raises(openai.APIError):
            await stream(fleet)
        assert fleet.report()[0].failures == {"EndpointLostError": 1}
        assert fleet.in_flight == 0
