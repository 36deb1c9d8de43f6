"""Every method of the fleet gives equal requests one answer; streams are always requested."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import BaseModel

from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.cache import RequestCache
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet, LangChainClient
from fanfold.backends.fleet.policy import ModelParams
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.storage.response_cache import ResponseCache

from .conftest import Canned, Stub, completion

pytestmark = pytest.mark.integration

PARAMS = ModelParams("m", temperature=0.0, max_tokens=64)
Q = [{"role": "user", "content": "Which?"}]


class Found(BaseModel):
    n: int


@pytest_asyncio.fixture
async def fleet(stub: Stub, tmp_path: Path) -> AsyncIterator[Fleet]:
    stub.answers["m"] = [Canned(body=completion('{"n": 3}'))]
    store = ResponseCache(tmp_path, simulated=False, writer="w")
    store.open()
    reuse = RequestCache(store, simulated=False)
    async with Fleet([EndpointSpec(stub.url)], cache=reuse) as fleet:
        yield fleet
    await reuse.aclose()
    store.close()


async def test_the_doors_share_answers(stub: Stub, fleet: Fleet) -> None:
    """The lower door's answer serves LangChain's, and the other way round."""
    first = await FleetClient(fleet, PARAMS).ask(Q)
    assert (first.cached, first.usage) == (False, Usage(3, 2))
    for model in (FleetClient(fleet, PARAMS), LangChainClient(ChatFleet.of(fleet, PARAMS))):
        again = await model.ask(Q)
        assert (again.cached, again.endpoint, again.model) == (True, "", "served")
        assert (again.content, again.finish_reason) == (first.content, "stop")
        assert again.usage == Usage(0, 0)
    assert len(stub.bodies) == 1


async def test_a_reused_message_costs_nothing(stub: Stub, fleet: Fleet) -> None:
    chat = ChatFleet.of(fleet, PARAMS)
    asked, reused = [await chat.ainvoke("Which?") for _ in range(2)]
    assert asked.text == reused.text
    assert asked.response_metadata["endpoint"] == fleet.endpoints[0].label
    assert reused.response_metadata["endpoint"] is None
    assert reused.usage_metadata is not None
    assert reused.usage_metadata["total_tokens"] == 0
    assert len(stub.bodies) == 1


async def test_parsed_answers_are_reused(stub: Stub, fleet: Fleet) -> None:
    """Through the openai package, which builds such bodies itself."""
    chat: Any = ChatFleet.of(fleet, PARAMS).with_structured_output(Found, method="json_schema")
    assert [await chat.ainvoke("Which?") for _ in range(3)] == [Found(n=3)] * 3
    assert len(stub.bodies) == 1


async def test_streams_are_not(simulated: SimulatedFleet, tmp_path: Path) -> None:
    store = ResponseCache(tmp_path, simulated=True, writer="w")
    store.open()
    reuse = RequestCache(store, simulated=True)
    params = ModelParams(simulated.spec.model, temperature=0.0, max_tokens=8)
    async with Fleet([EndpointSpec(url) for url in simulated.urls], cache=reuse) as fleet:
        chat = ChatFleet.of(fleet, params)
        for _ in range(3):
            assert [chunk async for chunk in chat.astream("Which?")]
    assert (simulated.stats()["totals"]["requests"], len(store)) == (3, 0)
    store.close()


async def test_a_temperature_of_one_s_own_is_asked_each_time(stub: Stub, fleet: Fleet) -> None:
    chat = ChatFleet.of(fleet, PARAMS)
    for _ in range(2):
        await chat.ainvoke("Which?", temperature=0.7)
    assert len(stub.bodies) == 2


def test_synchronous_calls_find_what_is_kept(stub: Stub, tmp_path: Path) -> None:
    stub.answers["m"] = [Canned(body=completion())]
    store = ResponseCache(tmp_path, simulated=False, writer="w")
    store.open()
    fleet = Fleet([EndpointSpec(stub.url)], cache=RequestCache(store, simulated=False))
    chat = ChatFleet.of(fleet, PARAMS)
    assert [chat.invoke("Which?").text for _ in range(3)] == ["hello"] * 3
    assert len(stub.bodies) == 1
    fleet.close()
    store.close()
