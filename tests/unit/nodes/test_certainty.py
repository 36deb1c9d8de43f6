"""The probability of a field's value, from the tokens of an answer."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.nodes.item.certainty import find_value, read_certainty


def probabilities(*tokens: tuple[str, float]) -> dict[str, Any]:
    """Return tokens with their probabilities as a server sends them."""
    content = [
        {"token": token, "logprob": math.log(share), "bytes": list(token.encode())}
        for token, share in tokens
    ]
    return {"content": content}


def test_the_tokens_of_the_value_count() -> None:
    sent = probabilities(
        ('{"', 0.5), ("label", 0.5), ('":"', 1.0), ("ca", 0.9), ("t", 0.8), ('"}', 0.7)
    )
    assert read_certainty('{"label":"cat"}', sent, ("label",)) == pytest.approx(0.9 * 0.8 * 0.7)


def test_text_around_the_answer_does_not_count() -> None:
    sent = probabilities(
        ("Let {me} think. ", 0.1), ('```json\n{"a": {"b": ', 0.2), ("12", 0.6), ("}}\n```", 0.3)
    )
    text = '```json\n{"a": {"b": 12}}\n```'
    assert read_certainty(text, sent, ("a", "b")) == pytest.approx(0.6)


def test_a_token_may_be_a_part_of_a_character() -> None:
    data = '{"x":"é"}'.encode()
    content = [{"token": "�", "logprob": -0.25, "bytes": [byte]} for byte in data]
    found = read_certainty('{"x":"é"}', {"content": content}, ("x",))
    assert found == pytest.approx(math.exp(-0.25 * len('é"'.encode())))


@pytest.mark.parametrize(
    "sent",
    [
        None,
        [],
        {"content": None},
        {"content": [5]},
        {"content": [{"token": "x", "logprob": True}]},
        {"content": [{"token": '{"x":1}', "logprob": "high"}]},
        {"content": [{"token": '{"x":1}', "logprob": math.nan}]},
        {"content": [{"token": "something else", "logprob": -1.0}]},
    ],
)
def test_what_does_not_fit_gives_no_certainty(sent: Any) -> None:
    assert read_certainty('{"x":1}', sent, ("x",)) is None


@pytest.mark.parametrize("text", ["", "{", '{"y":1}', "[1]", '{"x"', "no JSON", '{"x":{"z":1}}'])
def test_an_answer_without_the_field_gives_no_certainty(text: str) -> None:
    assert find_value(text, ("x", "y")) is None


def test_odd_bytes_and_probabilities_are_bounded() -> None:
    content = [{"token": '{"x":1}', "logprob": 3.0, "bytes": ["?"]}]
    assert read_certainty('{"x":1}', {"content": content}, ("x",)) == 1.0
    content = [{"token": '{"x":1}', "logprob": -math.inf, "bytes": None}]
    assert read_certainty('{"x":1}', {"content": content}, ("x",)) == 0.0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, min_size=1), st.data(), st.booleans())
def test_the_value_is_found_in_any_object(
    answer: dict[str, Any], data: st.DataObject, indented: bool
) -> None:
    key = data.draw(st.sampled_from(sorted(answer)))
    text = json.dumps(answer, indent=2 if indented else None, ensure_ascii=False)
    span = find_value(text, (key,))
    assert span is not None
    quote = '"' if isinstance(answer[key], str) else ""
    assert json.loads(quote + text[span[0] : span[1]]) == answer[key]
