from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]


def test_row_numbers_unless_a_key_id_is_there(load: Load) -> None:
    assert [item.id for item in load(InputConfig(), items=[{"x": 1}, {"x": 2}])] == ["1", "2"]
    assert [item.id for item in load(InputConfig(), items=[{"id": 8}, {"id": "a"}])] == ["8", "a"]
    assert [item.id for item in load(InputConfig(id="k"), items=[{"id": 8, "k": "z"}])] == ["z"]
    assert [item.id for item in load(InputConfig(id="k"), items=[{"id": 8}])] == ["8"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "input.items is empty; it must contain at least one object"),
        ("abc", "input.items must be a list of objects, not str"),
        ({"x": 1}, "input.items must be a list of objects, not dict"),
        ([{"x": 1}, 5], r"items\[1\] is not an object but int; each item must map column names"),
        ([{"x": 1}, None], r"items\[1\] is not an object but NoneType"),
        ([{"x": 1}, {"y": 1}], r"items\[1\] has no column 'x', which the task needs"),
        ([{"id": 1, "x": 1}, {"x": 1}], r"items\[1\] has no column 'id', which input\.id needs"),
        ([{"x": 1}, {"x": {1, 2}}], r"items\[1\]: column 'x' cannot be written as JSON: Type is"),
        ([{"x": b"1"}], r"items\[0\]: column 'x' cannot be written as JSON"),
        ([{"x": 2**70}], r"items\[0\]: column 'x' cannot .* Integer exceeds 64-bit range"),
        ([{"x": "\ud800"}], r"items\[0\]: column 'x' cannot be written as JSON"),
        ([{"x": 1, 2: 3}], r"items\[0\]: column 2 cannot be written as JSON: Dict key must be"),
    ],
)
def test_faulty_items(load: Load, items: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(InputConfig(), "x", items=items)


def test_pasted_items_replace_the_configured_input(load: Load) -> None:
    assert [i.row for i in load(InputConfig(path="/nowhere.csv"), items=[{"x": 1}])] == [{"x": 1}]


def test_no_input_at_all(load: Load) -> None:
    with pytest.raises(InputError, match=r"neither input\.path nor input\.dataset, and no items"):
        load(InputConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "a", "path": "b"}, "give either path or dataset, not both"),
        ({"dataset": "a", "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_contradicting_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InputConfig(**fields)
