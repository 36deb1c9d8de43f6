from __future__ import annotations

import asyncio
import threading
import time

import pytest

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.support.memory_servers import MODEL, MemoryTransport, open_servers, sum_hits
from fanfold.tests.support.virtual_clock import run_virtual


def test_sleeping_takes_no_real_time_and_keeps_the_order() -> None:
    before, seen = time.monotonic(), list[tuple[str, float]]()

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, time.monotonic()))

    async def main() -> None:
        await asyncio.gather(wait("long", 86_400.0), wait("short", 0.5), wait("none", 0.0))

    run_virtual(main)
    assert seen == [("none", 0.0), ("short", 0.5), ("long", 86_400.0)]
    assert time.monotonic() - before < 3600  # the real clock is back


def test_the_clock_stands_while_a_thread_works() -> None:
    async def main() -> float:
        timer = asyncio.create_task(asyncio.sleep(10.0))
        await asyncio.to_thread(time.sleep, 0.05)
        between = time.monotonic()
        await timer
        return between

    assert run_virtual(main) == 0.0


def test_threads_of_others_keep_the_real_time() -> None:
    asked, told = threading.Event(), threading.Event()
    seen = list[float]()

    def look() -> None:
        asked.wait(30)
        seen.append(time.monotonic())
        told.set()

    async def main() -> None:
        await asyncio.sleep(86_400.0)
        asked.set()
        told.wait(30)

    thread, before = threading.Thread(target=look), time.monotonic()
    thread.start()
    run_virtual(main)
    thread.join()
    assert before <= seen[0] < before + 3600


def test_a_deadlock_is_an_error() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock in virtual time"):
        run_virtual(main)


async def _run(count: int, shared: bool, killed: bool = False) -> tuple[float, float, int]:
    servers = open_servers(EngineSpec(kv_blocks=4096, max_num_seqs=8), 2)
    policy = FleetPolicy.from_limits(streams=16)
    transport = MemoryTransport(policy, servers)
    async with Fleet([EndpointSpec(url) for url in servers], policy, transport=transport) as fleet:

        async def ask(number: int) -> None:
            own = f"item {number} " * 50
            text = "shared " * 400 + own if shared else own + "shared " * 400
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            document, _ = await fleet.post({**body, "max_tokens": 20})
            assert document["usage"]["completion_tokens"] == 20

        work = asyncio.gather(*map(ask, range(count)))
        if killed:
            await asyncio.sleep(0.1)
            next(iter(servers.values())).kill()
        await work
        seconds = time.monotonic()
    lost = sum(sum(endpoint.stats.failures.values()) for endpoint in fleet.endpoints)
    return seconds, sum_hits(list(servers.values())), lost


def test_the_real_fleet_runs_over_servers_in_memory() -> None:
    apart, few, _ = run_virtual(lambda: _run(100, shared=False))
    together, many, _ = run_virtual(lambda: _run(100, shared=True))
    assert few < 0.05
    assert many > 0.7
    assert together < apart
    assert run_virtual(lambda: _run(100, shared=True)) == (together, many, 0)  # it is repeatable


def test_a_killed_server_loses_its_requests_and_the_fleet_repeats_them() -> None:
    _, _, lost = run_virtual(lambda: _run(100, shared=True, killed=True))
    assert lost > 0
