"""The size that a value has at most in an engine's messages."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.values import json_size

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@given(VALUES)
def test_it_is_what_the_longest_encoder_writes(value: Any) -> None:
    """And at most three times the shortest form, by which task templates tell the usual case."""
    if isinstance(value, float) and value in {float("inf"), float("-inf")}:
        value = 0.0
    size, shortest = json_size(value), len(orjson.dumps(value))
    assert size == len(json.dumps(orjson.loads(orjson.dumps(value))))
    assert shortest <= size <= 3 * shortest


def test_a_value_without_a_json_form_is_refused() -> None:
    with pytest.raises(TypeError):
        json_size({"x": object()})
