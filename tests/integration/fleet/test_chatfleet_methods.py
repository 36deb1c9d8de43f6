"""Every method of the chat model that calls a model uses the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from fanfold.backends.core.errors import (
    ConfigurationError,
    EndpointError,
    EndpointLostError,
    PromptTooLongError,
)
from fanfold.backends.core.protocols import CURRENT_CALLS, CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.langchain import ChatFleet, LangChainClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams, RetryPolicy

from .conftest import Canned, Stub, completion, until

pytestmark = pytest.mark.integration

Q = [{"role": "user", "content": "q"}]
PARAMS = ModelParams(
    "m",
    temperature=0.2,
    max_tokens=9,
    seed=4,
    extra_body={"top_k": 2},
    schema={"type": "object", "properties": {"a": {"type": "integer"}}},
)


class Answer(BaseModel):
    a: int


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def events(*chunks: dict[str, Any], done: bool = True) -> Canned:
    lines = b"".join(b"data: " + orjson.dumps(c) + b"\n\n" for c in chunks)
    end = b"data: [DONE]\n\n" if done else b""
    return Canned(200, lines + end, {"Content-Type": "text/event-stream"})


def chunk(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "served"}
    return head | {"choices": [choice]} | more


STREAM = events(
    chunk("he"),
    chunk("llo", "stop"),
    chunk("") | {"choices": [], "usage": completion()["usage"]},
)


@pytest.fixture
def paid(make_stub: Callable[[], Stub], monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Return a listener that the environment names as OpenAI."""
    listener = make_stub()
    for name, value in {
        "OPENAI_API_KEY": "sk-secret",
        "OPENAI_BASE_URL": listener.url,
        "OPENAI_API_BASE": listener.url,
        "OPENAI_PROXY": listener.url,
        "HTTP_PROXY": listener.url,
        "HTTPS_PROXY": listener.url,
        "LANGSMITH_GATEWAY": "true",
        "LANGSMITH_TRACING": "false",
    }.items():
        monkeypatch.setenv(name, value)
    return listener


async def through_every_door(chat: ChatFleet) -> None:
    await chat.ainvoke("q")
    await chat.abatch(["q", "r"])
    await asyncio.to_thread(chat.invoke, "q")
    await asyncio.to_thread(chat.batch, ["q", "r"])
    await chat.bind_tools([add]).ainvoke("q")
    await chat.with_fallbacks([chat]).ainvoke("q")
    for method in ("json_schema", "json_mode"):
        await chat.with_structured_output(Answer, method=method).ainvoke("q")
        await chat.with_structured_output(dict(PARAMS.schema or {}, title="A")).ainvoke("q")


async def test_no_door_leads_elsewhere(stub: Stub, paid: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion('{"a": 1}'))]
    async with Fleet([EndpointSpec(stub.url, "node-key")]) as fleet:
        await through_every_door(ChatFleet(fleet=fleet, model="m"))
    assert len(stub.bodies) == 12
    assert set(stub.keys) == {"Bearer node-key"}
    assert paid.bodies == []


@pytest.mark.parametrize("stream_mode", ["values", "messages"])
async def test_graph_streams_through_the_fleet(stub: Stub, paid: Stub, stream_mode: Any) -> None:
    stub.answers["m"] = [STREAM if stream_mode == "messages" else Canned(200, completion())]
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        chat = ChatFleet(fleet=fleet, model="m")

        async def node(state: MessagesState) -> dict[str, Any]:
            return {"messages": [await chat.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState).add_node("n", node).add_edge(START, "n").compile()
        question: Any = {"messages": Q}
        got: list[Any] = [part async for part in graph.astream(question, stream_mode=stream_mode)]
    assert len(stub.bodies) == 1
    assert paid.bodies == []
    if stream_mode == "messages":
        texts = [p[0].content for p in got if isinstance(p[0], AIMessageChunk)]
        assert "".join(map(str, texts)) == "hello"
        assert stub.bodies[0]["stream"] is True


async def test_stream_counts_tokens_once(stub: Stub) -> None:
    stub.answers["m"] = [STREAM]
    async with Fleet([EndpointSpec(stub.url, label="node")]) as fleet:
        log = CallLog()
        CURRENT_CALLS.set(log)
        whole: Any = None
        async for part in ChatFleet(fleet=fleet, model="m").astream("q"):
            whole = part if whole is None else whole + part
    assert whole is not None
    assert (whole.text, whole.response_metadata["endpoint"]) == ("hello", "node")
    assert log == CallLog(1, Usage(3, 2), "node", "served", False)
    assert fleet.in_flight == 0


async def test_stream_moves_on_before_the_first_token_only(
    make_stub: Callable[[], Stub],
) -> None:
    bad, good = make_stub(), make_stub()
    good.answers["m"] = [STREAM, events(chunk("he"), done=False)]
    bad.answers["m"] = [Canned(500, b"boom"), Canned(500, b"boom")]
    specs = [EndpointSpec(bad.url, weight=100), EndpointSpec(good.url)]
    async with Fleet(specs) as fleet:
        chat = ChatFleet(fleet=fleet, model="m")
        assert [c.content async for c in chat.astream("q")] == ["he", "llo", "", ""]
        with pytest.raises(Exception, match="Connection error") as caught:
            _ = [c async for c in chat.astream("q")]
    assert isinstance(caught.value.__cause__, EndpointLostError)
    assert len(good.bodies) == 2
    assert fleet.in_flight == 0


async def test_leaving_a_stream_frees_the_endpoint(stub: Stub) -> None:
    stub.answers["m"] = [STREAM]
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        stream = ChatFleet(fleet=fleet, model="m").astream("q")
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        await until(lambda: not fleet.in_flight)


def test_sync_doors_without_a_loop(stub: Stub) -> None:
    stub.answers["m"] = [STREAM, STREAM, Canned(200, completion())]
    fleet = Fleet([EndpointSpec(stub.url)])
    chat = ChatFleet(fleet=fleet, model="m")
    log = CallLog()
    CURRENT_CALLS.set(log)
    assert "".join(c.text for c in chat.stream("q")) == "hello"
    for _ in chat.stream("q"):
        break
    assert chat.invoke("q").content == "hello"
    fleet.close()
    assert log.requests == 3


async def test_sync_door_inside_a_loop_does_not_deadlock(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion())]
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        chat = ChatFleet(fleet=fleet, model="m")
        await chat.ainvoke("q")
        assert chat.invoke("q").content == "hello"


def test_one_fleet_serves_one_loop_after_the_other(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion())]
    fleet = Fleet([EndpointSpec(stub.url)])
    chat = ChatFleet(fleet=fleet, model="m")

    async def once() -> Any:
        async with fleet:
            return (await chat.ainvoke("q")).content

    assert [asyncio.run(once()) for _ in range(2)] == ["hello", "hello"]


async def test_both_doors_send_and_return_the_same(stub: Stub) -> None:
    stub.answers["m"] = [Canned(200, completion("x", finish="length"))]
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        lower = await FleetClient(fleet, PARAMS).ask(Q)
        upper = await LangChainClient(ChatFleet.of(fleet, PARAMS)).ask(Q)
    assert lower == upper
    assert stub.bodies[0] == stub.bodies[1]
    assert lower.finish_reason == "length"


@pytest.mark.parametrize(
    "answer",
    [Canned(400, {"error": {"message": "x", "param": "input_tokens"}}), Canned(200, b"<html>")],
)
async def test_both_doors_raise_the_same(stub: Stub, answer: Canned) -> None:
    stub.answers["m"] = [answer]
    policy = FleetPolicy(retry=RetryPolicy(attempts=1))
    async with Fleet([EndpointSpec(stub.url)], policy) as fleet:
        with pytest.raises(EndpointError) as lower:
            await FleetClient(fleet, PARAMS).ask(Q)
        with pytest.raises(EndpointError) as upper:
            await LangChainClient(ChatFleet.of(fleet, PARAMS)).ask(Q)
    assert type(lower.value) is type(upper.value)
    assert lower.value.args == upper.value.args
    assert isinstance(lower.value, PromptTooLongError) is (answer.status == 400)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"base_url": "http://x/v1"}, "base_url"),
        ({"api_key": "k"}, "api_key"),
        ({"timeout": 3}, "timeout"),
        ({"max_retries": 2}, "max_retries"),
        ({"use_responses_api": True}, "Responses API"),
        ({"output_version": "responses/v1"}, "Responses API"),
        ({"reasoning": {"effort": "low"}}, "Responses API"),
    ],
)
def test_what_belongs_to_the_fleet_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        ChatFleet(fleet=Fleet([EndpointSpec("http://127.0.0.1:1")]), model="m", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"timeout": 3}, {"extra_headers": {}}, {"tools": [{"type": "web_search"}]}],
)
async def test_calls_may_not_bypass_the_fleet(settings: dict[str, Any]) -> None:
    chat = ChatFleet(fleet=Fleet([EndpointSpec("http://127.0.0.1:1")]), model="m")
    with pytest.raises(ConfigurationError):
        await chat.ainvoke("q", **settings)


def test_no_representation_shows_a_key() -> None:
    fleet = Fleet([EndpointSpec("http://user:pw@127.0.0.1:1", "topsecret")])
    chat = ChatFleet(fleet=fleet, model="m")
    shown = "".join(
        map(repr, [fleet, chat, fleet.endpoints, EndpointSpec("http://h", "topsecret")])
    )
    assert "topsecret" not in shown
    assert "pw" not in shown


def test_model_kwargs_of_the_caller_stay_whole() -> None:
    kwargs = {"logit_bias": {"1": 2}}
    with pytest.warns(UserWarning, match="logit_bias"):
        ChatFleet(fleet=Fleet([EndpointSpec("http://h")]), model="m", model_kwargs=kwargs)
    assert kwargs == {"logit_bias": {"1": 2}}


async def test_a_large_question_is_sent_without_complaint(stub: Stub) -> None:
    """aiohttp warns of large bodies in one piece; here every warning is an error."""
    stub.answers["m"] = [Canned(200, completion())]
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        answer = await ChatFleet(fleet=fleet, model="m").ainvoke("molecule " * 200_000)
    assert answer.text == "hello"
