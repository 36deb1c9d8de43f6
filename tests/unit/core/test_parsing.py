from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.parsing import read_message_text, resolve_reference


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": ["a", {"type": "text", "text": "b"}]}, "a\nb"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, ""),
        ({"content": [{"type": "file", "file": "x"}]}, '{"type":"file","file":"x"}'),
        ({"content": "a", "tool_calls": [{"id": "1"}]}, 'a\n[{"id":"1"}]'),
        ({"content": None, "tool_calls": [{"id": "1"}]}, '[{"id":"1"}]'),
        ({"content": 5}, "5"),
    ],
    ids=str,
)
def test_text_of_a_message(message: dict[str, Any], text: str) -> None:
    assert read_message_text(message) == text


SCHEMA = {"$defs": {"a b": {"const": 1}, "c/d~": {"const": 2}}, "anyOf": [{"const": 3}]}


@pytest.mark.parametrize(
    ("reference", "part"),
    [
        ("#", SCHEMA),
        ("#/$defs/a%20b/const", 1),
        ("#/$defs/c~1d~0/const", 2),
        ("#/anyOf/0/const", 3),
    ],
)
def test_reference(reference: str, part: Any) -> None:
    assert resolve_reference(SCHEMA, reference) == part


@pytest.mark.parametrize("reference", ["#/none", "#/anyOf/1", "#/anyOf/x", "#/anyOf/0/const/x"])
def test_reference_that_does_not_exist(reference: str) -> None:
    with pytest.raises(LookupError, match=reference):
        resolve_reference(SCHEMA, reference)
