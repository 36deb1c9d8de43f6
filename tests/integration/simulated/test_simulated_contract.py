"""The HTTP interface that clients rely on: the simulated fleet, and a real vLLM if given.

Set ``FANFOLD_TEST_VLLM_URL`` (``http://host:port/v1``) to add the real server.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import jsonschema_rs
import openai
import orjson
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from fanfold.backends.core.types import SIMULATED_FINGERPRINT
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

VLLM_URL = os.environ.get("FANFOLD_TEST_VLLM_URL")
MESSAGES = [{"role": "user", "content": "Say something about water."}]
USAGE = {
    *("prompt_tokens", "total_tokens", "completion_tokens"),
    *("prompt_tokens_details", "completion_tokens_details"),
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["score"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
NO_SPACES = {"disable_any_whitespace": True}


@dataclass(frozen=True)
class Target:
    url: str
    model: str
    length: int
    simulated: bool
    http: aiohttp.ClientSession

    async def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        async with self.http.post(f"{self.url}{path}", json=body) as response:
            return response.status, await response.json()

    async def chat(self, **body: Any) -> tuple[int, dict[str, Any]]:
        whole = {"model": self.model, "messages": MESSAGES, "max_tokens": 16, **body}
        return await self.post("/chat/completions", **whole)

    async def good(self, **body: Any) -> dict[str, Any]:
        status, answer = await self.chat(**body)
        assert status == 200, answer
        return answer

    async def error(self, **body: Any) -> tuple[int, dict[str, Any]]:
        status, answer = await self.chat(**body)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["code"] == status
        return status, answer["error"]

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.http.get(f"{self.url.removesuffix('/v1')}{path}") as response:
            return response.status, await response.read()

    async def stream(self, path: str = "/chat/completions", **body: Any) -> list[dict[str, Any]]:
        whole = {"model": self.model, "max_tokens": 16, "stream": True, **body}
        async with self.http.post(f"{self.url}{path}", json=whole) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            text = (await response.read()).decode()
        events = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
        assert events[-1] == "[DONE]"
        return [orjson.loads(event) for event in events[:-1]]


TARGETS = ["simulated", *(["vllm"] if VLLM_URL else [])]


@pytest.fixture(params=TARGETS)
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    async with aiohttp.ClientSession() as http:
        if request.param == "vllm" and VLLM_URL:
            yield await _described(VLLM_URL, False, http)
        else:
            async with SimulatedFleet(SimulationSpec.fast(nodes=1, max_model_len=2048)) as fleet:
                yield await _described(fleet.urls[0], True, http)


async def _described(url: str, simulated: bool, http: aiohttp.ClientSession) -> Target:
    async with http.get(f"{url}/models") as response:
        card = (await response.json())["data"][0]
    return Target(url, card["id"], card["max_model_len"], simulated, http)


async def test_models(target: Target) -> None:
    status, body = await target.get("/v1/models")
    listed = orjson.loads(body)
    card = listed["data"][0]
    assert (status, listed["object"], card["object"]) == (200, "list", "model")
    assert (card["owned_by"] == SIMULATED_FINGERPRINT) == target.simulated


async def test_an_answer(target: Target) -> None:
    answer = await target.good()
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    assert answer["model"] == target.model
    assert {"index", "message", "logprobs", "finish_reason", "stop_reason"} <= set(choice)
    assert {"role", "content", "refusal", "tool_calls"} <= set(choice["message"])
    assert (answer["system_fingerprint"] == SIMULATED_FINGERPRINT) == target.simulated


async def test_usage(target: Target) -> None:
    usage = (await target.good())["usage"]
    assert set(usage) == USAGE
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_length(target: Target, name: str) -> None:
    answer = await target.good(**{"max_tokens": None, name: 3})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_the_clamp_is_silent(target: Target) -> None:
    prompt = (await target.good())["usage"]["prompt_tokens"]
    answer = await target.good(max_tokens=target.length)
    assert answer["usage"]["completion_tokens"] <= target.length - prompt


async def test_schema(target: Target) -> None:
    answer = await target.good(
        response_format=FORM, structured_outputs=None, max_tokens=64, temperature=0
    )
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema_rs.validate(SCHEMA, orjson.loads(answer["choices"][0]["message"]["content"]))


async def test_structured_outputs_json(target: Target) -> None:
    answer = await target.good(structured_outputs={"json": SCHEMA, **NO_SPACES}, max_tokens=64)
    jsonschema_rs.validate(SCHEMA, orjson.loads(answer["choices"][0]["message"]["content"]))


async def test_choice(target: Target) -> None:
    answer = await target.good(structured_outputs={"choice": ["yes", "no"]})
    assert answer["choices"][0]["message"]["content"] in {"yes", "no"}


async def test_regex(target: Target) -> None:
    answer = await target.good(structured_outputs={"regex": "a[bc]{3}"})
    content = answer["choices"][0]["message"]["content"]
    assert content[0] == "a"
    assert set(content[1:]) <= {"b", "c"}


async def test_two_constraints(target: Target) -> None:
    status, _ = await target.error(structured_outputs={"choice": ["a"], "regex": "a"})
    assert status == 400


async def test_guided_json_is_ignored(target: Target) -> None:
    assert (await target.good(guided_json=SCHEMA, no_such_field=1))["choices"]


async def test_required_tool(target: Target) -> None:
    tools = [{"type": "function", "function": {"name": "rate", "parameters": SCHEMA}}]
    answer = await target.good(tools=tools, tool_choice="required", max_tokens=200, temperature=0)
    message = answer["choices"][0]["message"]
    if answer["choices"][0]["finish_reason"] == "length":  # a dummy model may babble
        assert not message["tool_calls"]
    else:
        call = message["tool_calls"][0]["function"]
        assert call["name"] == "rate"
        jsonschema_rs.validate(SCHEMA, orjson.loads(call["arguments"]))


async def test_request_id(target: Target) -> None:
    body = {"model": target.model, "messages": MESSAGES, "max_tokens": 4}
    headers = {"X-Request-Id": "run-7-1"}
    async with target.http.post(
        f"{target.url}/chat/completions", json=body, headers=headers
    ) as response:
        assert (await response.json())["id"] == "chatcmpl-run-7-1"


async def test_stream(target: Target) -> None:
    events = await target.stream(messages=MESSAGES)
    choices = [event["choices"][0] for event in events]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[-1]["finish_reason"] in {"stop", "length"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert "".join(choice["delta"].get("content") or "" for choice in choices)
    marked = {event.get("system_fingerprint") for event in events}
    assert (marked == {SIMULATED_FINGERPRINT}) == target.simulated


async def test_stream_with_usage(target: Target) -> None:
    events = await target.stream(messages=MESSAGES, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] > 0


async def test_stream_says_the_same(target: Target) -> None:
    events = await target.stream(messages=MESSAGES, temperature=0, seed=1)
    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    whole = await target.good(temperature=0, seed=1)
    assert streamed == whole["choices"][0]["message"]["content"]


async def test_bare_completion(target: Target) -> None:
    body = {"model": target.model, "prompt": "Water is", "max_tokens": 4}
    status, answer = await target.post("/completions", **body)
    assert (status, answer["object"]) == (200, "text_completion")
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["finish_reason"] == "length"
    events = await target.stream("/completions", prompt="Water is")
    assert "".join(event["choices"][0]["text"] for event in events)


async def test_unknown_model(target: Target) -> None:
    status, error = await target.error(model="no-such-model")
    assert (status, error["type"], error["param"]) == (404, "NotFoundError", "model")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -3}, "temperature"),
        ({"messages": 5}, None),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, "input_tokens"),
    ],
    ids=["temperature", "messages", "prompt"],
)
async def test_bad_requests(target: Target, body: dict[str, Any], param: str | None) -> None:
    status, error = await target.error(**body)
    assert (status, error["type"]) == (400, "BadRequestError")
    assert error["param"] == param or (param, error["param"]) == ("input_tokens", "input_text")
    assert param != "input_tokens" or "maximum context length" in error["message"]


async def test_too_many_tokens_asked(target: Target) -> None:
    status, error = await target.error(max_tokens=target.length + 1)
    assert status == 400
    assert error["param"] in {"max_tokens", "max_completion_tokens"}


async def test_no_json(target: Target) -> None:
    headers = {"content-type": "application/json"}
    async with target.http.post(
        f"{target.url}/chat/completions", data=b"{", headers=headers
    ) as response:
        assert response.status == 400
        assert "message" in (await response.json())["error"]


async def test_unknown_route_and_method(target: Target) -> None:
    status, body = await target.get("/v1/no/such/route")
    assert (status, orjson.loads(body)["error"]["type"]) == (404, "Not Found")
    status, body = await target.get("/v1/chat/completions")
    assert (status, orjson.loads(body)["error"]["type"]) == (405, "Method Not Allowed")


async def test_probes(target: Target) -> None:
    assert await target.get("/health") == (200, b"")
    assert (await target.get("/ping"))[0] == 200
    assert orjson.loads((await target.get("/load"))[1]) == {"server_load": 0}
    assert "version" in orjson.loads((await target.get("/version"))[1])


async def test_metrics(target: Target) -> None:
    await target.good(max_tokens=2)
    status, text = await target.get("/metrics")
    assert status == 200
    for name in ("num_requests_running", "num_requests_waiting", "generation_tokens_total"):
        assert f"vllm:{name}".encode() in text


async def test_tokenize(target: Target) -> None:
    async with target.http.post(
        f"{target.url.removesuffix('/v1')}/tokenize",
        json={"model": target.model, "messages": MESSAGES},
    ) as response:
        counted = await response.json()
    assert counted["count"] == len(counted["tokens"])
    assert counted["count"] == (await target.good())["usage"]["prompt_tokens"]
    assert counted["max_model_len"] == target.length


async def test_many_requests_on_one_connection(target: Target) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    body = {"model": target.model, "messages": MESSAGES, "max_tokens": 2}
    async with aiohttp.ClientSession(connector=connector) as http:
        for _ in range(5):
            async with http.post(f"{target.url}/chat/completions", json=body) as response:
                assert response.status == 200
                await response.read()


async def test_the_openai_client(target: Target) -> None:
    async with openai.AsyncOpenAI(base_url=target.url, api_key="EMPTY", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model=target.model,
            messages=[{"role": "user", "content": "Rate water."}],
            max_tokens=64,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "rating", "schema": SCHEMA, "strict": True},
            },
        )
        assert answer.usage
        jsonschema_rs.validate(SCHEMA, orjson.loads(answer.choices[0].message.content or ""))
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(
                model="other", messages=[{"role": "user", "content": "?"}]
            )


async def test_langchain(target: Target) -> None:
    async with openai.DefaultAsyncHttpxClient(trust_env=False) as http:
        model = ChatOpenAI(
            base_url=target.url,
            api_key=SecretStr("EMPTY"),
            model=target.model,
            max_retries=0,
            http_async_client=http,
            max_completion_tokens=64,
        )
        message = await model.bind(response_format=FORM).ainvoke("Rate water.")
        jsonschema_rs.validate(SCHEMA, orjson.loads(str(message.text)))
        assert message.usage_metadata
        fingerprint = message.response_metadata.get("system_fingerprint")
        assert (fingerprint == SIMULATED_FINGERPRINT) == target.simulated
        chunks = [chunk async for chunk in model.astream("Talk about water.")]
        assert "".join(chunk.text for chunk in chunks)
