"""The fleet against faults: nothing is lost, and hopeless requests are not repeated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.core.errors import (
    AuthenticationError,
    ConfigurationError,
    EndpointBusyError,
    EndpointError,
    EndpointLostError,
    PromptTooLongError,
    RequestRefusedError,
    RunStoppedError,
)
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Reply, Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import HTTPAnswer, classify_answer
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.health import HealthMonitor
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    BreakerPolicy,
    FleetPolicy,
    HedgePolicy,
    ModelParams,
    RateLimitPolicy,
    RetryPolicy,
    TimeoutPolicy,
)
from fanfold.backends.fleet.transport import Transport
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

from .conftest import Canned, Stub, completion, until

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", max_tokens=64)
FAST = FleetPolicy(
    streams=32,
    retry=RetryPolicy(backoff_s=0.01, refusal_pause_s=0.01, attempts=6),
    timeout=TimeoutPolicy(request_s=0.5, fleet_s=5.0),
    breaker=BreakerPolicy(open_s=0.05, open_max_s=0.1),
    limit=AdaptiveLimitPolicy(settle_s=0.01),
)
BOOM = Canned(500, {"error": {"message": "boom", "code": 500}})


def ask(fleet: Fleet, text: str = "q", model: str = "m") -> Any:
    messages = [{"role": "user", "content": text}]
    return FleetClient(fleet, replace(PARAMS, name=model)).ask(messages)


async def ask_all(fleet: Fleet, count: int, model: str = "m") -> list[Reply]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(fleet, f"item {i}", model)) for i in range(count)]
    return [task.result() for task in tasks]


def specs(*urls: str) -> list[EndpointSpec]:
    return [EndpointSpec(url) for url in urls]


@pytest.mark.parametrize(
    "kind",
    [
        *("429", "429_ra", "500", "500_text", "502_html", "503", "503_busy", "504"),
        *("hang", "drop", "reset", "malformed", "cut_body", "html200", "error200"),
        *("null_choices", "empty_choices"),
    ],
)
async def test_a_fault_on_some_calls_loses_no_item(kind: str) -> None:
    rule = FaultRule(kind, p=0.1, value=0.0 if kind == "429_ra" else None)
    spec = SimulationSpec.fast(nodes=4, model="m", faults=(rule,))
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), FAST) as fleet:
        replies = await ask_all(fleet, 60)
        struck = sum(sum(r.failures.values()) for r in fleet.report())
    assert all(r.content and r.simulated for r in replies)
    assert struck > 0


async def test_a_dead_node_costs_a_few_calls() -> None:
    spec = SimulationSpec.fast(nodes=4, model="m", addressing="port")
    slow = replace(
        FAST, breaker=BreakerPolicy(open_s=60.0), limit=AdaptiveLimitPolicy(settle_s=60.0)
    )
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), slow) as fleet:
        await servers.kill(2)
        await ask_all(fleet, 200)
        dead = fleet.report()[2]
        assert (fleet.health().healthy, dead.state, dead.opened) == (3, "unhealthy", 1)
    assert dead.calls <= AdaptiveLimitPolicy().start


async def test_a_returning_node_is_used_again() -> None:
    spec = SimulationSpec.fast(nodes=2, model="m", addressing="port")
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), FAST) as fleet:
        await servers.kill(1)
        await ask_all(fleet, 20)
        await servers.revive(1)
        async with asyncio.timeout(10):
            while fleet.report()[1].completion_tokens == 0:
                await ask_all(fleet, 20)
        assert fleet.health().healthy == 2


async def test_nodes_that_start_late_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    spec = SimulationSpec.fast(nodes=1, model="m", addressing="port")
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), FAST) as fleet:
        await servers.kill(0)
        call = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.health().paused is not None)
        assert fleet.health().healthy == 0
        await servers.revive(0)
        assert (await call).content
        assert fleet.health().paused is None
    assert sum("no endpoint is alive" in r.message for r in caplog.records) == 1


async def test_a_fleet_that_stays_dead_stops_the_run() -> None:
    policy = replace(FAST, timeout=TimeoutPolicy(fleet_s=0.1))
    async with Fleet(specs("http://127.0.0.1:1", "http://127.0.0.1:2"), policy) as fleet:
        calls = [asyncio.create_task(ask(fleet)) for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(r) for r in results} == {RunStoppedError}
        with pytest.raises(RunStoppedError, match="resume"):
            await ask(fleet)


async def test_poison_fails_its_item_only(make_stub: Callable[[], Stub]) -> None:
    stubs = [make_stub() for _ in range(5)]
    for stub in stubs:
        stub.answers = {"bad": [BOOM], "m": [Canned(200, completion())]}
    policy = replace(FAST, retry=RetryPolicy(attempts=9))
    async with Fleet(specs(*(s.url for s in stubs)), policy) as fleet:
        await ask_all(fleet, 5)
        with pytest.raises(EndpointError, match="boom"):
            await ask(fleet, model="bad")
        assert fleet.health().healthy == 5
    asked = [[b["model"] for b in s.bodies] for s in stubs]
    assert all("m" in models for models in asked)
    assert sum(models.count("bad") for models in asked) == 3


@pytest.mark.parametrize(
    ("answer", "error", "calls"),
    [
        (Canned(400, {"error": {"param": "input_tokens"}}), PromptTooLongError, 1),
        (Canned(422, {"detail": []}), RequestRefusedError, 1),
        (Canned(413, b"large"), RequestRefusedError, 1),
        (Canned(501, b"no"), RequestRefusedError, 1),
        (Canned(409, b"conflict"), EndpointError, 6),
    ],
)
async def test_what_is_hopeless_is_not_repeated(
    stub: Stub, answer: Canned, error: type[EndpointError], calls: int
) -> None:
    stub.answers = {"m": [answer], "good": [Canned(200, completion())]}
    async with Fleet(specs(stub.url), FAST) as fleet:
        await ask(fleet, model="good")
        with pytest.raises(error):
            await ask(fleet)
    assert len(stub.bodies) == calls + 1


@pytest.mark.parametrize(
    ("answer", "items", "words"),
    [
        (Canned(404, {"error": {"message": "no model m"}}), 1, "no endpoint is left"),
        (Canned(401, {"error": "Unauthorized"}), 1, "api_key"),
        (Canned(403, b"no"), 1, "not allowed"),
        (Canned(400, {"error": {"message": "x", "param": "response_format"}}), 1, "task.schema"),
        (Canned(400, {"error": {"message": "odd"}}), 10, "no request was accepted"),
        (Canned(429, {"error": {"code": "insufficient_quota"}}), 1, "quota"),
        (Canned(429, b"wait", {"Retry-After": "9000"}), 1, "resume the run in 9000 s"),
    ],
)
async def test_the_run_stops_early_and_says_why(
    stub: Stub, answer: Canned, items: int, words: str
) -> None:
    stub.answers["m"] = [answer]
    async with Fleet(specs(stub.url), FAST) as fleet:
        for _ in range(items - 1):
            with pytest.raises(RequestRefusedError):
                await ask(fleet)
        error = ConfigurationError if words == "task.schema" else RunStoppedError
        for _ in range(2):
            with pytest.raises(error, match=words):
                await ask(fleet)
    assert len(stub.bodies) == items


async def test_one_bad_endpoint_of_many_is_ejected(make_stub: Callable[[], Stub]) -> None:
    bad, good = make_stub(), make_stub()
    bad.answers["m"] = [Canned(404, b"<html>")]
    good.answers["m"] = [Canned(200, completion())]
    policy = replace(FAST, limit=AdaptiveLimitPolicy(settle_s=60.0))
    async with Fleet(specs(bad.url, good.url), policy) as fleet:
        assert len(await ask_all(fleet, 40)) == 40
        assert [r.state for r in fleet.report()] == ["ejected", "in use"]
    assert len(bad.bodies) <= AdaptiveLimitPolicy().start


async def test_two_refused_requests_are_two_wherever_they_lie_in_memory(stub: Stub) -> None:
    """Requests without an item: the second failure may lie where the first one did."""
    async with Fleet([EndpointSpec(stub.url)], FAST) as fleet:
        (endpoint,) = fleet.endpoints
        monitor = HealthMonitor(fleet.endpoints, FAST, Transport(FAST))
        for ejected in (False, True):
            monitor.record_failure(
                endpoint, classify_answer(HTTPAnswer(404, {}, b"<html>"), "stub")
            )
            assert endpoint.ejected is ejected


async def test_a_key_is_renewed_once(stub: Stub) -> None:
    keys = ["old", "new"]

    async def key() -> str:
        return keys[0]

    stub.answers["m"] = [Canned(401, b""), Canned(200, completion())]
    stub.on_call = lambda: keys.pop(0) if len(keys) > 1 else None
    async with Fleet([EndpointSpec(stub.url, key)], FAST) as fleet:
        assert (await ask(fleet)).content == "hello"
    assert stub.keys == ["Bearer old", "Bearer new"]


async def test_a_new_key_that_is_refused_too_stops_the_run(stub: Stub) -> None:
    stub.answers["m"] = [Canned(401, b"")]
    async with Fleet([EndpointSpec(stub.url, lambda: "same")], FAST) as fleet:
        with pytest.raises(RunStoppedError) as caught:
            await ask(fleet)
    assert isinstance(caught.value.__cause__, AuthenticationError)
    assert len(stub.bodies) == 1


async def test_a_long_prompt_moves_to_a_longer_context(make_stub: Callable[[], Stub]) -> None:
    short, long = make_stub(), make_stub()
    short.answers["m"] = [Canned(400, {"error": {"param": "input_tokens"}})]
    long.answers["m"] = [Canned(200, completion())]
    members = [
        EndpointSpec(short.url, max_model_len=10, weight=9),
        EndpointSpec(long.url, max_model_len=99),
    ]
    async with Fleet(members, FAST) as fleet:
        assert (await ask(fleet)).content == "hello"
    assert (len(short.bodies), len(long.bodies)) == (1, 1)


async def test_models_are_mapped(stub: Stub) -> None:
    stub.answers["theirs"] = [Canned(200, completion())]
    async with Fleet([EndpointSpec(stub.url, model="theirs")], FAST) as fleet:
        await ask(fleet)
    assert stub.bodies[0]["model"] == "theirs"


async def test_every_request_is_accounted(make_stub: Callable[[], Stub]) -> None:
    bad, good = make_stub(), make_stub()
    bad.answers["m"] = [BOOM]
    good.answers["m"] = [Canned(200, completion())]
    members = [EndpointSpec(bad.url, weight=9), EndpointSpec(good.url, label="good")]
    log = CallLog()
    CURRENT_CALLS.set(log)
    async with Fleet(members, FAST) as fleet:
        await ask(fleet)
    assert log == CallLog(2, Usage(3, 2), "good", "served", False)
    refused, answered = log.usage_by_endpoint.values()
    assert (refused.requests, refused.usage.tokens, refused.model) == (1, 0, None)
    assert (answered.endpoint, answered.requests) == ("good", 1)
    assert (answered.usage, answered.model) == (Usage(3, 2), "served")


@pytest.mark.parametrize("simulated", [None, False])
async def test_simulated_and_real_answers_never_mix(
    make_stub: Callable[[], Stub], simulated: bool | None
) -> None:
    real, fake = make_stub(), make_stub()
    real.answers["m"] = [Canned(200, completion())]
    fake.answers["m"] = [Canned(200, completion(system_fingerprint="fanfold-simulated"))]
    async with Fleet(specs(real.url, fake.url), FAST, simulated=simulated) as fleet:
        results = await asyncio.gather(*(ask(fleet) for _ in range(20)), return_exceptions=True)
    stops = [r for r in results if isinstance(r, RunStoppedError)]
    replies = [r for r in results if isinstance(r, Reply)]
    assert stops
    assert "must not be mixed" in stops[0].message
    assert len({r.simulated for r in replies}) == 1


async def test_streams_is_the_cap_over_all() -> None:
    spec = SimulationSpec.fast(nodes=4, model="m")
    policy = replace(FAST, streams=7)
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), policy) as fleet:
        calls = asyncio.create_task(ask_all(fleet, 100))
        most = 0
        while not calls.done():
            most = max(most, fleet.in_flight)
            await asyncio.sleep(0.001)
        await calls
    assert most == 7


async def test_the_tokens_of_every_request_are_settled(stub: Stub) -> None:
    stub.answers["m"] = [BOOM, Canned(200, completion())]
    policy = replace(FAST, rate_limit=RateLimitPolicy(tokens_per_min=1e9))
    async with Fleet(specs(stub.url), policy) as fleet:
        await ask(fleet, "x" * 40)
        quota = fleet.limiter.quota
        assert quota is not None
        window = quota._window
        assert window is not None
        assert (window.reserved, window._used) == (0, 5)


async def test_a_lost_answer_counts_at_its_most(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion(), held=True)]
    policy = replace(FAST, rate_limit=RateLimitPolicy(tokens_per_min=1e9))
    async with Fleet(specs(stub.url), policy) as fleet:
        call = asyncio.create_task(ask(fleet, "x" * 40))
        await until(lambda: bool(stub.bodies))
        quota = fleet.limiter.quota
        assert quota is not None
        window = quota._window
        assert window is not None
        reserved = window.reserved
        assert reserved >= 40 + 64
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert (window.reserved, window._used) == (0, reserved)


async def test_a_stop_reaches_calls_that_wait_for_a_quota(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion())]
    policy = replace(FAST, rate_limit=RateLimitPolicy(requests_per_s=0.01))
    async with Fleet(specs(stub.url), policy) as fleet:
        await ask(fleet)
        later = [asyncio.create_task(ask(fleet)) for _ in range(2)]
        await until(lambda: fleet.health().waiting == 2)
        fleet._monitor.stop("enough")
        ends = await asyncio.gather(*later, return_exceptions=True)
    assert [type(end) for end in ends] == [RunStoppedError] * 2
    assert len(stub.bodies) == 1


async def test_an_endpoint_with_a_quota_is_paced(make_stub: Callable[[], Stub]) -> None:
    one, other = make_stub(), make_stub()
    for stub in (one, other):
        stub.answers["m"] = [Canned(200, completion())]
    members = [EndpointSpec(one.url, requests_per_s=3.0, weight=99.0), EndpointSpec(other.url)]
    async with Fleet(members, FAST) as fleet:
        await ask_all(fleet, 40)
    assert len(one.bodies) <= 6


async def test_stragglers_are_asked_again_elsewhere() -> None:
    hang = FaultRule("hang", max_count=3)
    spec = SimulationSpec.fast(nodes=4, model="m", faults=(hang,))
    hedge = HedgePolicy(share=1.0, tick_s=0.005)
    policy = replace(FAST, timeout=TimeoutPolicy(request_s=60.0), hedge=hedge, streams=64)
    async with (
        asyncio.timeout(20),
        SimulatedFleet(spec) as servers,
        Fleet(specs(*servers.urls), policy) as fleet,
    ):
        assert len(await ask_all(fleet, 64)) == 64
        assert sum(r.hedges for r in fleet.report()) > 0
        await until(lambda: fleet.in_flight == 0)


async def test_cancelled_calls_hold_nothing() -> None:
    spec = SimulationSpec.fast(nodes=2, model="m", faults=(FaultRule("hang"),))
    policy = replace(FAST, streams=4)
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), policy) as fleet:
        calls = [asyncio.create_task(ask(fleet)) for _ in range(10)]
        await until(lambda: fleet.in_flight == 4)
        for call in calls:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(r) for r in results} == {asyncio.CancelledError}
        assert (fleet.in_flight, fleet.health().waiting) == (0, 0)


async def test_closing_leaves_nothing_on_the_loop() -> None:
    before = len(asyncio.all_tasks())
    policy = replace(FAST, retry=RetryPolicy(attempts=1), breaker=BreakerPolicy(open_s=0.0))
    async with Fleet(specs("http://127.0.0.1:1"), policy) as fleet:
        call = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.health().paused is not None)
        call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before


async def test_refusals_narrow_the_lane() -> None:
    spec = SimulationSpec.fast(
        nodes=1, model="m", max_num_seqs=4, max_num_queued_reqs=2, ttft_s=0.02
    )
    policy = replace(FAST, streams=64)
    async with SimulatedFleet(spec) as servers, Fleet(specs(*servers.urls), policy) as fleet:
        assert len(await ask_all(fleet, 200)) == 200
        assert fleet.report()[0].width < 32
        assert fleet.health().refusals > 0


async def test_busy_beyond_patience_fails_the_item(stub: Stub) -> None:
    stub.answers["m"] = [Canned(429, b"no")]
    policy = replace(FAST, retry=replace(FAST.retry, patience_s=0.05))
    async with Fleet(specs(stub.url), policy) as fleet:
        with pytest.raises(EndpointBusyError):
            await ask(fleet)


async def test_an_idle_connection_that_was_closed_is_replaced_for_free(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, None), Canned(200, completion())]
    policy = replace(FAST, retry=RetryPolicy(attempts=1))
    async with Fleet(specs(stub.url), policy) as fleet:
        assert (await ask(fleet)).content == "hello"
        stub.answers["m"] = [Canned(200, None)]
        with pytest.raises(EndpointLostError):
            await ask(fleet)
