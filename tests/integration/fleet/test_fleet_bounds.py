"""The limits of a run: budgets, lengths, quotas, load, affinity, open files."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai
import pytest

from fanfold.backends.core.errors import (
    ConfigurationError,
    EndpointError,
    PromptTooLongError,
    RunStoppedError,
)
from fanfold.backends.core.process import ensure_open_files
from fanfold.backends.core.types import Reply
from fanfold.backends.discovery.probe import check_models, probe_models
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import HTTPAnswer
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    AffinityPolicy,
    FleetPolicy,
    LoadPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)
from fanfold.backends.fleet.server_load import count_requests, read_load
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

from .conftest import Canned, Stub, completion, until

pytestmark = pytest.mark.integration

FAST = RetryPolicy(backoff_s=0.001, refusal_pause_s=0.001)
GOOD = Canned(200, completion())
EMPTY = Canned(200, completion(""))
BOOM = Canned(500, {"error": {"message": "boom", "code": 500}})


def ask(fleet: Fleet, text: str = "q", most: int | None = 64) -> Any:
    messages = [{"role": "user", "content": text}]
    return FleetClient(fleet, ModelParams("m", max_tokens=most)).ask(messages)


def policy(**changes: Any) -> FleetPolicy:
    return FleetPolicy(retry=replace(FAST, **changes))


async def test_an_empty_answer_is_repeated_here_then_there(
    make_stub: Callable[[], Stub],
) -> None:
    one, other = make_stub(), make_stub()
    one.answers["m"] = [EMPTY]
    other.answers["m"] = [GOOD]
    members = [EndpointSpec(one.url, weight=99), EndpointSpec(other.url)]
    async with Fleet(members, policy()) as fleet:
        assert (await ask(fleet)).content == "hello"
    assert (len(one.bodies), len(other.bodies)) == (2, 1)


@pytest.mark.parametrize(("attempts", "calls"), [(4, 3), (2, 2), (1, 1)])
async def test_an_answer_that_stays_empty_is_the_callers(
    stub: Stub, attempts: int, calls: int
) -> None:
    stub.answers["m"] = [EMPTY]
    async with Fleet([EndpointSpec(stub.url)], policy(attempts=attempts)) as fleet:
        reply: Reply = await ask(fleet)
    assert (reply.content, reply.finish_reason) == ("", "stop")
    assert len(stub.bodies) == calls


CALL: dict[str, Any] = {
    "id": "1",
    "type": "function",
    "function": {"name": "look_up", "arguments": "{}"},
}


@pytest.mark.parametrize(
    "answer",
    [
        completion("", finish="length"),
        completion("", finish="content_filter"),
        completion(None, message={"refusal": "no"}),
        completion(None, message={"tool_calls": [CALL]}),
    ],
)
async def test_answers_that_are_empty_for_a_reason_are_not_repeated(
    stub: Stub, answer: Any
) -> None:
    stub.answers["m"] = [Canned(200, answer)]
    async with Fleet([EndpointSpec(stub.url)], policy()) as fleet:
        await ask(fleet)
    assert len(stub.bodies) == 1


async def test_a_retry_budget_stops_the_run(stub: Stub) -> None:
    stub.answers["m"] = [BOOM]
    bounds = policy(budget=0.5, first_calls=4, attempts=9)
    async with Fleet([EndpointSpec(stub.url)], bounds) as fleet:
        with pytest.raises(RunStoppedError, match=r"retry budget of 0\.5"):
            await ask(fleet)
    assert len(stub.bodies) == 3


async def test_one_good_answer_in_five_is_enough_to_go_on(stub: Stub) -> None:
    stub.answers["m"] = [GOOD, BOOM, BOOM, BOOM, BOOM, GOOD]
    async with Fleet([EndpointSpec(stub.url)], policy(attempts=1, first_calls=5)) as fleet:
        await ask(fleet)
        for _ in range(4):
            with pytest.raises(EndpointError):
                await ask(fleet)
        await ask(fleet)


async def test_a_run_that_only_fails_is_stopped_early(stub: Stub) -> None:
    stub.answers["m"] = [BOOM]
    bounds = policy(attempts=1, first_calls=5)
    bounds = replace(bounds, breaker=replace(bounds.breaker, failures=99))
    async with Fleet([EndpointSpec(stub.url)], bounds) as fleet:
        for _ in range(4):
            with pytest.raises(EndpointError):
                await ask(fleet)
        with pytest.raises(RunStoppedError, match="5 of the first 5 calls failed"):
            await ask(fleet)


async def test_long_prompts_at_the_head_of_the_input_stop_nothing(stub: Stub) -> None:
    stub.answers["m"] = [Canned(400, {"error": {"param": "input_tokens"}})]
    async with Fleet([EndpointSpec(stub.url)], policy(first_calls=5)) as fleet:
        for _ in range(20):
            with pytest.raises(PromptTooLongError):
                await ask(fleet)
        stub.answers["m"] = [GOOD]
        await ask(fleet)


async def test_too_many_tokens_are_lowered_with_one_warning(
    stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    words = "max_completion_tokens=64 cannot be greater than max_model_len=32."
    refusal = {"error": {"message": words, "param": "max_completion_tokens", "code": 400}}
    stub.answers["m"] = [Canned(400, refusal), GOOD]
    async with Fleet([EndpointSpec(stub.url)], policy(attempts=1)) as fleet:
        assert (await ask(fleet)).content == "hello"
        stub.answers["m"] = [Canned(400, refusal), GOOD]
        for _ in range(3):
            assert (await ask(fleet, "another")).content == "hello"
        await ask(fleet, most=8)
    assert [b["max_completion_tokens"] for b in stub.bodies] == [64, 32, 64, 32, 32, 32, 8]
    assert sum("model.max_tokens" in r.message for r in caplog.records) == 1


async def test_the_context_that_servers_name_reaches_the_fleet() -> None:
    short = FaultRule("context", nodes=(0,), value=300)
    spec = SimulationSpec.fast(nodes=3, faults=(short,), max_model_len=900)
    async with SimulatedFleet(spec) as servers:
        specs = [EndpointSpec(url) for url in servers.urls]
        checked = check_models(await probe_models(specs), None)
        assert [s.max_model_len for s in checked.specs] == [300, 900, 900]
        assert [s in checked.specs for s in specs] == [True] * 3
        members = [replace(checked.specs[0], weight=99), *checked.specs[1:]]
        async with Fleet(members) as fleet:
            model = FleetClient(fleet, ModelParams(checked.model, max_tokens=4))
            reply = await model.ask([{"role": "user", "content": "word " * 400}])
            calls = [r.calls for r in fleet.report()]
    assert reply.content
    assert calls[0] == 1
    assert sum(calls) == 2


async def test_a_token_quota_of_one_endpoint_sends_the_rest_elsewhere(
    make_stub: Callable[[], Stub],
) -> None:
    one, other = make_stub(), make_stub()
    for stub in (one, other):
        stub.answers["m"] = [GOOD]
    members = [EndpointSpec(one.url, tokens_per_min=200, weight=99), EndpointSpec(other.url)]
    async with Fleet(members, policy()) as fleet:
        for _ in range(20):
            await ask(fleet)
    # Each reserves 64 and uses 5: the third would not fit while two are unsettled.
    assert 0 < len(one.bodies) < 20
    assert len(one.bodies) + len(other.bodies) == 20


@pytest.mark.parametrize("source", ["metrics", "load"])
async def test_the_load_of_others_is_seen(source: Any) -> None:
    spec = SimulationSpec.fast(nodes=2, model="m", ttft_s=30.0, max_num_seqs=4)
    bounds = replace(policy(), load=LoadPolicy(source, every_s=0.01))
    async with SimulatedFleet(spec) as servers:
        busy = EndpointSpec(servers.urls[0])
        async with (
            Fleet([busy]) as strangers,
            Fleet(list(map(EndpointSpec, servers.urls)), bounds) as ours,
        ):
            foreign = [asyncio.create_task(ask(strangers)) for _ in range(6)]
            await until(lambda: strangers.in_flight == 6)
            call = asyncio.create_task(ask(ours))
            await until(lambda: ours.endpoints[0].foreign_load == 6)
            assert ours.endpoints[1].foreign_load == 0
            for task in (*foreign, call):
                task.cancel()
            await asyncio.gather(*foreign, call, return_exceptions=True)


@pytest.mark.parametrize(
    ("answer", "load"),
    [
        (
            HTTPAnswer(
                200, {}, b'vllm:num_requests_running{a="}"} 3.0\nvllm:num_requests_waiting 2'
            ),
            5,
        ),
        (HTTPAnswer(200, {}, b'{"server_load": 7}'), 7),
        (HTTPAnswer(404, {}, b'{"server_load": 7}'), None),
        (HTTPAnswer(200, {}, b"<html>"), None),
        (HTTPAnswer(200, {}, b"[]"), None),
    ],
)
def test_load_is_read(answer: HTTPAnswer, load: int | None) -> None:
    read = read_load(answer)
    assert (None if read is None else count_requests(read)) == load


async def test_items_that_begin_alike_meet_the_same_endpoint(
    make_stub: Callable[[], Stub],
) -> None:
    stubs = [make_stub() for _ in range(4)]
    for stub in stubs:
        stub.answers["m"] = [GOOD]
    bounds = replace(policy(), affinity=AffinityPolicy(prefix=8, slack=100.0))
    async with Fleet([EndpointSpec(s.url) for s in stubs], bounds) as fleet:
        for n in range(24):
            await ask(fleet, f"{'abc'[n % 3]} document: question {n}")
    homes = [{b["messages"][0]["content"][0] for b in s.bodies} for s in stubs]
    assert sorted(letter for home in homes for letter in home) == ["a", "b", "c"]


async def test_a_stream_that_is_cut_counts_against_its_endpoint(stub: Stub) -> None:
    event = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": null}]}\n\n'
    stub.answers["m"] = [Canned(200, event, {"Content-Type": "text/event-stream"})]
    async with Fleet([EndpointSpec(stub.url)], policy()) as fleet:
        with pytest.raises(openai.APIConnectionError):
            async for _ in ChatFleet.of(fleet, ModelParams("m")).astream("q"):
                pass
        assert fleet.report()[0].failures == {"EndpointLostError": 1}
        assert fleet.in_flight == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no limit to raise")
def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    ensure_open_files(1000)
    assert limits[-1] == (1256, 4096)
    ensure_open_files(500)
    assert len(limits) == 2
    with pytest.raises(ConfigurationError, match=r"limits\.streams to 3840"):
        Fleet([EndpointSpec("http://n:1")], FleetPolicy(streams=5000))


async def test_proxies_are_for_those_that_ask_for_one(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.answers["m"] = [GOOD]
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", stub.url.removesuffix("/v1"))
    gateway = EndpointSpec("http://gateway.invalid/v1", proxied=True)
    async with Fleet([gateway]) as fleet:
        assert (await ask(fleet)).endpoint == "gateway.invalid"
    assert len(stub.bodies) == 1
    quick = replace(policy(), timeout=TimeoutPolicy(fleet_s=0.01))
    async with Fleet([replace(gateway, proxied=False)], quick) as fleet:
        with pytest.raises(RunStoppedError):
            await ask(fleet)
    assert len(stub.bodies) == 1
