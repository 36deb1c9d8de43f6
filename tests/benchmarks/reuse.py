"""The cost of the response cache: per call, and per answer in a folder.

Answers of the fleet come from memory, so that nothing but reuse itself differs.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median

from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.fleet.cache import RequestCache
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.storage.response_cache import ResponseCache

from .parts import ANSWER, AT_ONCE, MESSAGES, SCHEMA, _send

CALLS, ROUNDS, TEXT = 2_000, 5, MESSAGES[0]["content"]


async def measure(sizes: list[int]) -> None:
    """Print CPU microseconds per call, and what folders of so many answers cost."""
    costs: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for name, cost in (await _round(number)).items():
            costs.setdefault(name, []).append(cost)
    print(f"one call without I/O, median of {ROUNDS} rounds of {CALLS}")
    for name, found in costs.items():
        print(f"{name:40} {median(found):7.1f} CPU us")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            _folder(Path(folder), size)


async def _round(number: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        costs = {"cache: off": await _calls(None, number)}
        for name, contested in (("this process alone", False), ("a shared folder", True)):
            path = Path(folder) / name
            for what in ("a miss", "a hit"):
                store = ResponseCache(path, simulated=False, writer="w", contested=contested)
                store.open()
                costs[f"{what}, {name}"] = await _calls(
                    RequestCache(store, simulated=False), number
                )
                store.close()
    return costs


async def _calls(reuse: RequestCache | None, number: int) -> float:
    """Return CPU microseconds per call, all of them different."""
    specs = [EndpointSpec(f"http://n{n}:8000") for n in range(100)]
    fleet = Fleet(specs, FleetPolicy.from_limits(streams=AT_ONCE), cache=reuse)
    vars(fleet._transport)["send"] = _send
    model = FleetClient(fleet, ModelParams("m", 0.0, 256, schema=SCHEMA))
    waiting = iter(range(CALLS))

    async def work() -> None:
        for call in waiting:
            CURRENT_CALLS.set(CallLog())
            await model.ask([{"role": "user", "content": f"{number} {call} {TEXT}"}])

    started = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    if reuse is not None:
        await reuse.aclose()
    spent = 1e6 * (time.process_time() - started) / CALLS
    await fleet.aclose()
    return spent


def _folder(folder: Path, size: int) -> None:
    """Print what a folder with so many answers costs, in wall time on this file system."""
    keys = [hashlib.blake2b(n.to_bytes(8), digest_size=16).digest() for n in range(size)]
    store = ResponseCache(folder, simulated=False, writer="w")
    store.open()
    started = time.perf_counter()
    for key in keys:
        store.put(key, ANSWER)
    put = (time.perf_counter() - started) / size
    store.close()
    tracemalloc.start()
    store = ResponseCache(folder, simulated=False, writer="w")
    store.open()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    store.close()
    store = ResponseCache(folder, simulated=False, writer="w")
    started = time.perf_counter()
    store.open()
    opened = time.perf_counter() - started
    some = random.Random(1).sample(keys, 10_000)
    started = time.perf_counter()
    places = [store.find(key) for key in some]
    find = (time.perf_counter() - started) / len(some)
    started = time.perf_counter()
    for key, place in zip(some, places, strict=True):
        assert place is not None
        assert store.read(key, place) == ANSWER
    read = (time.perf_counter() - started) / len(some)
    store.close()
    print(
        f"{size:>9,} answers: opened in {opened:.2f} s, {memory / size:.0f} bytes each in memory; "
        f"us each: {1e6 * put:.1f} put, {1e6 * find:.1f} find, {1e6 * read:.1f} read"
    )
