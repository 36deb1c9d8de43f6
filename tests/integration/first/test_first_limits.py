"""The limits of the FIRST gateway: no window of it is exceeded, and every 429 is survived."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fanfold.backends.core.types import Reply
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams, RateLimitPolicy, RetryPolicy
from fanfold.tests.support.first_gateway import (
    DeploymentSpec,
    FirstGateway,
    make_spec,
)

pytestmark = pytest.mark.integration

PARAMS = ModelParams("org/m", max_tokens=40)
PROMPT, ITEM = 110, 150
"""Tokens of a prompt, and of an item with its answer, as the stand-in counts them."""
QUICK = FleetPolicy(retry=RetryPolicy(attempts=1, long_pause_s=0.2), whole_answers=True)


def make_prompt(n: int) -> str:
    """Return a prompt of ``PROMPT`` tokens: four bytes each, and seven for the chat template."""
    return f"item {n:06} ".ljust(4 * (PROMPT - 7), "x")


def make_member(
    gateway: FirstGateway, tokens: float, window_s: float, path: str = "sophia/vllm"
) -> EndpointSpec:
    url = f"{gateway.url}/{path}/v1"
    return EndpointSpec(url, "good", tokens_per_min=tokens, window_s=window_s)


async def ask_all(fleet: Fleet, count: int) -> list[Reply]:
    client = FleetClient(fleet, PARAMS)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.ask([{"role": "user", "content": make_prompt(n)}]))
            for n in range(count)
        ]
    return [task.result() for task in tasks]


async def test_no_window_is_exceeded_and_nothing_is_refused() -> None:
    spec = make_spec(
        tokens_per_min_user=15_000, window_s=1.5, output_tokens=(40, 40), answer_s=0.05
    )
    async with FirstGateway(spec) as gateway:
        policy = replace(QUICK, streams=1000)
        async with Fleet([make_member(gateway, 15_000, 1.5)], policy) as fleet:
            replies = await ask_all(fleet, 300)
        (windows,) = gateway.windows.values()
    assert len(replies) == 300
    assert sum(window.tokens for window in windows) == 300 * ITEM
    # carried: what was in flight at the beginning of a window counts in it
    assert all(window.tokens <= 15_000 for window in windows)
    assert gateway.refusals == {}


async def test_requests_stay_below_the_quota_of_each_second() -> None:
    async with FirstGateway(make_spec(requests_per_s=50)) as gateway:
        policy = replace(QUICK, rate_limit=RateLimitPolicy(requests_per_s=40.0))
        async with Fleet([EndpointSpec(f"{gateway.url}/sophia/vllm/v1", "good")], policy) as fleet:
            await ask_all(fleet, 120)
        times = [call.at for call in gateway.calls]
    assert gateway.refusals == {}
    assert max(sum(1 for t in times if at <= t < at + 1.0) for at in times) <= 50


async def test_tokens_that_others_use_delay_items_and_fail_none() -> None:
    """The gateway refuses although this process keeps its quota: each item waits, none fails."""
    spec = make_spec(tokens_per_min_user=3_000, window_s=0.5, output_tokens=(40, 40), answer_s=0.02)
    async with FirstGateway(spec) as gateway:
        policy = replace(QUICK, retry=replace(QUICK.retry, budget=0.0, patience_s=0.4))
        async with (
            Fleet([make_member(gateway, 3_000, 0.5)], policy) as one,
            Fleet([make_member(gateway, 3_000, 0.5)], policy) as other,
        ):
            replies = await asyncio.gather(ask_all(one, 60), ask_all(other, 60))
            reports = [*one.report(), *other.report()]
    assert [len(answers) for answers in replies] == [60, 60]
    assert gateway.refusals["too_many_requests"] > 0
    assert {report.opened for report in reports} == {0}


async def test_a_throttle_lowers_the_rate_and_fails_nothing() -> None:
    async with FirstGateway(make_spec(requests_per_s=20)) as gateway:
        limit = RateLimitPolicy(requests_per_s=80.0)
        policy = replace(QUICK, rate_limit=limit, retry=replace(QUICK.retry, budget=0.0))
        async with Fleet([EndpointSpec(f"{gateway.url}/sophia/vllm/v1", "good")], policy) as fleet:
            assert len(await ask_all(fleet, 60)) == 60
            quota = fleet.limiter.quota
            assert quota is not None
            assert quota._factor < 1.0
    assert gateway.refusals["throttle"] > 0


async def test_a_used_up_window_pauses_its_deployment_only() -> None:
    metis = DeploymentSpec("metis", "api", "org/m")
    async with FirstGateway(make_spec(DeploymentSpec(), metis)) as gateway:
        gateway.fail_next("tokens_per_minute", "sophia/vllm")
        sophia = replace(make_member(gateway, 60_000, 30.0), weight=99)
        members = [sophia, make_member(gateway, 60_000, 30.0, "metis/api")]
        async with Fleet(members, QUICK) as fleet:
            assert len(await ask_all(fleet, 20)) == 20
            assert [report.state for report in fleet.report()] == ["resting", "in use"]
            assert gateway.refusals == {"too_many_requests": 1}
