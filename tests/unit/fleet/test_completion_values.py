"""Values of completions in forms that the specification does not have."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from langchain_core.messages import AIMessage

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.failures import Failure, HTTPAnswer, classify_refused_field
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.langchain import ChatFleet
from fanfold.backends.fleet.policy import ModelParams
from fanfold.backends.fleet.transport import read_completion


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
        ([{"type": "image_url"}], '[{"type":"image_url"}]'),
        ({"x": 1}, '{"x":1}'),
    ],
)
def test_content_in_parts_is_joined(content: Any, text: str) -> None:
    assert read({"content": content})["choices"][0]["message"]["content"] == text


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
