"""Order, affinity and late binding over servers in memory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy, LoadPolicy, make_prefix_policies
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.benchmarks.prefix import POLICIES, run_policy
from fanfold.tests.benchmarks.prefix_workloads import make_workloads
from fanfold.tests.support.memory_servers import (
    MODEL,
    MemoryServer,
    MemoryTransport,
    open_servers,
)
from fanfold.tests.support.virtual_clock import run_virtual

ENGINE = EngineSpec(kv_blocks=20_000, max_num_seqs=8, step_s=0.02)


def test_shared_prefixes_are_computed_once_and_time_follows() -> None:
    workload = make_workloads()["two-thirds 2:1"](0, 60)
    today, hits, _ = run_policy("today", workload)
    auto, more_hits, _ = run_policy("auto", workload)
    most = 2 / 3 * 49 / 50 + 64 / 1536 / 50
    assert hits < more_hits
    assert more_hits > 0.9 * most
    assert auto < today


def test_without_shared_prefixes_nothing_changes() -> None:
    workload = make_workloads()["unshared"](0, 20)
    assert run_policy("auto", workload) == run_policy("today", workload)


@pytest.mark.parametrize("policy", POLICIES)
def test_runs_in_virtual_time_repeat_exactly(policy: str) -> None:
    """Nothing depends on addresses of objects, which differ with what the process did before."""
    workload = make_workloads()["heavy tails"](3, 12)
    first = run_policy(policy, workload)
    kept = [object() for _ in range(1000)]
    assert run_policy(policy, workload) == first, kept


async def _wait_inside(
    policy: FleetPolicy, *, seconds: float, specs: Sequence[dict[str, Any]] = ({},)
) -> tuple[list[MemoryServer], Fleet]:
    """Return servers and fleet after a time with more calls than they can process."""
    servers = open_servers(ENGINE, len(specs))
    transport = MemoryTransport(policy, servers)
    endpoints = [EndpointSpec(url, **spec) for url, spec in zip(servers, specs, strict=True)]
    async with Fleet(endpoints, policy, transport=transport) as fleet:

        async def ask(number: int) -> None:
            while True:
                text = f"call {number} " * 50
                body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
                await fleet.post({**body, "max_tokens": 50})

        calls = [asyncio.create_task(ask(number)) for number in range(policy.streams)]
        await asyncio.sleep(seconds)
        found = [(server.engine.running, server.engine.waiting) for server in servers.values()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    for server, counts in zip(servers.values(), found, strict=True):
        server.seen = counts
    return list(servers.values()), fleet


def _policy(**changes: Any) -> FleetPolicy:
    return replace(FleetPolicy.from_limits(streams=64), hedge=None, **changes)


def test_few_requests_wait_inside_a_server() -> None:
    (early,), _ = run_virtual(lambda: _wait_inside(_policy(), seconds=30))
    (late,), fleet = run_virtual(
        lambda: _wait_inside(_policy(**make_prefix_policies(1000)), seconds=30)
    )
    assert early.seen[0] == late.seen[0] == 8
    assert early.seen[1] > 4
    assert late.seen[1] <= 3
    assert fleet.endpoints[0].width == 10


def test_a_server_that_processes_more_gets_more() -> None:
    """The limit is found again after a server was replaced by a larger one."""

    async def main() -> int:
        policy = _policy(**make_prefix_policies(1000))
        servers = open_servers(replace(ENGINE, max_num_seqs=2), 1)
        (server,) = servers.values()
        transport = MemoryTransport(policy, servers)
        async with Fleet([EndpointSpec(u) for u in servers], policy, transport=transport) as fleet:

            async def ask(number: int) -> None:
                body = {"messages": [{"role": "user", "content": f"call {number} " * 50}]}
                await fleet.post({**body, "model": MODEL, "max_tokens": 20})

            calls = [asyncio.create_task(ask(number)) for number in range(4000)]
            await asyncio.sleep(20)
            assert fleet.endpoints[0].width == 4
            server.engine.spec = replace(ENGINE, max_num_seqs=32)
            await asyncio.sleep(20)
            running = server.engine.running
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        return running

    assert run_virtual(main) == 32


def test_services_and_gateways_are_not_polled() -> None:
    gateway = {"probe_model": "m"}
    servers, fleet = run_virtual(
        lambda: _wait_inside(
            _policy(**make_prefix_policies(1000)),
            seconds=30,
            specs=[{}, gateway, {"proxied": True}, {"tokens_per_min": 10**9}],
        )
    )
    assert [server.metrics_reads > 0 for server in servers] == [True, False, False, False]
    assert [endpoint.queue_width is None for endpoint in fleet.endpoints] == [False] + [True] * 3


def test_load_of_shared_servers_is_polled_as_before() -> None:
    servers, fleet = run_virtual(
        lambda: _wait_inside(_policy(load=LoadPolicy(every_s=1.0)), seconds=30)
    )
    assert servers[0].metrics_reads >= 25
    assert fleet.endpoints[0].queue_width is None
