"""Prefix caches and orders: policies of the client against a model of the servers.

The real fleet and load balancer run in virtual time over servers in this process. The figures
compare policies; they say nothing about the speed of any hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from fanfold.backends.fleet.balancer import LoadBalancer
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import AffinityPolicy, FleetPolicy, make_prefix_policies
from fanfold.backends.fleet.transport import Transport
from fanfold.backends.inputs.item_order import find_groups
from fanfold.tests.benchmarks.prefix_workloads import (
    SERVERS,
    STREAMS,
    Workload,
    make_workloads,
)
from fanfold.tests.support.memory_servers import MODEL, MemoryTransport, open_servers, sum_hits
from fanfold.tests.support.virtual_clock import run_virtual

_AFFINITY: Final = 2048
"""Characters, as a user would set ``limits.affinity`` for these prompts."""


class _OtherChoice(LoadBalancer):
    """The fleet's load balancer with another choice of the endpoint."""

    def _find_best(
        self,
        avoid: Collection[Endpoint],
        prefer: Endpoint | None,  # noqa: ARG002 - the interface
        unfit: Collection[Endpoint],  # noqa: ARG002
    ) -> Endpoint | None:
        if self.in_flight >= self._streams or not self.alive:
            return None
        return self._pick(sorted(self.alive - set(avoid), key=lambda endpoint: endpoint.label))

    def _pick(self, endpoints: Sequence[Endpoint]) -> Endpoint:
        raise NotImplementedError


class RoundRobin(_OtherChoice):
    """Each request goes to the next endpoint, whatever its load."""

    _next = 0

    def _pick(self, endpoints: Sequence[Endpoint]) -> Endpoint:
        self._next += 1
        return endpoints[self._next % len(endpoints)]


class PowerOfTwo(_OtherChoice):
    """Each request goes to the one of two random endpoints that has fewer requests."""

    @cached_property
    def _random(self) -> random.Random:
        return random.Random(0)  # one for each run, so that runs repeat exactly

    def _pick(self, endpoints: Sequence[Endpoint]) -> Endpoint:
        two = self._random.sample(endpoints, min(2, len(endpoints)))
        return min(two, key=lambda endpoint: endpoint.in_flight)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a workload with one policy.

    Attributes:
        workload: Name of the workload.
        policy: Name of the policy.
        seed: Seed of the workload.
        seconds: From the first request to the last answer, in virtual time.
        bound_s: Work bound of the workload.
        hits: Share of the prompts' blocks that were found in the caches.
        busy: Share of the time in which the servers worked.
        cpu_s: CPU time of the measurement.
    """

    workload: str
    policy: str
    seed: int
    seconds: float
    bound_s: float
    hits: float
    busy: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How a policy sends items.

    Attributes:
        order: Numbers of the items in the order of their start.
        policy: The fleet's policy.
        balancer: Another choice of the endpoint than fanfold's, or None.
    """

    order: Sequence[int]
    policy: FleetPolicy
    balancer: type[LoadBalancer] | None = None

    def open_fleet(self, urls: Iterable[str], transport: Transport | None = None) -> Fleet:
        """Return a fleet that chooses endpoints as the plan says."""
        fleet = Fleet([EndpointSpec(url) for url in urls], self.policy, transport=transport)
        if self.balancer is not None:
            # Same queue and limits of the fleet; only the choice differs.
            fleet._monitor.balancer.__class__ = self.balancer
        return fleet


POLICIES: Final = ("today", "today, affinity", "round robin", "power of two", "auto")


def make_plan(
    name: str, items: int, read_prompt: Callable[[int], str], streams: int, affinity: int
) -> Plan:
    """Return the plan of a policy.

    Args:
        name: One of `POLICIES`.
        items: Number of items.
        read_prompt: Returns the prompt of an item.
        streams: Requests in flight.
        affinity: Characters, as a user would set ``limits.affinity`` for these prompts.
    """
    order, policy = range(items), FleetPolicy.from_limits(streams=streams)
    match name:
        case "today, affinity":
            return Plan(order, replace(policy, affinity=AffinityPolicy(prefix=affinity)))
        case "round robin":
            return Plan(order, policy, RoundRobin)
        case "power of two":
            return Plan(order, policy, PowerOfTwo)
        case "auto":
            found = find_groups(items, lambda rows: [f"user:{read_prompt(row)}" for row in rows])
            if found is not None:
                groups, grouped = found
                return Plan(
                    grouped.tolist(), replace(policy, **make_prefix_policies(groups.prefix))
                )
    return Plan(order, policy)


async def _run_items(workload: Workload, plan: Plan) -> tuple[float, float, float]:
    servers = open_servers(workload.engine, SERVERS)
    items = workload.items
    # The client knows neither the length of an answer nor the parts of a prompt.
    lengths = {item.render()[-64:]: item.answer for item in items}
    transport = MemoryTransport(
        plan.policy, servers, lambda body: lengths[body["messages"][0]["content"][-64:]]
    )
    loop = asyncio.get_running_loop()
    fleet = plan.open_fleet(servers, transport)
    left = iter(plan.order)

    async def work() -> None:
        for number in left:
            text = items[number].render()
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            await fleet.post({**body, "max_tokens": 4096})

    async with fleet:
        started = loop.time()
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.policy.streams):
                group.create_task(work())
        seconds = loop.time() - started
    busy = sum(server.engine.busy_s for server in servers.values())
    return seconds, sum_hits(list(servers.values())), busy / SERVERS / seconds


def run_policy(name: str, workload: Workload) -> tuple[float, float, float]:
    """Send all items; return virtual seconds, share of hits and share of busy time."""
    items = workload.items
    plan = make_plan(name, len(items), lambda row: items[row].render(), STREAMS, _AFFINITY)
    return run_virtual(lambda: _run_items(workload, plan))


def measure_one(name: str, policy: str, seed: int, groups: int) -> Measurement:
    """Measure one policy on one workload."""
    workload = make_workloads()[name](seed, groups)
    started = time.process_time()
    seconds, hits, busy = run_policy(policy, workload)
    cpu_s = time.process_time() - started
    return Measurement(name, policy, seed, seconds, workload.bound_s(), hits, busy, cpu_s)


def show(rows: Sequence[Measurement]) -> str:
    """Return a table in Markdown: of each workload and policy, the worst seed and the median."""
    lines = [
        "| workload | policy | time / bound, worst | median | hits | servers busy |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.workload for row in rows):
        for policy in dict.fromkeys(row.policy for row in rows):
            some = [row for row in rows if (row.workload, row.policy) == (name, policy)]
            if not some:
                continue
            ratios = [row.seconds / row.bound_s for row in some]
            hits = statistics.median(row.hits for row in some)
            busy = statistics.median(row.busy for row in some)
            lines.append(
                f"| {name} | {policy} | {max(ratios):.3f} | {statistics.median(ratios):.3f} "
                f"| {100 * hits:.1f} % | {100 * busy:.1f} % |"
            )
    return "\n".join(lines)


def _encode(rows: Sequence[Measurement]) -> str:
    """Return measurements as JSON, one a line, in an order that does not depend on the run."""
    lines = [
        json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()})
        for row in sorted(rows, key=lambda row: (row.workload, row.policy, row.seed))
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    """Measure the chosen workloads and policies; add them to a JSON file."""
    parser = argparse.ArgumentParser(prog="prefix", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(make_workloads()))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to add the measurements to")
    given = parser.parse_args()
    names = given.workloads or [name for name in make_workloads() if name != "held out"]
    wanted = [(n, p, s) for n in names for s in given.seeds for p in given.policies]
    rows: list[Measurement] = []
    if given.json and given.json.exists():
        rows = [Measurement(**row) for row in json.loads(given.json.read_text())]
        wanted_now = set(wanted)
        rows = [row for row in rows if (row.workload, row.policy, row.seed) not in wanted_now]
    with ProcessPoolExecutor(given.workers) as pool:
        for row in pool.map(measure_one, *zip(*wanted, strict=True), [given.groups] * len(wanted)):
            rows.append(row)
            print(
                f"{row.workload}, {row.policy}, seed {row.seed}: {row.seconds / row.bound_s:.3f} "
                f"of the bound, {100 * row.hits:.1f} % hits, {row.cpu_s:.0f} s of CPU",
                flush=True,
            )
            if given.json:
                given.json.write_text(_encode(rows))
    print(show(rows))


if __name__ == "__main__":
    main()
