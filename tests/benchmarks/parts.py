"""The cost of the parts of one call: each is removed, or added, in turn.

Answers come from memory, so that nothing but the fleet itself is measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import orjson

from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.adaptive_limit import AdaptiveLimit
from fanfold.backends.fleet.balancer import LoadBalancer
from fanfold.backends.fleet.endpoint import Breaker, Endpoint, EndpointSpec
from fanfold.backends.fleet.failures import HTTPAnswer
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    AffinityPolicy,
    BreakerPolicy,
    FleetPolicy,
    ModelParams,
    RateLimitPolicy,
)
from fanfold.backends.fleet.stats import EndpointStats
from fanfold.nodes.item.answer import AnswerCheck

CALLS, ROUNDS, AT_ONCE = 2_000, 9, 256
MESSAGES = [{"role": "user", "content": "Judge this text: " + "some text of a record " * 30}]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "kind", "reason"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "kind": {"type": "string", "enum": ["a", "b", "c"]},
        "reason": {"type": "string", "minLength": 200, "maxLength": 400},
    },
}
TEXT = orjson.dumps({"score": 0.5, "kind": "a", "reason": "because " * 40}).decode()
ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 200, "completion_tokens": 100, "total_tokens": 300},
    }
)


class NoBreaker(Breaker):
    """Trusts everybody."""

    __slots__ = ()

    def record_success(self) -> bool:
        return False


class NoLane(AdaptiveLimit):
    """Learns nothing."""

    __slots__ = ()

    def record_answer(self, level: int, seconds: float, now: float) -> None:
        del level, seconds, now


class NoStats(EndpointStats):
    """Counts nothing."""

    __slots__ = ()

    def add_answer(self, seconds: float, usage: Usage) -> None:
        del seconds, usage


async def _send(*_: object) -> HTTPAnswer:
    await asyncio.sleep(0)
    return HTTPAnswer(200, {}, ANSWER)


def _fleet(policy: FleetPolicy, change: Callable[[Endpoint], None] | None = None) -> Fleet:
    fleet = Fleet([EndpointSpec(f"http://n{n}:8000") for n in range(100)], policy)
    vars(fleet._transport)["send"] = _send
    for endpoint in fleet.endpoints if change else ():
        assert change is not None
        change(endpoint)
    return fleet


def _without(name: str, part: Callable[[], object]) -> Callable[[Endpoint], None]:
    return lambda endpoint: setattr(endpoint, name, part())


async def measure() -> None:
    """Print CPU microseconds per call of the whole, and of each part."""
    usual = FleetPolicy.from_limits(streams=AT_ONCE)
    paced = replace(usual, rate_limit=RateLimitPolicy(requests_per_s=1e9, tokens_per_min=1e12))
    fleets = {
        "as it is": _fleet(usual),
        "without breaker": _fleet(usual, _without("breaker", lambda: NoBreaker(BreakerPolicy()))),
        "without lane": _fleet(usual, _without("limit", lambda: NoLane(AdaptiveLimitPolicy()))),
        "without accounting": _fleet(usual, _without("stats", NoStats)),
        "without hedging": _fleet(replace(usual, hedge=None)),
        "with pacing": _fleet(paced),
        "with affinity": _fleet(replace(usual, affinity=AffinityPolicy())),
    }
    costs: dict[str, list[float]] = {name: [] for name in fleets}
    for _ in range(ROUNDS):
        for name in random.sample(list(fleets), len(fleets)):
            costs[name].append(await _round(fleets[name]))
    for fleet in fleets.values():
        await fleet.aclose()
    whole = median(costs["as it is"])
    print(f"one call without I/O, median of {ROUNDS} rounds of {CALLS} in shuffled order")
    for name, cost in costs.items():
        extra = median(a - b for a, b in zip(cost, costs["as it is"], strict=True))
        print(f"{name:20} {median(cost):7.1f} CPU us   {extra:+6.1f} us   {extra / whole:+.1%}")
    print(f"{'schema validation':20} {_validation():7.1f} CPU us, on top")


async def _round(fleet: Fleet) -> float:
    """Return CPU microseconds per call."""
    model = FleetClient(fleet, ModelParams("m", 0.0, 256, schema=SCHEMA))
    waiting = iter(range(CALLS))

    async def work() -> None:
        for _ in waiting:
            CURRENT_CALLS.set(CallLog())
            await model.ask(MESSAGES)

    started = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    return 1e6 * (time.process_time() - started) / CALLS


def _validation() -> float:
    check = AnswerCheck(SCHEMA, 256)
    started = time.process_time()
    for _ in range(CALLS):
        check.check_value(check.check_finish(TEXT, {"finish_reason": "stop", "refusal": None}))
    return 1e6 * (time.process_time() - started) / CALLS


def measure_choice() -> None:
    """Print what it costs to choose an endpoint and give it back, and to build a fleet."""
    for count in (10, 100, 2_000):
        costs = [_choice(count) for _ in range(5)]
        print(f"choice among {count:>5} endpoints: {median(costs):5.1f} CPU us per call")
    started = time.perf_counter()
    Fleet([EndpointSpec(f"http://n{n}:8000") for n in range(2_000)])
    print(f"a fleet of 2,000 endpoints is built in {time.perf_counter() - started:.3f} s")


def _choice(count: int) -> float:
    """Return CPU microseconds of one take and one give, half the places being taken."""
    endpoints = [Endpoint(EndpointSpec(f"http://n{n}:8000")) for n in range(count)]
    dispatch = LoadBalancer(endpoints, 1_000_000, _unpaced, lambda: None)
    chance, held = random.Random(0), deque[Endpoint]()

    async def run() -> float:
        for _ in range(4 * count):
            held.append(await dispatch.acquire())
        calls = 20_000
        started = time.process_time()
        for _ in range(calls):
            dispatch.release(held.popleft(), chance.lognormvariate(0, 0.5))
            held.append(await dispatch.acquire())
        return 1e6 * (time.process_time() - started) / calls

    return asyncio.run(run())


def _unpaced(seconds: float) -> None:
    raise AssertionError(f"there is no quota to wait {seconds} s for")
