from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from fanfold.graphs.cli.tables import Column, fit_columns, format_cell, make_table, show_aggregate

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


def test_an_empty_column_without_a_name_is_no_column_without_room() -> None:
    (table,) = make_table([Column("id", [], is_key=True), Column("", [])], 80)
    assert isinstance(table, Table)


def test_long_names_are_wrapped_at_blanks() -> None:
    name = "measured log solubility in mols per litre"
    file = io.StringIO()
    console = Console(file=file, width=50)
    columns = [
        Column("id", ["a"], is_key=True),
        Column("smiles", ["C" * 60]),
        Column(name, [-0.77]),
    ]
    for part in make_table(columns, console.width):
        console.print(part)
    text = file.getvalue()
    assert "columns not shown" not in text
    assert all(word in text for word in (*name.split(), "-0.77", "CCC"))
    assert all(len(line) <= 50 for line in text.splitlines())


@pytest.mark.parametrize("width", [50, 80])
def test_figures_of_groups_are_never_left_out(width: int) -> None:
    """What does not fit follows in another table, below the names of the groups."""
    quantiles = {str(q): 0.125 for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    facts = {"size": 2, "count": 2, "missing": 0, "mean": 0.5, "sd": 0.25, "min": 0.1, "max": 0.9}
    groups = [{"group": "organic compound", **facts, "quantiles": quantiles}]
    stage = {"op": "stats", "field": "score", "group_by": "kind", "groups": groups, "others": 0}
    text = shown([stage], width)
    assert "columns not shown" not in text
    for word in ("sd", "max", "q 0.05", "q 0.95"):
        assert f" {word} " in text
    assert text.count("organic compound") == text.count("┏") > 1
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [60, 120])
def test_groups_are_rows(width: int) -> None:
    facts = {"size": 2, "count": 2, "mean": 0.5, "quantiles": {"0.5": 0.25}}
    groups = [{"group": "[red]a", **facts}, {"group": None, **facts, "mean": None}]
    head = {"op": "stats", "field": "score", "group_by": "kind"}
    stage = {**head, "groups": groups, "others": 1234, "other_groups": 1}
    text = shown([stage], width)
    assert text.startswith("stats of score by kind   simulated: true")
    assert all(len(line) <= width for line in text.splitlines())
    left = "1,234 items in 1 smaller group not shown"
    for word in ("kind", "size", "mean", "[red]a", "null", left):
        assert word in text
    unknown = shown([{**stage, "other_groups": None}], 1000)
    assert "1,234 items in groups not shown; there are too many values to know" in unknown
    assert "no groups" in shown([{**stage, "groups": [], "others": 0}], width)


def test_rows_of_groups_begin_with_the_group() -> None:
    groups = [{"group": name, "size": 1, "rows": RANKED["rows"]} for name in ("x", "y")]
    text = shown(
        [{"op": "top_k", "field": "score", "group_by": "k", "groups": groups, "others": 0}]
    )
    assert [line.split()[1] for line in text.splitlines() if "│" in line][:2] == ["x", "x"]
    assert text.count("│ a ") == 2


def test_texts_do_not_look_like_other_groups_and_values() -> None:
    counts = [{"value": 1, "count": 30}, {"value": "1", "count": 20}]
    groups = [
        {"group": None, "size": 3, "counts": counts[:1]},
        {"group": "null", "size": 4, "counts": counts[1:]},
        {"group": "2", "size": 5, "counts": counts},
    ]
    grouped = {"op": "histogram", "field": "f", "group_by": "k", "groups": groups, "others": 0}
    plain = {"op": "histogram", "field": "f", "counts": counts}
    lines = [line.replace("│", " ").split() for line in shown([grouped]).splitlines()]
    assert ["null", "3", "30"] in lines
    assert ['"null"', "4", "20"] in lines
    assert ["2", "5", "30", "20"] in lines
    lines = [line.replace("│", " ").split() for line in shown([plain]).splitlines()]
    assert ["1", "30"] in lines
    assert ['"1"', "20"] in lines


COLUMN = st.tuples(st.integers(1, 120), st.integers(1, 120), st.booleans())


@given(st.lists(COLUMN, min_size=1, max_size=12), st.integers(30, 200), st.integers(2, 3))
def test_tables_fit(columns: list[tuple[int, int, bool]], width: int, gap: int) -> None:
    """Keys are always shown, and shortened only if they alone do not fit; others are whole."""
    wide = [max(one, other) for one, other, _ in columns]
    pairs = zip(wide, columns, strict=True)
    least = [most if key else min(one, other) for most, (one, other, key) in pairs]
    keys = [key for *_, key in columns]
    assume(sum(keys) * (1 + gap) <= width)  # tables have up to three keys
    got = fit_columns(wide, least, keys, width, gap)
    assert sum(w + gap for w in got if w) <= width
    fits = sum(w + gap for w, key in zip(wide, keys, strict=True) if key) <= width
    for w, most, low, key in zip(got, wide, least, keys, strict=True):
        assert 0 <= w <= most
        if key:
            assert w == most if fits else w >= 1
        else:
            assert w == 0 or w >= low
    if sum(w + gap for w in wide) <= width:
        assert got == wide


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_names_of_rows_are_whole_at_every_width(width: int, framed: bool) -> None:
    names = [f"runs/of-november/{n}-{'x' * 9 * n}" for n in range(6)]
    columns = [
        Column("run", names, is_key=True),
        Column("state", ["the budget is exhausted: 100 of 100 requests"] * 6),
        Column("items", [12_345] * 6, is_number=True),
        Column("model", ["meta-llama/Llama-3.1-8B-Instruct"] * 6),
    ]
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in make_table(columns, width, framed=framed):
        console.print(part)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    first = [line.strip("│").split("│")[0].split("  ")[0].strip() for line in lines]
    joined = "".join(first)
    for name in names:  # folded only if it is wider than the terminal
        assert name in joined
    assert any("12345" in line for line in lines) or "items" in lines[-1]


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
