"""Endpoints that return or join while the others have all requests in flight; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.support.memory_servers import (
    MODEL,
    MemoryServer,
    MemoryTransport,
    open_servers,
)
from fanfold.tests.support.virtual_clock import run_virtual

STREAMS = 256
Event = Callable[[Fleet, list[tuple[str, MemoryServer]]], None]


async def _run(event: Event, *, first: int, seats: int = 64, length: int = 100) -> list[int]:
    """Return the requests running in each of 4 servers, 20 s after an event at 30 s."""
    servers = open_servers(EngineSpec(max_num_seqs=seats, step_s=0.02), 4)
    policy = replace(FleetPolicy.from_limits(streams=STREAMS), hedge=None)
    transport = MemoryTransport(policy, servers)
    specs = [EndpointSpec(url) for url in list(servers)[:first]]
    async with Fleet(specs, policy, transport=transport) as fleet:

        async def ask(number: int) -> None:
            while True:
                body = {"model": MODEL, "messages": [{"role": "user", "content": f"{number}"}]}
                await fleet.post({**body, "max_tokens": length})

        calls = [asyncio.create_task(ask(number)) for number in range(STREAMS)]
        await asyncio.sleep(10)
        for url, server in servers.items():
            if first == 4 and url in list(servers)[:2]:
                server.kill()
        await asyncio.sleep(20)
        event(fleet, list(servers.items()))
        await asyncio.sleep(20)
        found = [server.engine.running for server in servers.values()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    return found


def _revive(_: Fleet, servers: list[tuple[str, MemoryServer]]) -> None:
    for _url, server in servers[:2]:
        server.revive()


def _join(fleet: Fleet, servers: list[tuple[str, MemoryServer]]) -> None:
    fleet.update([EndpointSpec(url) for url, _ in servers])


@pytest.mark.parametrize(("event", "first"), [(_revive, 4), (_join, 2)])
def test_they_get_their_share_although_no_call_waits(event: Event, first: int) -> None:
    running = run_virtual(lambda: _run(event, first=first))
    assert min(running) >= 48


def test_one_with_few_seats_keeps_what_it_can_process() -> None:
    running = run_virtual(lambda: _run(_revive, first=4, seats=16))
    assert max(running) == 16
