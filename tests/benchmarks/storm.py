"""A storm over a simulated fleet, against its bound and two schedules of the same work.

100 nodes of capacity 8 answer 10,000 items in log-normal times (sigma 0.5) that are drawn anew
for each node that is asked; 5 nodes are five times slower and 2 are dead from the start. In the
storm, 10 more die on the way, 10 kinds of fast failure strike 1 % of the calls each, and 0.2 % of
the calls hang until the client's timeout of five medians. The calm run has no failing calls and
no dying nodes.

The fleet runs live. The two schedules are computed, on the times that the live run's winning
answers took and on the same nodes, dying ones included, without any failing call: round robin
over all nodes with everything sent at once, and a list schedule that knows every time in advance
and gives each item, in order, to the place that ends it first.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import orjson

from fanfold.backends.core.errors import FanfoldError
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams, TimeoutPolicy
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.requests import QuestionReader
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import draw_normal

NODES, SLOTS, SIGMA = 100, 8, 0.5
SLOW, DEAD, DYING, SLOWNESS = 5, 2, 10, 5.0
FAST_FAULTS = (
    *("429", "500", "500_text", "502_html", "503", "503_busy", "504", "drop", "reset"),
    "malformed",
)
TOKENS = 100


@dataclass(frozen=True, slots=True)
class Scene:
    """One seed's fleet.

    Attributes:
        spec: The servers.
        items: How many.
        median_s: Median time of an answer on a healthy node.
        slow: Slow nodes.
        deaths: When nodes die, in seconds since the start, by node; 0 for dead ones.
    """

    spec: SimulationSpec
    items: int
    median_s: float
    slow: frozenset[int]
    deaths: Mapping[int, float]

    @classmethod
    def of(cls, seed: int, items: int, median_s: float, storm: bool) -> Scene:
        """Draw who is slow, who is dead and who dies when."""
        chance = random.Random(seed)
        order = chance.sample(range(NODES), NODES)
        slow, dead, dying = order[:SLOW], order[SLOW:][:DEAD], order[SLOW + DEAD :][:DYING]
        healthy = SLOTS * (NODES - SLOW - DEAD + SLOW / SLOWNESS)
        expected = items * median_s * math.exp(SIGMA**2 / 2) / healthy
        deaths = dict.fromkeys(dead, 0.0)
        if storm:
            deaths |= {node: chance.uniform(0.1, 0.9) * expected for node in dying}
        faults = [FaultRule("die_at", nodes=(n,), value=at) for n, at in deaths.items()]
        if storm:
            faults += [FaultRule(kind, p=0.01) for kind in FAST_FAULTS]
            faults.append(FaultRule("hang", p=0.002))
        spec = SimulationSpec(
            nodes=NODES,
            max_num_seqs=SLOTS,
            ttft_s=0.0,
            prefill_rate=1e9,
            tpot_s=median_s / TOKENS,
            output_tokens=(TOKENS, TOKENS),
            alpha=0.0,
            jitter=SIGMA,
            seed=seed,
            speeds=dict.fromkeys(slow, 1 / SLOWNESS),
            faults=tuple(faults),
        )
        return cls(spec, items, median_s, frozenset(slow), deaths)

    def pace(self, node: int) -> float:
        """Return how many times slower than a healthy one a node is."""
        return SLOWNESS if node in self.slow else 1.0

    def dies(self, node: int) -> float:
        """Return when a node dies, in seconds; infinity for those that do not."""
        return self.deaths.get(node, math.inf)


@dataclass(frozen=True, slots=True)
class Live:
    """What the live run did.

    Attributes:
        makespan_s: From the first request to the last item's end.
        won: Node that gave each answer, by item.
        lost: Items that failed, by class.
        hedges: Second requests.
        cpu_ms: CPU time of the client per item.
    """

    makespan_s: float
    won: Mapping[int, int]
    lost: Mapping[str, int]
    hedges: int
    cpu_ms: float


async def run_live(scene: Scene, policy: FleetPolicy) -> Live:
    """Send all items through a fleet."""
    won: dict[int, int] = {}
    lost: Counter[str] = Counter()
    async with (
        launch(scene.spec) as up,
        Fleet([EndpointSpec(url) for url in up.urls], policy) as fleet,
    ):
        model = FleetClient(fleet, _params(scene))
        waiting = iter(range(scene.items))

        async def work() -> None:
            for item in waiting:
                try:
                    reply = await model.ask(_messages(item))
                    won[item] = int(reply.endpoint.rpartition("-")[2])
                except FanfoldError as error:
                    lost[type(error).__name__] += 1

        started, cpu = time.monotonic(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(policy.streams):
                group.create_task(work())
        makespan = time.monotonic() - started
        cpu = time.process_time() - cpu
        hedges = sum(report.hedges for report in fleet.report())
    return Live(makespan, won, lost, hedges, 1000 * cpu / scene.items)


def _params(scene: Scene) -> ModelParams:
    return ModelParams(scene.spec.model, max_tokens=2 * TOKENS)


def _messages(item: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"item {item}"}]


def answer_times(scene: Scene, won: Mapping[int, int]) -> list[float]:
    """Return how long each item's winning answer was worked on, as on a healthy node, in s."""
    spec = scene.spec
    reader, body = QuestionReader(spec.model, spec.seed), _params(scene).body()
    times = []
    for item in range(scene.items):
        raw = orjson.dumps({**body, "messages": _messages(item)})
        key = reader.read(raw, True, spec.max_model_len).key
        node = won.get(item, 0)
        times.append(scene.median_s * math.exp(SIGMA * draw_normal(spec.seed, "jitter", key, node)))
    return times


def bound(scene: Scene, times: Sequence[float], won: Mapping[int, int]) -> float:
    """Return a time that no schedule can beat: all served work over what is alive, in s.

    Work is counted where it was done, on slow nodes as the time that it took there; what served
    no answer is left out.
    """
    served = [times[item] * scene.pace(node) for item, node in won.items()]
    work, now, alive = sum(served), 0.0, SLOTS * NODES
    for at in sorted(scene.deaths.values()):
        if work <= alive * (at - now):
            break
        work -= alive * (at - now)
        now, alive = at, alive - SLOTS
    return max(now + work / alive, *served)


def list_schedule(scene: Scene, times: Sequence[float]) -> float:
    """Return the end of a list schedule that knows every time and every death, in s."""
    places = [[0.0] * SLOTS for _ in range(NODES)]
    makespan = 0.0
    for needed in times:
        ends = [
            (places[node][0] + needed * scene.pace(node), node)
            for node in range(NODES)
            if places[node][0] + needed * scene.pace(node) <= scene.dies(node)
        ]
        end, node = min(ends)
        heapq.heapreplace(places[node], end)
        makespan = max(makespan, end)
    return makespan


def round_robin(scene: Scene, times: Sequence[float]) -> float:
    """Return the end of everything sent at once, item ``i`` to node ``i % nodes``, in s.

    What a dying node holds is lost with it, as nothing is repeated.
    """
    makespan = 0.0
    for node in range(NODES):
        free = [0.0] * SLOTS
        for needed in times[node::NODES]:
            end = free[0] + needed * scene.pace(node)
            if end > scene.dies(node):
                break
            heapq.heapreplace(free, end)
            makespan = max(makespan, end)
    return makespan


def policy_of(scene: Scene, storm: bool) -> FleetPolicy:
    """Return the default policy with as many streams as the fleet has places."""
    timeout = TimeoutPolicy(request_s=5 * scene.median_s if storm else 600.0)
    return replace(FleetPolicy.from_limits(streams=SLOTS * NODES), timeout=timeout)


def measure(seeds: Sequence[int], items: int, median_s: float, kinds: Sequence[str]) -> None:
    """Print each seed's ratios, then median and worst."""
    for kind in kinds:
        rows = list(_rows(kind, seeds, items, median_s))
        for place, name in enumerate(("bound", "round robin", "list schedule")):
            ratios = [row[place] for row in rows]
            print(f"{kind}: over {name}: median {median(ratios):.3f}, worst {max(ratios):.3f}")


def _rows(
    kind: str, seeds: Sequence[int], items: int, median_s: float
) -> Iterator[tuple[float, float, float]]:
    storm = kind == "storm"
    for seed in seeds:
        scene = Scene.of(seed, items, median_s, storm)
        live = asyncio.run(run_live(scene, policy_of(scene, storm)))
        times = answer_times(scene, live.won)
        least = bound(scene, times, live.won)
        robin, listed = round_robin(scene, times), list_schedule(scene, times)
        span = live.makespan_s
        print(
            f"{kind} seed {seed}: {span:.2f} s; over bound {span / least:.3f}, "
            f"round robin {span / robin:.3f} ({robin:.1f} s), list {span / listed:.3f} "
            f"({listed:.2f} s); done {len(live.won)}, failed {dict(live.lost)}, "
            f"{live.hedges} hedges, {live.cpu_ms:.2f} CPU ms per item",
            flush=True,
        )
        assert len(live.won) + sum(live.lost.values()) == items
        yield span / least, span / robin, span / listed
