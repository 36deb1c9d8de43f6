from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.raw_settings import apply_override, expand_variables
from fanfold.configs.serialize import check_plain
from fanfold.configs.yaml_text import parse_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text("ab${}", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy"), inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN)
def test_what_names_no_variable_stays(data: Any) -> None:
    def names(value: Any) -> bool:
        return "${" in str(value)

    if not names(data):
        assert expand_variables(data, {}, "f") == data


def test_variables_are_replaced_in_text_values_only() -> None:
    data = {"${A}": ["x${A}${B}y", 1, None, {"k": "$${A} $A {A}"}]}
    assert expand_variables(data, {"A": "1", "B": "${A}"}, "f") == {
        "${A}": ["x1${A}y", 1, None, {"k": "${A} $A {A}"}]
    }


def test_an_unset_variable_is_named_with_its_key() -> None:
    with pytest.raises(ConfigurationError, match=r"f: a\.0\.b: .*variable NO is not set"):
        expand_variables({"a": [{"b": "${NO}"}]}, {}, "f")


def test_an_empty_variable_is_set() -> None:
    assert expand_variables("<${E}>", {"E": ""}, "f") == "<>"


@pytest.mark.parametrize(
    ("assignment", "after"),
    [
        ("a.b=3", {"a": {"b": 3}, "l": [{"k": 1}]}),
        ("a.b.c=[1, x]", {"a": {"b": {"c": [1, "x"]}}, "l": [{"k": 1}]}),
        ("l.0.k=null", {"a": {"b": None}, "l": [{"k": None}]}),
        ("l.0={k: 2}", {"a": {"b": None}, "l": [{"k": 2}]}),
        ("n.m=a=b", {"a": {"b": None}, "l": [{"k": 1}], "n": {"m": "a=b"}}),
        ("e=", {"a": {"b": None}, "l": [{"k": 1}], "e": None}),
    ],
)
def test_overrides(assignment: str, after: dict[str, Any]) -> None:
    data: dict[str, Any] = {"a": {"b": None}, "l": [{"k": 1}]}
    apply_override(data, assignment)
    assert data == after


def test_merge_keys_and_aliases_work() -> None:
    text = "x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n"
    assert parse_yaml(text, "f") == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}


@given(PLAIN)
def test_plain_data_passes(data: Any) -> None:
    check_plain({"k": data}, "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64, b"x", {1}, {1: 2}, "\ud800"])
def test_the_rest_does_not(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"f: a"):
        check_plain({"a": [value]}, "f")


def test_aliases_that_unfold_by_the_million() -> None:
    data: list[Any] = ["x"] * 10
    for _ in range(8):
        data = [data] * 10
    with pytest.raises(ConfigurationError, match="1,000,000 values"):
        check_plain({"a": data}, "f")
