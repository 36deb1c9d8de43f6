"""ChatFleet's messages and errors are those of a stock ChatOpenAI on the same server."""

from __future__ import annotations

import copy
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from fanfold.backends.core.errors import EndpointError
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import FleetPolicy, RetryPolicy, TimeoutPolicy

from .conftest import Canned, Stub, completion

pytestmark = pytest.mark.integration

ONCE = FleetPolicy(retry=RetryPolicy(attempts=1), timeout=TimeoutPolicy(request_s=5.0))
TOOL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
BAD_TOOL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1'}}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": None},
    "completion_tokens_details": None,
}
LOGPROBS = {"content": [{"token": "hi", "logprob": -0.1, "bytes": None, "top_logprobs": []}]}

GOOD: dict[str, Any] = {
    "text": completion("hello"),
    "tools": completion(None, message={"tool_calls": [TOOL]}, finish="tool_calls"),
    "bad tool": completion(None, message={"tool_calls": [BAD_TOOL]}, finish="tool_calls"),
    "no tools": completion("x", message={"tool_calls": []}),
    "reasoning": completion("x", message={"reasoning": "because", "reasoning_content": "b"}),
    "length": completion("cut", finish="length"),
    "refusal": completion(None, message={"refusal": "I will not."}),
    "logprobs": completion("hi", choice={"logprobs": LOGPROBS}),
    "two": completion("x") | {"choices": completion("x")["choices"] * 2},
    "no usage": {k: v for k, v in completion("x").items() if k != "usage"},
    "null usage": completion("x", usage=None),
    "cached": completion("x", usage=USAGE),
    "tier": completion("x", service_tier="default", system_fingerprint="fp"),
    "empty": completion(""),
    "bare": {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}],
    },
}

VLLM_400 = {
    "error": {
        "message": "This model's maximum context length is 2048 tokens. However, your prompt "
        "contains 9000 input tokens.",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
}
BAD: dict[str, Canned] = {
    "400": Canned(400, VLLM_400),
    "400 overflow": Canned(400, {"error": {"message": "x", "code": "context_length_exceeded"}}),
    "401": Canned(401, {"error": "Unauthorized"}),
    "403": Canned(403, {"detail": "no"}),
    "404": Canned(404, {"error": {"message": "no model", "type": "NotFoundError", "code": 404}}),
    "404 page": Canned(404, b"<html>nothing here</html>", {"Content-Type": "text/html"}),
    "408": Canned(408, {"error": {"message": "slow", "code": "request_timeout"}}),
    "409": Canned(409, {"error": {"message": "conflict"}}),
    "413": Canned(413, {"error": {"message": "too large"}}),
    "422": Canned(422, {"detail": [{"msg": "missing"}]}),
    "500": Canned(500, {"error": {"message": "boom", "type": "InternalServerError", "code": 500}}),
    "500 text": Canned(500, b"Internal Server Error", {"Content-Type": "text/plain"}),
    "502": Canned(502, b"<html>bad gateway</html>", {"Content-Type": "text/html"}),
    "error in 200": Canned(200, {"error": {"message": "inside", "code": 500}}),
    "page in 200": Canned(200, b"<html>log in</html>", {"Content-Type": "text/html"}),
    "detail in 200": Canned(200, {"detail": "what"}),
    "null choices": Canned(200, completion("x") | {"choices": None}),
    "no choices": Canned(200, completion("x") | {"choices": []}),
    "broken json": Canned(200, b'{"choices": ['),
    "dropped": Canned(200, None),
}


class Answer(BaseModel):
    a: int


def stock(stub: Stub, model: str, **settings: Any) -> ChatOpenAI:
    own: dict[str, Any] = {"base_url": stub.url, "api_key": "EMPTY", "max_retries": 0}
    return ChatOpenAI(model=model, timeout=5.0, **own, **settings)


def same(ours: AIMessage, theirs: AIMessage) -> None:
    assert ours.response_metadata.pop("endpoint")
    ours.response_metadata.pop("reasoning", None)  # ChatOpenAI drops it
    assert ours.model_dump(exclude={"id"}) == theirs.model_dump(exclude={"id"})


@pytest.mark.parametrize("case", GOOD)
async def test_messages_are_equal(stub: Stub, case: str) -> None:
    stub.answers[case] = [Canned(200, GOOD[case])]
    settings: dict[str, Any] = {"temperature": 0.5, "max_tokens": 7, "seed": 1}
    settings["extra_body"] = {"top_k": 3}
    async with Fleet([EndpointSpec(stub.url)], ONCE) as fleet:
        theirs = await stock(stub, case, **settings).ainvoke("q")
        ours = await ChatFleet(fleet=fleet, model=case, **settings).ainvoke("q")
    same(ours, theirs)
    first, second = stub.bodies
    assert first == second


@pytest.mark.parametrize("schema", [Answer, {"title": "Answer", **Answer.model_json_schema()}])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize(
    "answer",
    [
        completion('{"a": 1}'),
        completion('{"a": tru'),
        completion('{"a": 1', finish="length"),
        completion("", finish="content_filter"),
        completion(None, message={"refusal": "No."}),
        completion(None, message={"tool_calls": [TOOL]}, finish="tool_calls"),
        {"error": {"message": "inside"}},
    ],
    ids=["good", "broken", "length", "filtered", "refused", "tools", "error"],
)
async def test_structured_output_is_equal(
    stub: Stub, schema: Any, method: Any, answer: Any
) -> None:
    answer = copy.deepcopy(answer)
    for call in answer.get("choices", [{}])[0].get("message", {}).get("tool_calls", []):
        call["function"]["name"] = "Answer"
    stub.answers["m"] = [Canned(200, answer)]
    async with Fleet([EndpointSpec(stub.url)], ONCE) as fleet:
        results = [
            await outcome(model.with_structured_output(schema, method=method))
            for model in (stock(stub, "m"), ChatFleet(fleet=fleet, model="m"))
        ]
    first, second = stub.bodies
    first.pop("stream", None)
    second.pop("stream", None)
    assert first == second
    assert results[0] == results[1]


async def outcome(model: Any) -> Any:
    try:
        return await model.ainvoke("q")
    except Exception as error:  # noqa: BLE001 - the class is compared
        return type(error), str(error)


@pytest.mark.parametrize("case", BAD)
async def test_errors_are_equal(stub: Stub, case: str) -> None:
    stub.answers[case] = [BAD[case]]
    urls = stub.url, stub.url.replace("/v1", "/other/v1")
    async with Fleet([EndpointSpec(url) for url in urls], ONCE) as fleet:
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - any class, compared below
            await stock(stub, case).ainvoke("q")
        with pytest.raises(Exception) as ours:  # noqa: PT011 - any class, compared below
            await ChatFleet(fleet=fleet, model=case).ainvoke("q")
    mine, stocks = ours.value, theirs.value
    assert type(mine) is type(stocks)
    assert isinstance(mine.__cause__, EndpointError)
    if not isinstance(stocks, openai.APIConnectionError):
        assert str(mine) == str(stocks)
    for field in ("status_code", "code", "type", "param", "body"):
        assert getattr(mine, field, None) == getattr(stocks, field, None)


async def test_timeout_is_stocks_timeout(stub: Stub) -> None:
    policy = FleetPolicy(retry=RetryPolicy(attempts=1), timeout=TimeoutPolicy(request_s=0.05))
    async with Fleet([EndpointSpec(stub.url)], policy) as fleet:
        stub.answers["m"] = [Canned(held=True)]
        with pytest.raises(openai.APITimeoutError) as caught:
            await ChatFleet(fleet=fleet, model="m").ainvoke("q")
    assert isinstance(caught.value.__cause__, EndpointError)
