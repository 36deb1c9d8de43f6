"""A simulated fleet whose nodes have engines: prefix cache, queue, streams, disconnects."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.parsing import parse_load_metrics
from fanfold.backends.simulated.engine import EngineSpec
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

SHARED = "a long instruction that all requests share, word by word; " * 40
SPEC = SimulationSpec(
    nodes=1,
    usage="details",
    max_num_queued_reqs=1,
    engine=EngineSpec(kv_blocks=400, max_num_seqs=2, step_s=0.002),
)


async def _ask(fleet: SimulatedFleet, text: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": SHARED + text}], "max_tokens": 20, **more}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{fleet.urls[0]}/chat/completions", json=body) as answer,
    ):
        if more.get("stream"):
            return {"status": answer.status, "text": await answer.text()}
        return {"status": answer.status, **await answer.json()}


async def _metrics(fleet: SimulatedFleet) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(fleet.urls[0].removesuffix("/v1") + "/metrics") as answer,
    ):
        return await answer.text()


async def test_cached_tokens_are_reported_and_counted() -> None:
    async with SimulatedFleet(SPEC) as fleet:
        first, second = await _ask(fleet, "one"), await _ask(fleet, "two")
        text = await _metrics(fleet)
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
    assert cached == [0, len(SHARED) // 64 * 16]
    (hits,) = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits")]
    assert float(hits.rpartition(" ")[2]) == cached[1]


async def test_streams_full_queues_and_disconnects() -> None:
    async with SimulatedFleet(SPEC) as fleet:
        streamed = await _ask(fleet, "one", stream=True)
        assert streamed["text"].count("[DONE]") == 1
        asked = [asyncio.create_task(_ask(fleet, f"{n}", max_tokens=400)) for n in range(5)]
        answers = await asyncio.gather(*asked)
        assert sorted(one["status"] for one in answers) == [200, 200, 200, 503, 503]
        left = asyncio.create_task(_ask(fleet, "left", max_tokens=4000))
        while fleet.stats()["nodes"][0]["running"] == 0:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        left.cancel()
        while fleet.stats()["totals"]["disconnects"] == 0:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        load = parse_load_metrics((await _metrics(fleet)).encode())
        assert load is not None
        assert (load.running, load.waiting) == (0, 0)
        assert (await _ask(fleet, "after"))["status"] == 200


def test_the_specification_with_an_engine_is_json() -> None:
    assert SimulationSpec.from_json(SPEC.to_json()) == SPEC
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'blocks'"):
        SimulationSpec.from_mapping({"engine": {"blocks": 5}})
    with pytest.raises(ConfigurationError, match="kv_blocks must be above 0, not 0"):
        SimulationSpec.from_mapping({"engine": {"kv_blocks": 0}})
