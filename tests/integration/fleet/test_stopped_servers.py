"""A server that stops and keeps its connections open: its requests are lost, and sent again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from aiohttp import web

from fanfold.backends.core.errors import EndpointLostError
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import (
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RetryPolicy,
    TimeoutPolicy,
)

from .conftest import completion, until

pytestmark = pytest.mark.integration

SILENCE_S, RECHECK_S = 0.3, 0.1
POLICY = FleetPolicy(
    streams=64,
    timeout=TimeoutPolicy(request_s=3.0, fleet_s=5.0, silence_s=SILENCE_S, recheck_s=RECHECK_S),
    breaker=BreakerPolicy(open_s=0.02, outage_s=0.05, probe_s=0.5),
    retry=RetryPolicy(backoff_s=0.01),
    hedge=None,
)
PARAMS = ModelParams("m", max_tokens=4)


def vllm_metrics(running: int, waiting: int = 0) -> str:
    return (
        f'vllm:num_requests_running{{engine="0"}} {running}.0\n'
        f'vllm:num_requests_waiting{{engine="0"}} {waiting}.0\n'
    )


@dataclass
class Server:
    """A model server.

    Attributes:
        silent: Whether it accepts requests and never answers them.
        metrics: The text of ``/metrics``, or None for status 404.
    """

    silent: bool = False
    metrics: Callable[[], str | None] = lambda: vllm_metrics(0)
    port: int = 0
    asked: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    site: web.TCPSite | None = None
    runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        async def chat(request: web.Request) -> web.StreamResponse:
            self.asked.append((await request.json())["messages"][-1]["content"])
            if self.silent:
                await self.over.wait()
            return web.json_response(completion())

        async def check(request: web.Request) -> web.Response:
            self.checks.append(request.path)
            if request.path != "/metrics":
                return web.json_response({"data": [{"id": "m"}]})
            text = self.metrics()
            return web.Response(status=404) if text is None else web.Response(text=text)

        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", chat), web.get("/{path:.*}", check)])
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        self.site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await self.site.start()
        self.port = self.runner.addresses[0][1]

    async def stop_listening(self) -> None:
        """Refuse new connections; the open ones stay open, and no answer comes."""
        assert self.site is not None
        assert self.site._server is not None
        self.silent = True
        self.site._server.close()
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.over.set()
        if self.runner is not None:
            await self.runner.cleanup()


@asynccontextmanager
async def replaced(
    metrics: Callable[[], str | None] = lambda: vllm_metrics(0), policy: FleetPolicy = POLICY
) -> AsyncIterator[tuple[Server, Server, Fleet]]:
    """Yield a stopped server, the one that runs in its place, and a fleet that used the first."""
    old, new = Server(), Server(metrics=metrics)
    try:
        await old.start()
        async with Fleet([EndpointSpec(old.url)], policy) as fleet:
            await ask(fleet, "first")
            old.silent = True
            yield old, new, fleet
    finally:
        await old.close()
        await new.close()


async def replace_server(old: Server, new: Server) -> None:
    await old.stop_listening()
    new.port = old.port
    await new.start()


async def ask(fleet: Fleet, text: str = "q") -> str:
    reply = await FleetClient(fleet, PARAMS).ask([{"role": "user", "content": text}])
    return reply.content


async def stream(fleet: Fleet, text: str = "q") -> str:
    return "".join([part.text async for part in ChatFleet.of(fleet, PARAMS).astream(text)])


@pytest.mark.parametrize("how", [ask, stream])
async def test_requests_to_a_replaced_server_are_sent_again(
    how: Callable[..., Awaitable[str]],
) -> None:
    """A vLLM server behaves like this when it is terminated, and another one is started."""
    patient = replace(POLICY, timeout=replace(POLICY.timeout, request_s=60.0))
    async with replaced(policy=patient) as (old, new, fleet):
        calls = [asyncio.ensure_future(how(fleet, f"q{n}")) for n in range(16)]
        await until(lambda: len(old.asked) >= 8)
        began = time.monotonic()
        await replace_server(old, new)
        assert set(await asyncio.gather(*calls)) == {"hello"}
        assert time.monotonic() - began < 30.0  # not the time limit of a request
        assert sorted(new.asked) == sorted(f"q{n}" for n in range(16))
        assert 1 <= new.checks.count("/health") <= 2
        assert fleet.report()[0].state == "in use"


async def test_a_server_that_refuses_new_connections_has_lost_its_requests() -> None:
    async with replaced() as (old, new, fleet):
        call = asyncio.create_task(ask(fleet))
        await until(lambda: len(old.asked) == 2)
        await old.stop_listening()
        await until(lambda: fleet.health().paused is not None)
        new.port = old.port
        await new.start()
        assert await call == "hello"


async def test_another_endpoint_takes_the_lost_requests() -> None:
    async with replaced() as (old, new, fleet):
        calls = [asyncio.create_task(ask(fleet, f"q{n}")) for n in range(4)]
        await until(lambda: len(old.asked) == 5)
        await new.start()
        fleet.update([EndpointSpec(old.url), EndpointSpec(new.url)])
        await old.stop_listening()
        assert set(await asyncio.gather(*calls)) == {"hello"}
        assert len(new.asked) == 4


class Account:
    """Counts how reservations end."""

    waiting = 0

    def __init__(self) -> None:
        self.ends = list[str]()
        self.usage = Usage()

    async def reserve(
        self,
        most: Usage,
        *_: object,
        shorten: bool,  # noqa: ARG002 - the protocol's form
    ) -> Account:
        self.usage = most
        return self

    def settle(self, _: object) -> None:
        self.ends.append("answered")

    def settle_all(self) -> object:
        self.ends.append("lost")
        return Usage(10, 4)

    def release(self, *, sent: bool) -> None:
        self.ends.append(f"released, sent={sent}")

    def close(self) -> None:
        """End."""


async def test_a_lost_request_may_have_been_paid() -> None:
    account = Account()
    log = CallLog(account=account)  # type: ignore[arg-type]
    async with replaced() as (old, new, fleet):
        CURRENT_CALLS.set(log)
        call = asyncio.create_task(ask(fleet))
        await until(lambda: len(old.asked) == 2)
        await replace_server(old, new)
        await call
    assert account.ends == ["answered", "answered"]  # the answer tells the lost one's prompt
    assert log.lost.prompt == log.usage.prompt
    assert log.lost.completion == 4
    assert [attempt["outcome"] for attempt in log.attempts] == ["EndpointLostError", "answered"]


@pytest.mark.parametrize(
    "metrics",
    [
        lambda: vllm_metrics(1),
        lambda: vllm_metrics(0, waiting=1),
        lambda: None,
        lambda: "process_cpu_seconds_total 3\n",
        lambda: "vllm:num_requests_waiting 0\n",
        lambda: "vllm:num_requests_running e\n",
    ],
    ids=["runs", "waits", "no metrics", "other metrics", "not running", "no number"],
)
async def test_requests_that_may_be_running_are_not_cancelled(
    metrics: Callable[[], str | None],
) -> None:
    """They end with the time limit of a request, as before."""
    policy = replace(POLICY, timeout=replace(POLICY.timeout, request_s=1.2))
    policy = replace(policy, retry=RetryPolicy(attempts=1))
    async with replaced(metrics, policy) as (old, new, fleet):
        call = asyncio.create_task(ask(fleet))
        await until(lambda: len(old.asked) == 2)
        began = time.monotonic()
        await replace_server(old, new)
        with pytest.raises(EndpointLostError, match="no answer in time"):
            await call
        assert time.monotonic() - began > 1.0
        assert "/health" in new.checks


@pytest.mark.parametrize("how", ["gateway", "proxied"])
async def test_the_metrics_of_a_gateway_show_nothing(how: str) -> None:
    policy = replace(POLICY, timeout=replace(POLICY.timeout, request_s=1.0))
    policy = replace(policy, retry=RetryPolicy(attempts=1), whole_answers=how == "gateway")
    server = Server()
    await server.start()
    try:
        spec = EndpointSpec(server.url, proxied=how == "proxied")
        async with Fleet([spec], policy) as fleet:
            await ask(fleet)
            server.silent = True
            with pytest.raises(EndpointLostError, match="no answer in time"):
                await ask(fleet)
            assert "/health" in server.checks
            assert "/metrics" not in server.checks
    finally:
        await server.close()


async def test_a_slow_server_is_left_to_work() -> None:
    """It reports its request; no answer is lost, and none is asked for twice."""
    server, busy = Server(), asyncio.Event()

    def metrics() -> str:
        if len([path for path in server.checks if path == "/metrics"]) >= 2:
            server.silent = False
            busy.set()
        return vllm_metrics(1)

    server.metrics = metrics
    await server.start()
    try:
        async with Fleet([EndpointSpec(server.url)], POLICY) as fleet:
            await ask(fleet)
            server.silent = True
            call = asyncio.create_task(ask(fleet, "slow"))
            await asyncio.wait_for(busy.wait(), 3)
            assert not call.done()
            call.cancel()
            assert server.asked.count("slow") == 1
    finally:
        await server.close()


async def test_an_endpoint_that_never_answered_is_not_checked() -> None:
    """A cold server loads its model, and is silent for minutes."""
    policy = replace(POLICY, timeout=replace(POLICY.timeout, request_s=0.8))
    server = Server(silent=True)
    await server.start()
    try:
        async with Fleet(
            [EndpointSpec(server.url)], replace(policy, retry=RetryPolicy(1))
        ) as fleet:
            with pytest.raises(EndpointLostError):
                await ask(fleet)
            assert server.checks == []
    finally:
        await server.close()


async def test_a_cancelled_call_stays_cancelled() -> None:
    """A stop of the run while lost requests are found."""
    async with replaced() as (old, new, fleet):
        call = asyncio.create_task(ask(fleet))
        await until(lambda: len(old.asked) == 2)
        await replace_server(old, new)
        await until(lambda: "/metrics" in new.checks)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert new.asked == []
