from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fanfold.backends.budget.tokens import TokenCounter, estimate_prompt_tokens
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.simulated.fleet import SimulatedFleet

pytestmark = pytest.mark.integration

MODEL = "simulated-8b"


def body(text: str) -> dict[str, Any]:
    schema = {"name": "a", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_completion_tokens": 50,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


async def test_the_endpoint_counts_what_it_will_report(simulated: SimulatedFleet) -> None:
    specs = [EndpointSpec(url) for url in simulated.urls]
    texts = ["one", "two " * 100, "溶解度", "NNC(=O)C(CC)"]
    async with TokenCounter(specs, MODEL) as counter, Fleet(specs) as fleet:
        counts = await asyncio.gather(*(counter.count(body(text)) for text in texts))
        answers = [await fleet.post(body(text)) for text in texts]
    assert [count.exact for count in counts] == [True] * 4
    assert [count.tokens for count in counts] == [
        answer["usage"]["prompt_tokens"] for answer, _ in answers
    ]
    assert counter.method == "by the endpoint's tokenizer"


async def test_one_that_does_not_answer_is_asked_no_more(simulated: SimulatedFleet) -> None:
    specs = [EndpointSpec("http://127.0.0.1:9"), EndpointSpec(simulated.urls[0])]
    async with TokenCounter(specs, MODEL) as counter:
        counts = await asyncio.gather(*(counter.count(body("x")) for _ in range(20)))
        assert {count.exact for count in counts} == {True}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "{base}/nowhere/v1"])
async def test_where_nobody_offers_it_length_decides(url: str, simulated: SimulatedFleet) -> None:
    spec = EndpointSpec(url.format(base=simulated.control_url))
    messages = {"messages": body("x")["messages"]}
    async with TokenCounter([spec], MODEL) as counter:
        for _ in range(2):  # a server's schema is no part of the prompt
            assert await counter.count(body("x")) == (estimate_prompt_tokens(messages), False)


async def test_a_model_that_is_called_otherwise(simulated: SimulatedFleet) -> None:
    spec = EndpointSpec(simulated.urls[0], model=MODEL)
    async with TokenCounter([spec], "ours") as counter:
        assert (await counter.count(body("x"))).exact
    async with TokenCounter([EndpointSpec(simulated.urls[0])], "ours") as counter:
        assert not (await counter.count(body("x"))).exact  # 404: it does not serve that
