"""Soak test in virtual time: nodes that leave and join for days, and answers of ten minutes."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import HTTPAnswer
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import AdaptiveLimitPolicy, AffinityPolicy, FleetPolicy
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.tests.support.memory_servers import MODEL, MemoryTransport, open_servers
from fanfold.tests.support.virtual_clock import run_virtual

HOUR_S = 3600.0
BATCH = 2
ENGINE = EngineSpec(kv_blocks=256, max_num_seqs=BATCH, step_s=0.6)
ANSWER = 1000
"""Tokens of an answer on average, which take ten minutes."""
UP_S, DOWN_S = 12 * HOUR_S, HOUR_S
POLICY = replace(
    FleetPolicy.from_limits(request_timeout_s=2 * HOUR_S),
    # The limit is fixed: checking four times a second whether it may rise would take all the time.
    limit=AdaptiveLimitPolicy(start=BATCH + 1, ceiling=BATCH + 1, settle_s=HOUR_S),
)
# Silent servers are checked over real connections, which have no place in virtual time.
POLICY = replace(POLICY, timeout=replace(POLICY.timeout, silence_s=1e9))


class _Transport(MemoryTransport):
    on_probe: Callable[[str], None]

    async def get(self, url: str, *args: Any) -> HTTPAnswer:
        self.on_probe(url)
        return await super().get(url, *args)


class Soak:
    """A fleet with more calls than it can answer, whose nodes leave the list or die, and come back.

    Args:
        hours: Length in virtual time.
        nodes: Nodes that exist.
        period_h: Time between two measurements.
        policy: Policy of the fleet.

    Attributes:
        used: Of each period, the answered tokens by those that the present nodes could give.
        spread: Of each period, the tokens of the idlest and of the busiest node that was there for
            all of it, by the mean.
        sizes: Bytes of all containers at the end of each period.
        departures: Nodes that left the list, died, or both.
        answers: Calls that were answered.
        strays: Probes of nodes that were not listed.
        members: Endpoints that the fleet knows in the end.
    """

    def __init__(self, hours: int, nodes: int, period_h: int, policy: FleetPolicy) -> None:
        self._hours, self._period_h = hours, period_h
        self._policy = replace(policy, streams=nodes * (BATCH + 2))
        self._servers = open_servers(ENGINE, nodes)
        self._listed = list(self._servers)
        self._present = set(self._servers)
        self._stayed = set(self._servers)
        self._tokens = Counter[str]()
        self._node_s, self._changed_at = 0.0, 0.0
        self.used: list[float] = []
        self.spread: list[tuple[float, float]] = []
        self.sizes: list[int] = []
        self.departures = Counter[str]()
        self.answers = 0
        self.strays = 0
        self.members = 0

    async def run(self) -> None:
        """Run the fleet until the time is over."""
        draw = random.Random(17)
        transport = _Transport(self._policy, self._servers, lambda body: int(body["seed"]))
        transport.on_probe = self._note_probe
        specs = [EndpointSpec(url) for url in self._servers]
        async with Fleet(specs, self._policy, transport=transport) as fleet:
            work = [self._ask(fleet, random.Random(n)) for n in range(self._policy.streams)]
            moves = [self._come_and_go(fleet, url, draw) for url in self._servers]
            tasks = [asyncio.create_task(one) for one in (*work, *moves)]
            for _ in range(self._hours // self._period_h):
                await asyncio.wait(
                    tasks,
                    timeout=self._period_h * HOUR_S,
                    return_when=asyncio.FIRST_EXCEPTION,
                )
                for task in tasks:
                    if task.done():
                        task.result()  # raises what has failed
                self._measure()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.members = len(fleet.endpoints)

    def _note_probe(self, url: str) -> None:
        self.strays += url.removesuffix("/models") not in self._listed

    async def _ask(self, fleet: Fleet, draw: random.Random) -> None:
        while True:
            tokens = draw.randint(ANSWER // 2, 3 * ANSWER // 2)
            text = f"group {draw.randrange(2000)} " * 8 + str(draw.random())
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            _, endpoint = await fleet.post({**body, "seed": tokens, "max_tokens": 2 * ANSWER})
            assert endpoint is not None
            self._tokens[endpoint.url] += tokens
            self.answers += 1

    async def _come_and_go(self, fleet: Fleet, url: str, draw: random.Random) -> None:
        server = self._servers[url]
        while True:
            await asyncio.sleep(draw.expovariate(1 / UP_S))
            way = draw.choice(("left", "died", "died and left"))
            self._count_time()
            self._present.discard(url)
            self._stayed.discard(url)
            self.departures[way] += 1
            if way != "left":
                server.kill()
                await asyncio.sleep(60)  # the fleet probes it when it is no longer listed
            if way != "died":
                self._list(fleet, url, is_listed=False)
            await asyncio.sleep(draw.expovariate(1 / DOWN_S))
            self._count_time()
            self._present.add(url)
            if way != "left":
                server.revive()
            if way != "died":
                self._list(fleet, url, is_listed=True)

    def _list(self, fleet: Fleet, url: str, *, is_listed: bool) -> None:
        (self._listed.append if is_listed else self._listed.remove)(url)
        fleet.update([EndpointSpec(one) for one in self._listed])

    def _count_time(self) -> None:
        now = asyncio.get_running_loop().time()
        self._node_s += len(self._present) * (now - self._changed_at)
        self._changed_at = now

    def _measure(self) -> None:
        self._count_time()
        could = self._node_s * BATCH / ENGINE.step_s
        self.used.append(sum(self._tokens.values()) / could)
        stayed = [self._tokens[url] for url in self._stayed]
        mean = sum(stayed) / len(stayed)
        self.spread.append((min(stayed) / mean, max(stayed) / mean))
        gc.collect()
        self.sizes.append(sum(map(sys.getsizeof, gc.get_objects())))
        self._tokens.clear()
        self._node_s = 0.0
        self._stayed = set(self._present)


def soak(hours: int, nodes: int, period_h: int, **changes: Any) -> Soak:
    """Return what was measured; containers that exist before do not count."""
    found = Soak(hours, nodes, period_h, replace(POLICY, **changes))
    gc.collect()
    gc.freeze()
    try:
        run_virtual(found.run)
    finally:
        gc.unfreeze()
    return found


def check_soak(found: Soak, nodes: int) -> None:
    """Check that the fleet was used fully and evenly, and that nothing grows."""
    assert min(found.used) > 0.95
    assert all(low > 0.9 and high < 1.1 for low, high in found.spread), found.spread
    assert min(found.departures[way] for way in ("left", "died", "died and left")) > 5
    assert found.strays <= found.departures["died and left"]  # the one that is under way
    assert found.members == nodes
    third = len(found.sizes) // 3  # in the first third the caches of the servers fill
    middle, last = found.sizes[third : 2 * third], found.sizes[-third:]
    assert statistics.mean(last) < 1.1 * statistics.mean(middle), found.sizes


def test_balance_and_memory_stay_flat() -> None:
    found = soak(72, 12, 6, affinity=AffinityPolicy(prefix=20, keys=1000))
    check_soak(found, 12)
    assert found.answers > 8000


@pytest.mark.long
def test_balance_and_memory_stay_flat_with_500_nodes() -> None:
    found = soak(72, 500, 6, affinity=AffinityPolicy(prefix=20))
    check_soak(found, 500)
    assert found.answers > 350_000
