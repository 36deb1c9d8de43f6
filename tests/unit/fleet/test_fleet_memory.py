"""Fleets that follow each other: what the next one knows of its endpoints, in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.memory import FleetMemory
from fanfold.backends.fleet.policy import FleetPolicy, RateLimitPolicy
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.support.memory_servers import (
    MODEL,
    MemoryServer,
    MemoryTransport,
    open_servers,
)
from fanfold.tests.support.virtual_clock import run_virtual

ENGINE = EngineSpec(kv_blocks=20_000, max_num_seqs=64, step_s=0.02)
POLICY = replace(FleetPolicy.from_limits(streams=64), hedge=None)


class Runs:
    """Runs over the same servers, each with a fleet of its own."""

    def __init__(self, count: int = 1) -> None:
        self.servers = open_servers(ENGINE, count)
        self.memory = FleetMemory()

    @asynccontextmanager
    async def fleet(
        self, policy: FleetPolicy = POLICY, model: str | None = None
    ) -> AsyncIterator[Fleet]:
        specs = [EndpointSpec(url) for url in self.servers]
        transport = MemoryTransport(policy, self.servers)
        memory = self.memory
        async with Fleet(specs, policy, transport=transport, memory=memory, model=model) as fleet:
            yield fleet

    @property
    def first(self) -> MemoryServer:
        return next(iter(self.servers.values()))


async def ask(fleet: Fleet, count: int, tokens: int = 50) -> None:
    """Send so many requests at once."""
    bodies = (
        {"model": MODEL, "messages": [{"role": "user", "content": f"call {n}"}]}
        for n in range(count)
    )
    await asyncio.gather(*(fleet.post({**body, "max_tokens": tokens}) for body in bodies))


def test_limits_and_speeds_go_on_and_statistics_begin_anew() -> None:
    async def run() -> None:
        runs = Runs()
        async with runs.fleet() as fleet:
            await ask(fleet, 400)
            (before,) = fleet.endpoints
            assert before.width > POLICY.limit.start
        async with runs.fleet() as fleet:
            (endpoint,) = fleet.endpoints
            assert endpoint is not before
            assert (endpoint.width, endpoint.latency_s) == (before.width, before.latency_s)
            assert (endpoint.stats.calls, endpoint.has_answered) == (0, False)
            await ask(fleet, 3)
            assert (endpoint.stats.calls, before.stats.calls) == (3, 400)

    run_virtual(run)


def test_models_behind_one_address_are_told_apart() -> None:
    async def run() -> None:
        runs = Runs()
        async with runs.fleet(model="small") as fleet:
            await ask(fleet, 400)
            small = fleet.endpoints[0].width
        assert small > POLICY.limit.start
        async with runs.fleet(model="large") as fleet:
            assert fleet.endpoints[0].width == POLICY.limit.start
        async with runs.fleet(model="small") as fleet:
            assert fleet.endpoints[0].width == small

    run_virtual(run)


def test_an_endpoint_that_is_down_gets_no_request_of_the_next_run_until_it_answers() -> None:
    async def run() -> None:
        runs = Runs(2)
        runs.first.kill()
        async with runs.fleet() as fleet:
            await ask(fleet, 40)
            assert fleet.health().healthy == 1
        requests = runs.first.requests
        async with runs.fleet() as fleet:
            await ask(fleet, 40)
            down = fleet.endpoints[0]
            assert (fleet.health().healthy, down.stats.calls, down.breaker.times_opened) == (
                1,
                0,
                0,
            )
            assert runs.first.requests == requests
            runs.first.revive()
            await asyncio.sleep(2 * POLICY.breaker.open_max_s)  # its probes go on
            await ask(fleet, 40)
            assert fleet.health().healthy == 2
            assert runs.first.requests > requests

    run_virtual(run)


def test_a_run_that_begins_while_all_are_down_waits_for_one() -> None:
    async def run() -> None:
        runs = Runs()
        async with runs.fleet() as fleet:
            await ask(fleet, 1)
            runs.first.kill()
            lost = asyncio.create_task(ask(fleet, 40))
            await asyncio.sleep(1.0)
            assert fleet.health().healthy == 0
            lost.cancel()
            await asyncio.wait({lost})
        async with runs.fleet() as fleet:
            assert "no endpoint is alive" in (fleet.health().paused or "")
            asking = asyncio.create_task(ask(fleet, 5))
            await asyncio.sleep(1.0)
            runs.first.revive()
            await asking
            assert fleet.health().paused is None

    run_virtual(run)


def test_a_pause_that_an_endpoint_asked_for_goes_on() -> None:
    async def run() -> None:
        runs = Runs()
        async with runs.fleet() as fleet:
            fleet._monitor.pause_endpoint(fleet.endpoints[0], 30.0)
        await asyncio.sleep(10.0)
        began = time.monotonic()
        async with runs.fleet() as fleet:
            assert fleet.endpoints[0].state == "resting"
            await ask(fleet, 1, tokens=1)
        assert 20.0 <= time.monotonic() - began < 25.0
        async with runs.fleet() as fleet:
            assert fleet.endpoints[0].state == "in use"

    run_virtual(run)


def test_the_next_run_has_what_is_left_of_a_quota() -> None:
    policy = replace(POLICY, rate_limit=RateLimitPolicy(tokens_per_min=1000))
    most = Usage(10, 50)

    async def run() -> None:
        runs = Runs()
        async with runs.fleet(policy) as fleet:
            quota = fleet.limiter.quota
            assert quota is not None
            assert quota.reserve(900) == 0.0
            quota.settle(900, 900)
            for _ in range(8):
                fleet.limiter.record_usage(most, Usage(5, 50))
        async with runs.fleet(policy) as fleet:
            assert fleet.limiter.quota is not None
            assert fleet.limiter.quota.reserve(100) == 0.0
            assert fleet.limiter.quota.reserve(100) > 50.0  # seconds
            assert fleet.limiter.estimate_tokens(most) == 57  # not a token for each byte
        async with runs.fleet() as fleet:
            assert fleet.limiter.quota is None

    run_virtual(run)


def test_an_endpoint_that_another_fleet_finds_alive_is_used_again() -> None:
    """Fleets of one memory share its breaker; each ranks its endpoints itself."""

    async def run() -> None:
        runs = Runs()
        async with asyncio.timeout(200), runs.fleet() as fleet, runs.fleet() as other:
            runs.first.kill()
            asking = asyncio.create_task(ask(fleet, 40))
            while fleet.health().healthy:  # noqa: ASYNC110 - in virtual time
                await asyncio.sleep(0.1)
            runs.first.revive()
            other.endpoints[0].breaker.close()
            assert fleet.health().healthy == 0
            await asking
            assert fleet.health().healthy == 1

    run_virtual(run)


def test_an_endpoint_that_leaves_and_returns_begins_anew_and_is_remembered() -> None:
    """It may be another server: neither the width nor the speed of the old one applies to it."""

    async def run() -> None:
        runs = Runs(2)
        specs = [EndpointSpec(url) for url in runs.servers]
        async with runs.fleet() as fleet:
            await ask(fleet, 64)
            before = fleet.endpoints[0]
            before.limit.width = 60
            fleet.update(specs[1:])
            fleet.update(specs)
            assert fleet.endpoints[0] is before
            assert (before.width, before.latency_s) == (8, 0.0)
            await ask(fleet, 64)
            speed = before.latency_s
            assert speed > 0
        async with runs.fleet() as fleet:
            assert fleet.endpoints[0].latency_s == speed

    run_virtual(run)
