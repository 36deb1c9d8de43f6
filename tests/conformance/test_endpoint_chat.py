"""Requirements on every kind of chat endpoint; a real vLLM joins if its URLs are given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

import orjson
import pytest

from fanfold.backends.core.errors import PromptTooLongError, RunStoppedError
from fanfold.backends.discovery.probe import CheckedModel, check_models, probe_models
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

VLLM_URLS: Final = os.environ.get("FANFOLD_TEST_VLLM_URL", "")
SCHEMA: Final = {
    "type": "object",
    "properties": {"label": {"enum": ["a", "b"]}},
    "required": ["label"],
    "additionalProperties": False,
}
Q: Final = [{"role": "user", "content": "Say something."}]


@pytest.fixture(
    params=[
        "simulated",
        pytest.param(
            "vllm",
            marks=pytest.mark.skipif(not VLLM_URLS, reason="FANFOLD_TEST_VLLM_URL is not set"),
        ),
    ]
)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[CheckedModel]:
    if request.param == "vllm":
        specs = [EndpointSpec(url) for url in VLLM_URLS.split(",")]
        yield check_models(await probe_models(specs), None)
        return
    async with SimulatedFleet(SimulationSpec.fast(nodes=2, max_model_len=2048)) as servers:
        yield check_models(await probe_models([EndpointSpec(u) for u in servers.urls]), None)


async def test_models_are_listed_with_their_context(served: CheckedModel) -> None:
    assert served.model
    assert served.max_model_len == 2048
    assert not served.unreachable


async def test_an_answer_has_content_and_usage(served: CheckedModel) -> None:
    async with Fleet(served.specs) as fleet:
        reply = await FleetClient(fleet, ModelParams(served.model, max_tokens=16)).ask(Q)
    assert reply.model == served.model
    assert reply.simulated is served.simulated
    assert reply.finish_reason in {"stop", "length"}
    assert reply.usage.prompt
    assert reply.usage.completion


async def test_a_schema_constrains_the_answer(served: CheckedModel) -> None:
    params = ModelParams(served.model, temperature=0, max_tokens=64, schema=SCHEMA)
    async with Fleet(served.specs) as fleet:
        reply = await FleetClient(fleet, params).ask(Q)
    if reply.finish_reason == "stop":
        assert orjson.loads(reply.content)["label"] in {"a", "b"}
    else:
        # A schema does not bring an answer to its end: it allows blanks for ever.
        written = "".join(reply.content.split())
        assert any(whole.startswith(written) for whole in ('{"label":"a"}', '{"label":"b"}'))


async def test_max_tokens_cuts_and_says_so(served: CheckedModel) -> None:
    params = ModelParams(served.model, max_tokens=2, extra_body={"ignore_eos": True})
    async with Fleet(served.specs) as fleet:
        assert (await FleetClient(fleet, params).ask(Q)).finish_reason == "length"


async def test_a_prompt_that_is_too_long_fails_its_item_only(served: CheckedModel) -> None:
    params = ModelParams(served.model, max_tokens=4)
    long = [{"role": "user", "content": "word " * 20_000}]
    async with Fleet(served.specs) as fleet:
        model = FleetClient(fleet, params)
        with pytest.raises(PromptTooLongError):
            await model.ask(long)
        assert (await model.ask(Q)).content is not None
        assert fleet.health().healthy == len(served.specs)


@pytest.mark.parametrize("known", [True, False])
async def test_more_tokens_than_the_context_holds_are_lowered(
    served: CheckedModel, known: bool
) -> None:
    length = served.max_model_len if known else None
    params = ModelParams(served.model, max_tokens=50_000, extra_body={"stop": ["e", "t"]})
    async with Fleet([replace(spec, max_model_len=length) for spec in served.specs]) as fleet:
        reply = await FleetClient(fleet, params).ask(Q)
        assert sum(sum(r.failures.values()) for r in fleet.report()) == (not known)
    assert reply.usage.completion


async def test_overload_is_queued_or_refused_and_loses_nothing(served: CheckedModel) -> None:
    params = ModelParams(served.model, max_tokens=4)
    async with Fleet(served.specs, FleetPolicy.from_limits(streams=300)) as fleet:
        model = FleetClient(fleet, params)
        async with asyncio.TaskGroup() as group:
            calls = [
                group.create_task(model.ask([{"role": "user", "content": f"item {n}"}]))
                for n in range(300)
            ]
    assert all(call.result().usage.completion for call in calls)


async def test_an_unknown_model_stops_the_run(served: CheckedModel) -> None:
    async with Fleet(served.specs) as fleet:
        with pytest.raises(RunStoppedError, match=r"model\.name"):
            await FleetClient(fleet, ModelParams("no-such-model", max_tokens=4)).ask(Q)


async def test_streams_end_with_reason_and_usage(served: CheckedModel) -> None:
    params = replace(ModelParams(served.model), max_tokens=8, temperature=0)
    async with Fleet(served.specs) as fleet:
        chat = ChatFleet.of(fleet, params)
        chunks = [chunk async for chunk in chat.astream("Say something.")]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.response_metadata["finish_reason"] in {"stop", "length"}
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
