"""Conditions that select finished items."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.selection import Selection

ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": {"type": "number"},
        "label": {"type": "string"},
        "ok": {"type": "boolean"},
        "deep": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}
INPUTS: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"type": "string"}, "label": {"type": "string"}},
}
OUTPUT: dict[str, Any] = {"score": 0.9, "label": "a b", "ok": True, "deep": {"x": 3}}
ROW = {"kind": "organic", "label": "z"}


def holds(text: str, status: str = "done", output: Any = OUTPUT) -> bool:
    return Selection.parse(text, ANSWER, INPUTS).holds(status, output, ROW)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output.score > 0.8", True),
        ("score>0.9", False),
        ("score>=0.9", True),
        ("score > 0.8 and kind == organic", True),
        ("score > 0.8 and kind == 'inorganic'", False),
        ("output.label == 'a b'", True),
        ('output.label == "a b" and done', True),
        ("input.label == z", True),
        ("deep.x == 3 and done", True),
        ("ok == true", True),
        ("ok == 1", False),
        ("ok != 1", True),
        ("ok > 0", False),
        ("score == null", False),
        ("score != null", True),
        ("score < text", False),
        ("kind < p", True),
        ("failed", False),
        (" done ", True),
    ],
)
def test_conditions(text: str, expected: bool) -> None:
    assert holds(text) is expected


def test_a_failed_item_has_no_answer() -> None:
    assert holds("failed", "failed", None)
    assert holds("failed and kind == organic", "failed", None)
    assert holds("score == null", "failed", None)
    for sign in ("<", ">", "<=", ">="):
        assert not holds(f"score {sign} 0", "failed", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "and",
        "failed and",
        "failed or done",
        "score",
        "score >",
        "> 3",
        "score => 3",
        "score > 0.8 kind == a",
        "score > 3 and",
        "label == 'a",
        "__import__('os').system('true')",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Selection.parse(text, ANSWER, INPUTS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scor > 1", "did you mean 'score'"),
        ("label == z", "both a field of the answer and a column"),
        ("output.deep.y == 1", "no field"),
    ],
)
def test_unknown_fields(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Selection.parse(text, ANSWER, INPUTS)


SIGNS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@given(
    st.floats(-10, 10) | st.integers(-10, 10),
    st.floats(-10, 10) | st.integers(-10, 10),
    st.sampled_from(sorted(SIGNS)),
)
def test_numbers_compare_as_numbers(found: float, value: float, sign: str) -> None:
    text = f"score {sign} {value}"
    assert holds(text, output={"score": found}) is SIGNS[sign](found, value)
