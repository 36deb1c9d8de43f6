from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from fanfold.graphs.cli.format import fit_columns, format_cell, show_aggregate

RANKED = {
    "op": "top_k",
    "field": "score",
    "rows": [
        {
            "rank": 1,
            "id": "a",
            "value": 0.5,
            "show": {"smiles": "C" * 60},
            "output": {"why": "x" * 99},
        },
        {"rank": 2, "id": "b", "value": 0.25, "show": {"smiles": "N"}, "output": {"why": None}},
    ],
}


def shown(aggregate: list[dict[str, Any]], width: int = 80, simulated: bool = True) -> str:
    file = io.StringIO()
    show_aggregate(aggregate, simulated, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_ranks_ids_and_values_are_never_cut(width: int) -> None:
    text = shown([RANKED], width)
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("rank", "id", "score", "0.5", "0.25", "│ a "):
        assert word in text


def test_columns_without_room_are_named() -> None:
    row = {"rank": 1, "id": "a", "value": 1, "output": {f"field_{n}": n for n in range(30)}}
    text = shown([{"op": "top_k", "field": "v", "rows": [row]}])
    assert "columns not shown: field_" in text
    assert "field_29" in text


@example([1, 1, 1, 1], 30)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(30, 200))
def test_tables_fit(wide: list[int], width: int) -> None:
    room = fit_columns(wide, width)
    assert sum(room) + 3 * len(room) + 1 <= width
    assert all(1 <= got <= wanted for got, wanted in zip(room, wide, strict=False))
    assert len(room) == len(wide) or len(wide) * 9 > width - 1
    if sum(wide) + 3 * len(wide) + 1 <= width:
        assert room == wide


@pytest.mark.parametrize(
    "stage",
    [
        RANKED,
        {"op": "count", "done": 1, "failed": 0},
        {"op": "top_k", "field": "x", "rows": []},
        {"op": "histogram", "field": "x", "bins": [{"low": 0, "high": 1, "count": 2}]},
    ],
)
def test_every_table_says_what_it_is(stage: dict[str, Any]) -> None:
    assert "simulated: true" in shown([stage]).splitlines()[0]
    assert "simulated" not in shown([stage], simulated=False)


def test_no_rows() -> None:
    assert "no rows" in shown([{"op": "top_k", "field": "x", "rows": []}])


def test_cells_are_harmless() -> None:
    assert format_cell("[red]x[/red]\x1b[31m\u202e\n y").plain == "[red]x[/red]\\x1b[31m\\u202e y"
    assert len(format_cell("x" * 500)) == 80
    assert format_cell(None).plain == ""
    assert format_cell({"a": [1]}).plain == '{"a":[1]}'
