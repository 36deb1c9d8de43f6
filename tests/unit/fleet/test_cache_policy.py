from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.fleet.cache import CachePolicy

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
WANTED = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}


def document(content: Any = "yes", reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": said, "finish_reason": reason}]}


def call(arguments: Any, name: str = "look") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("body", "sampled", "may"),
    [
        ({"temperature": 0}, False, True),
        ({"temperature": 0.0}, False, True),
        ({"temperature": 0.1}, False, False),
        ({}, False, False),
        ({"temperature": None}, False, False),
        ({"temperature": 0.1}, True, True),
        ({}, True, True),
    ],
)
def test_who_may_share(body: dict[str, Any], sampled: bool, may: bool) -> None:
    assert CachePolicy(sampled).is_shareable(body) is may


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (document(), True),
        (document(reason="length"), False),
        (document(reason="content_filter"), False),
        (document(reason=None), True),
        (document(reason="eos_token"), True),
        (document(reason="MAX_TOKENS"), False),
        (document(""), False),
        (document(None), False),
        (document(refusal="no"), False),
        (document(None, "tool_calls", tool_calls=[call('{"a": 1}')]), True),
        (document(None, "tool_calls", tool_calls=[call('{"a": ')]), False),
        (document(None, "tool_calls", tool_calls=[call('{"a": 1}'), call("3")]), False),
        (document(None, "tool_calls", tool_calls=[call("{}", name="")]), False),
        (document(None, "tool_calls", tool_calls=[]), False),
        (document(None, "tool_calls"), False),
        ({"choices": document()["choices"] + document(reason="length")["choices"]}, False),
        ({"choices": [*document()["choices"], "no choice"]}, False),
    ],
)
def test_free_text_is_good_when_it_is_whole(answer: dict[str, Any], good: bool) -> None:
    assert CachePolicy(False).is_cacheable({}, answer) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"n": 1}', True),
        ('```json\n{"n": 1}\n```', True),
        ('<think>n?</think>```json {"n": 1}```', True),
        ('{"n": "1"}', False),
        ("{}", False),
        ('{"n": 1', False),
        ("n is 1", False),
    ],
)
def test_an_answer_with_a_schema_is_good_when_it_is_valid(text: str, good: bool) -> None:
    worth = CachePolicy(False)
    for _ in range(2):
        assert worth.is_cacheable({"response_format": WANTED}, document(text)) is good


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/schema.json"}, None, 3]
)
def test_what_no_schema_can_check_is_not_kept(schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert not CachePolicy(False).is_cacheable({"response_format": wanted}, document("{}"))
    assert not CachePolicy(False).is_cacheable(
        {"response_format": {"type": "json_schema"}}, document("{}")
    )


def test_an_object_without_a_schema_must_be_json() -> None:
    worth, body = CachePolicy(False), {"response_format": {"type": "json_object"}}
    assert worth.is_cacheable(body, document('{"a": 1}'))
    assert not worth.is_cacheable(body, document("a is 1"))


def test_many_schemas_take_no_room_without_end() -> None:
    worth = CachePolicy(False)
    for number in range(200):
        schema = {"const": number}
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert worth.is_cacheable({"response_format": wanted}, document(str(number)))
    assert len(worth._validators) <= 64
