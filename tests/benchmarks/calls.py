"""One call through each interface, against stock ChatOpenAI and raw aiohttp, in one process."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from statistics import median

import aiohttp
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec

CALLS, AT_ONCE, ROUNDS = 300, 32, 7
MESSAGES = [{"role": "user", "content": "Judge this text: " + "some text of a record " * 30}]
Call = Callable[[], Awaitable[object]]


async def measure() -> None:
    """Print CPU ms per call of each way, and its ratio to stock ChatOpenAI."""
    spec = SimulationSpec.fast(nodes=1, max_num_seqs=AT_ONCE, output_tokens=(150, 200))
    params = ModelParams(spec.model, 0.0, 256)
    async with (
        launch(spec) as up,
        Fleet([EndpointSpec(up.urls[0])], FleetPolicy.from_limits(streams=AT_ONCE)) as fleet,
        aiohttp.ClientSession() as session,
    ):
        door, chat = FleetClient(fleet, params), ChatFleet.of(fleet, params)
        stock = ChatOpenAI(
            model=spec.model,
            base_url=up.urls[0],
            api_key=SecretStr("EMPTY"),
            temperature=0,
            max_completion_tokens=256,
            timeout=60,
        )
        body = params.body() | {"messages": MESSAGES}

        async def raw() -> object:
            async with session.post(f"{up.urls[0]}/chat/completions", json=body) as answer:
                return await answer.json()

        ways: dict[str, Call] = {
            "stock ChatOpenAI.ainvoke": lambda: stock.ainvoke(MESSAGES),
            "ChatFleet.ainvoke": lambda: chat.ainvoke(MESSAGES),
            "fleet's lower door": lambda: door.ask(MESSAGES),
            "raw aiohttp": raw,
        }
        costs = await _alternate(ways)
    first = median(costs["stock ChatOpenAI.ainvoke"])
    print(f"one call, {AT_ONCE} at once, median of {ROUNDS} rounds of {CALLS} in shuffled order")
    for name, cost in costs.items():
        print(f"{name:28} {median(cost):6.3f} CPU ms   {median(cost) / first:5.2f} of stock")


async def _alternate(ways: dict[str, Call]) -> dict[str, list[float]]:
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        await _round(call)  # warm up
    for _ in range(ROUNDS):
        for name in random.sample(list(ways), len(ways)):
            costs[name].append(await _round(ways[name]))
    return costs


async def _round(call: Call) -> float:
    """Return CPU ms per call."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with places:
            await call()

    started = time.process_time()
    await asyncio.gather(*(one() for _ in range(CALLS)))
    return 1000 * (time.process_time() - started) / CALLS
