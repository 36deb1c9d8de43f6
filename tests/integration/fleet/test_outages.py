"""No endpoint is alive: all are probed often enough, and once more before the run stops."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from aiohttp import web

from fanfold.backends.core.errors import EndpointLostError, RunStoppedError
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import (
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)

from .conftest import completion, until

pytestmark = pytest.mark.integration

WAIT_S = 1.2
POLICY = FleetPolicy(
    timeout=TimeoutPolicy(fleet_s=WAIT_S),
    # the back-off alone would probe at 0.02, 0.06, 0.14, 0.3, 0.62 and 1.26 s
    breaker=BreakerPolicy(open_s=0.02, outage_s=0.1, probe_s=0.2),
    hedge=None,
)
READY_LATER = replace(
    POLICY,
    retry=RetryPolicy(attempts=10**6),
    breaker=BreakerPolicy(failures=1, open_s=0.02, outage_s=0.1, probe_s=0.2),
)
BACK_S = 0.86
"""43 s of 60."""


@dataclass
class Server:
    """A chat server that is away until it is started, at a port that stays the same."""

    port: int = 0
    probes: list[float] = field(default_factory=list)
    calls: int = 0
    answers: Callable[[], bool] = lambda: True
    is_up: Callable[[], bool] | None = None
    runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        async def models(_: web.Request) -> web.Response:
            self.probes.append(time.monotonic())
            status = 200 if (self.is_up or self.answers)() else 503
            return web.json_response({"data": [{"id": "m"}]}, status=status)

        async def chat(_: web.Request) -> web.Response:
            self.calls += 1
            return web.json_response(completion()) if self.answers() else web.Response(status=502)

        app = web.Application()
        app.router.add_get("/{path:.*}models", models)
        app.router.add_post("/{path:.*}completions", chat)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None


@asynccontextmanager
async def servers(count: int) -> AsyncIterator[list[Server]]:
    """Yield servers that have a port each and do not run."""
    made = [Server() for _ in range(count)]
    try:
        for server in made:
            await server.start()
        for server in made:
            await server.stop()
        yield made
    finally:
        for server in made:
            await server.stop()


async def ask(fleet: Fleet) -> str:
    reply = await FleetClient(fleet, ModelParams("m")).ask([{"role": "user", "content": "q"}])
    return reply.content


@pytest.mark.parametrize(("count", "back"), [(1, 0), (3, 2), (8, 5)])
async def test_a_server_that_comes_back_late_is_found(count: int, back: int) -> None:
    async with servers(count) as made, Fleet([EndpointSpec(s.url) for s in made], POLICY) as fleet:
        call = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.health().paused is not None)
        await asyncio.sleep(BACK_S)
        await made[back].start()
        assert await call == "hello"
        assert fleet.health().paused is None


async def test_a_server_that_comes_back_at_the_end_is_found_by_the_last_probe() -> None:
    policy = replace(POLICY, breaker=BreakerPolicy(open_s=60.0, outage_s=60.0))
    policy = replace(policy, timeout=TimeoutPolicy(fleet_s=0.3))
    async with servers(2) as made, Fleet([EndpointSpec(s.url) for s in made], policy) as fleet:
        call = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.health().paused is not None)
        await made[1].start()
        assert await call == "hello"
        assert len(made[1].probes) == 1


async def test_servers_that_answer_but_are_not_ready() -> None:
    """A proxy answers 502 and 503 until the server behind it is there."""
    async with servers(1) as (server,), Fleet([EndpointSpec(server.url)], READY_LATER) as fleet:
        began = time.monotonic()
        server.answers = lambda: time.monotonic() > began + BACK_S
        await server.start()
        assert await ask(fleet) == "hello"
        pauses = [b - a for a, b in zip(server.probes, server.probes[1:], strict=False)]
        assert min(pauses[-2:]) < 0.6  # the back-off alone would wait 0.64 s
        assert server.calls == 2


@pytest.mark.parametrize("count", [1, 2, 8])
async def test_an_item_alone_outlasts_an_outage_behind_a_proxy(count: int) -> None:
    """Its attempts are used up before the failures in a row mark any server as unhealthy."""
    policy = replace(POLICY, retry=RetryPolicy(backoff_s=0.001))
    async with servers(count) as made, Fleet([EndpointSpec(s.url) for s in made], policy) as fleet:
        began = time.monotonic()
        for server in made:
            server.answers = lambda: time.monotonic() > began + BACK_S
            await server.start()
        assert await ask(fleet) == "hello"
        assert sum(server.calls for server in made) <= 2 * max(count, policy.retry.attempts)


async def test_servers_that_lose_requests_and_answer_probes_fail_the_item() -> None:
    policy = replace(POLICY, retry=RetryPolicy(backoff_s=0.001))
    async with servers(2) as made, Fleet([EndpointSpec(s.url) for s in made], policy) as fleet:
        for server in made:
            server.answers, server.is_up = lambda: False, lambda: True
            await server.start()
        with pytest.raises(EndpointLostError, match="502"):
            await ask(fleet)
        assert sum(server.calls for server in made) == policy.retry.attempts


async def test_an_item_that_stops_every_server_is_given_up() -> None:
    """It gets its attempts twice at most, however often the servers come back."""
    policy = replace(POLICY, retry=RetryPolicy(backoff_s=0.001))
    async with servers(2) as made, Fleet([EndpointSpec(s.url) for s in made], policy) as fleet:
        stopped = [0.0, 0.0]

        def stop(number: int) -> bool:
            stopped[number] = time.monotonic()
            return False

        for number, server in enumerate(made):
            server.answers = partial(stop, number)
            server.is_up = lambda n=number: time.monotonic() > stopped[n] + 0.05
            await server.start()
        with pytest.raises(EndpointLostError, match="502"):
            await ask(fleet)
        assert sum(server.calls for server in made) <= 2 * policy.retry.attempts


async def test_a_fleet_that_stays_away_stops_the_run_in_time() -> None:
    async with servers(3) as made, Fleet([EndpointSpec(s.url) for s in made], POLICY) as fleet:
        began = time.monotonic()
        with pytest.raises(RunStoppedError, match="no endpoint recovered"):
            await ask(fleet)
        assert WAIT_S <= time.monotonic() - began < 10 * WAIT_S


async def test_a_key_that_cannot_be_fetched_is_no_answer_to_a_probe(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A token command that fails during an outage ends neither the probes nor the run."""
    fetched = list[bool]()

    def key() -> str:
        fetched.append(len(fetched) == 1)  # the call comes first, then a probe
        if fetched[-1]:
            raise RunStoppedError("the token command failed")
        return "key"

    async with servers(1) as (server,), Fleet([EndpointSpec(server.url, key)], POLICY) as fleet:
        call = asyncio.create_task(ask(fleet))
        await until(lambda: True in fetched)
        await server.start()
        assert await call == "hello"
    gc.collect()
    assert "cannot be probed: the token command failed" in caplog.text
    assert "never retrieved" not in caplog.text


async def test_a_large_fleet_is_probed_at_a_limited_rate() -> None:
    async with servers(1) as (server,):
        server.answers = lambda: False
        await server.start()
        urls = [server.url.replace("/v1", f"/{n}/v1") for n in range(40)]
        async with Fleet([EndpointSpec(url) for url in urls], READY_LATER) as fleet:
            with pytest.raises(RunStoppedError, match="no endpoint recovered"):
                await asyncio.gather(*(ask(fleet) for _ in range(40)))
    outage = server.probes[-40:]  # the last round, after the others
    rate = (len(outage) - 1) / (outage[-1] - outage[0])
    assert rate <= 21
    assert len(server.probes) <= 21 * (WAIT_S + 2 + 0.5)


async def test_an_outage_that_ends_leaves_the_others_to_their_own_probes() -> None:
    async with servers(2) as made, Fleet([EndpointSpec(s.url) for s in made], POLICY) as fleet:
        call = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.health().paused is not None)
        await made[0].start()
        await call
        await made[1].start()
        await until(lambda: bool(made[1].probes))
        await until(lambda: fleet.health().healthy == 2)
