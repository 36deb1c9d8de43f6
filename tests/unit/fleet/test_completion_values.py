"""Values of completions in forms that the specification does not have."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage

from fanfold.backends.core.errors import EndpointError, EndpointLostError, EndpointReplyError
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import Failure, HTTPAnswer, RetryAction, classify_refused_field
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import ModelParams
from fanfold.backends.fleet.transport import make_reply, read_completion


def read(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    first = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    body = orjson.dumps({"id": "c", "choices": [first | choice]})
    document = read_completion(HTTPAnswer(200, {}, body), "e")
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (["a", "b"], "ab"),
        ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "reasoning", "text": "hm"}, {"text": "a"}], "a"),
        ([{"thought": True, "text": "hm"}, {"text": "a"}], "a"),
        ([{"type": "text", "text": {"value": "a"}}], "a"),
        ([{"type": "text", "text": ""}], ""),
        ([{"type": ["x"], "text": "a"}, {"type": {}, "x": 1}, None, 5], "a"),
        ([{"type": "thinking", "thinking": "hm"}], ""),
        ([{"type": "redacted_thinking", "data": "hm"}], ""),
        ([], ""),
        ([{"type": "image_url"}], '[{"type":"image_url"}]'),
        ({"x": 1}, '{"x":1}'),
    ],
)
def test_content_in_parts_is_joined(content: Any, text: str) -> None:
    assert read({"content": content})["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        ({"content": "a"}, None),
        ({"content": "a", "reasoning": None}, None),
        ({"content": "a", "reasoning": ""}, None),
        ({"content": "a", "reasoning": "hm"}, "hm"),
        ({"content": "a", "reasoning_content": "hm"}, "hm"),
        ({"content": "a", "reasoning_content": "", "reasoning": "hm"}, "hm"),
        ({"content": "a", "reasoning": {"effort": "low"}}, None),
        ({"content": "a", "reasoning": ["hm"]}, None),
        ({"content": "a", "reasoning": {"text": "hm"}}, "hm"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, "a"]}, "hm"),
        ({"content": [{"type": "reasoning", "reasoning": "hm"}, "a"]}, "hm"),
        ({"content": [{"type": "reasoning", "content": [{"text": "hm"}, {}, 5]}, "a"]}, "hm"),
        ({"content": [{"type": "reasoning", "summary": ["h", "m"]}, "a"]}, "h\nm"),
        (
            {"content": [{"type": "thinking", "thinking": "h"}, {"thought": True, "text": "m"}]},
            "h\n\nm",
        ),
        ({"content": [{"type": "thinking", "thinking": {"a": 1}}, "a"]}, None),
        ({"content": [{"type": "thinking"}, "a"]}, None),
        ({"content": [{"type": "thinking", "thinking": "x"}], "reasoning": "hm"}, "hm"),
    ],
)
def test_reasoning_is_one_text_apart_from_the_answer(
    message: dict[str, Any], reasoning: str | None
) -> None:
    document = read(message)
    assert make_reply(document, "e").reasoning == reasoning
    assert "hm" not in (document["choices"][0]["message"]["content"] or "")


def sse(*events: Any, end: str = "data: [DONE]\n\n") -> bytes:
    return "".join(f"data: {orjson.dumps(event).decode()}\n\n" for event in events).encode() + (
        end.encode()
    )


def part(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    name = more.pop("name", None)
    return {"index": index, "function": {"name": name, "arguments": arguments}, **more}


def test_a_streamed_answer_is_put_together() -> None:
    body = sse(
        part({"role": "assistant", "content": "", "reasoning": "h"}),
        part({"content": "a", "reasoning_content": "m"}),
        part({"content": "z"}, index=1),
        part({"content": "b", "tool_calls": [call(1, '{"x"', id="2", name="g")]}),
        part({"tool_calls": [call(0, "{}", id="1", name="f"), call(1, ": 5}")]}, "tool_calls"),
        part({}, "length", 1),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "model": "m"},
    )
    document = read_completion(HTTPAnswer(200, {}, body), "e")
    assert isinstance(document, dict)
    first, second = document["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("ab", "tool_calls")
    assert (second["message"]["content"], second["finish_reason"]) == ("z", "length")
    calls = [(c["id"], *c["function"].values()) for c in first["message"]["tool_calls"]]
    assert calls == [("1", "f", "{}"), ("2", "g", '{"x": 5}')]
    reply = make_reply(document, "e")
    assert (reply.content, reply.reasoning, reply.model) == ("ab", "hm", "m")
    assert reply.usage == Usage(3, 2)


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (sse(part({"content": "a"}, "stop"), end=""), "a"),
        (sse(part({"content": "a"})), "a"),
        (sse(part({"content": "a"}), end="data:[DONE]"), "a"),
        (sse(part({"content": "a"}, "stop")).replace(b"\n", b"\r\n"), "a"),
        (b"\xef\xbb\xbf\n: ping\nevent: x\n" + sse(part({"content": "a"})), "a"),
        (sse(part({"content": ["a", {"text": "b"}]})), "ab"),
        (sse(part({"refusal": "no"}), part({}, "stop")), None),
        (sse({"choices": [{"message": {"content": "a"}}]}), "a"),
        (sse(part({"content": "a"}), {"choices": [{"message": {"content": "ab"}}]}), "ab"),
        (sse(part({"content": "a"}) | {"x": None}, part({"content": "b"})), "ab"),
        (sse(part({"content": "a"}), {"x": 1}, part({"content": "b"}, "stop")), "ab"),
    ],
)
def test_streams_of_any_form_are_read_as_a_whole(body: bytes, content: str | None) -> None:
    document = read_completion(HTTPAnswer(200, {}, body), "e")
    assert isinstance(document, dict)
    assert document["choices"][0]["message"]["content"] == content


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (sse(part({"content": "a"}), end=""), EndpointLostError, "ended before the answer was"),
        (sse(part({"content": "a"}, "abort")), EndpointLostError, "aborted"),
        (sse(), EndpointReplyError, "a stream without an answer"),
        (sse(end=": ping\n\n"), EndpointReplyError, "a stream without an answer"),
        (sse(part({}), end="data: {\n\n"), EndpointReplyError, "one of its events is not JSON"),
        (sse(part({"content": "a"}), {"error": {"message": "boom"}}), EndpointError, "boom"),
        (sse({"id": "chatcmpl-api-error", "choices": []}), EndpointLostError, "aborted"),
    ],
)
def test_a_stream_that_is_no_answer_says_why(
    body: bytes, error: type[EndpointError], words: str
) -> None:
    failure = read_completion(HTTPAnswer(200, {}, body, {"Authorization": "Bearer k"}), "e")
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, error)
    assert words in failure.error.message
    assert failure.rule.action is not RetryAction.FAIL


def test_a_stream_is_read_without_its_keys() -> None:
    body = sse(part({"content": "a"}), {"error": {"message": "key sk-secret-123456 is no good"}})
    sent = {"Authorization": "Bearer sk-secret-123456"}
    failure = read_completion(HTTPAnswer(200, {}, body, sent), "e")
    assert isinstance(failure, Failure)
    assert "sk-secret-123456" not in failure.error.message


@given(st.lists(st.text(max_size=9), min_size=1, max_size=9), st.booleans(), st.booleans())
def test_a_text_comes_out_however_it_is_cut(
    texts: list[str], is_done: bool, has_reason: bool
) -> None:
    assume(is_done or has_reason)
    events = [part({"content": text}) for text in texts]
    events.append(part({}, "stop" if has_reason else None))
    body = sse(*events, end="data: [DONE]\n\n" if is_done else "")
    document = read_completion(HTTPAnswer(200, {}, body), "e")
    assert isinstance(document, dict)
    assert make_reply(document, "e").content == "".join(texts)


@pytest.mark.parametrize(
    ("reason", "name"),
    [("stop", "stop"), (["stop"], "stop"), (["length"], "length"), (0, "0"), (None, None)],
)
def test_finish_reason_is_text_or_nothing(reason: Any, name: str | None) -> None:
    assert read({"content": "a"}, finish_reason=reason)["choices"][0]["finish_reason"] == name


@pytest.mark.parametrize(
    ("arguments", "args"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ("", {}),
        ("null", {}),
        (None, {}),
        ("[1]", None),
        ("5", None),
        ([1], None),
        (True, None),
        ('"text"', None),
        ('"[1]"', None),
        ("not json", None),
        ('{"a": ', None),
    ],
    ids=str,
)
async def test_arguments_that_are_no_object_are_an_invalid_call(
    arguments: Any, args: dict[str, Any] | None
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    document = read({"content": None, "tool_calls": [call]})
    fleet = Fleet([EndpointSpec("http://127.0.0.1:9/v1")])
    chat = ChatFleet.of(fleet, ModelParams("m"))
    message = chat._create_chat_result(document).generations[0].message
    assert isinstance(message, AIMessage)
    assert [one["args"] for one in message.tool_calls] == ([] if args is None else [args])
    assert len(message.invalid_tool_calls) == (args is None)
    await fleet.aclose()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            b'\xef\xbb\xbf{"error": {"message": "m", "code": "insufficient_quota"}}',
            "m (the acc",
        ),
        (b'{"error": {"message": "\\ud83d", "code": "insufficient_quota"}}', "? (the account"),
        (
            b'{"error": {"message": "m", "x": NaN, "code": "insufficient_quota"}}',
            "m (the acc",
        ),
        ('{"error": {"message": "m", "code": "\u00b2"}}'.encode(), "m"),
        (b'{"error": {"message": "m", "code": ' + b"4" * 5000 + b"}}", "m"),
        (b'{"error": {"message": "m", "code": "' + b"4" * 5000 + b'"}}', "m"),
        (b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}", "[[["),
        (b"[" * 100_000, "[[["),
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [200, 400, 429])
def test_error_bodies_that_break_the_rules_of_json(body: bytes, error: str, status: int) -> None:
    failure = read_completion(HTTPAnswer(status, {}, body), "e")
    assert isinstance(failure, Failure)
    failure = classify_refused_field(failure, {"messages": [{}], "temperature": 0})
    assert error in failure.error.message
