from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs.base import RowSource, SkippedRow, format_id
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.backends.inputs.screening import IdAssigner
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]

SOURCE = RowSource("a.csv", lambda: iter(()), lambda place: f"a.csv, line {place}")


@given(st.lists(st.sampled_from(["x", "x#2", "x#3", "x#2#2", "y"])))
def test_suffixes_are_unique_and_keep_the_first(names: list[str]) -> None:
    namer = IdAssigner(SOURCE, "k", "suffix")
    given_names = [namer.assign(name, 0) for name in names]
    namer.report_problems()
    assert len(set(given_names)) == len(names)
    assert all(
        unique and unique.startswith(name) for unique, name in zip(given_names, names, strict=True)
    )


@given(st.lists(st.sampled_from("abc")))
def test_first_keeps_each_once(names: list[str]) -> None:
    namer = IdAssigner(SOURCE, "k", "first")
    kept = [unique for name in names if (unique := namer.assign(name, 0)) is not None]
    assert kept == list(dict.fromkeys(names))


def test_suffixes(load: Load) -> None:
    rows = [{"id": name} for name in ("x", "x#2", "x", "x", "x#2")]
    items = load(InputConfig(on_duplicate="suffix"), items=rows)
    assert [item.id for item in items] == ["x", "x#2", "x#3", "x#4", "x#2#2"]
    assert [item.row["id"] for item in items] == ["x", "x#2", "x", "x", "x#2"]


def test_first_names_what_it_leaves_out_and_the_limit_counts_the_rest(
    tmp_path: Path, put: Put
) -> None:
    path = put("a.csv", "k,v\na,1\na,2\nb,3\nc,4\n")
    spec = InputConfig(path=str(path), id="k", on_duplicate="first", limit=2)
    summary = load_input(spec, tmp_path / "items.arrow", [])
    assert (summary.items, summary.first.row["v"]) == (2, "1")
    assert summary.skipped == (SkippedRow("a", f"repeated id, {path}, line 3"),)
    assert summary.skipped_total == 1


def test_many_left_out_are_counted_but_not_all_named(tmp_path: Path) -> None:
    config, rows = InputConfig(on_duplicate="first"), [{"id": "x"}] * 1_500
    summary = load_input(config, tmp_path / "items.arrow", [], rows)
    assert (summary.items, len(summary.skipped), summary.skipped_total) == (1, 1_000, 1_499)


def test_repeated_ids_are_named(put: Put, load: Load) -> None:
    path = put("a.csv", "k\na\nb\n a\nb\nc\n")
    with pytest.raises(
        InputError,
        match=r"a\.csv: ids in column 'k' are repeated: 'a' \(.*line 4\); 'b' \(.*line 5\); "
        "set input.on_duplicate to 'first' or 'suffix'",
    ):
        load(InputConfig(path=str(path), id="k"))
    assert len(load(InputConfig(path=str(path), id="k", limit=2))) == 2


def test_only_the_first_few_are_named(load: Load) -> None:
    with pytest.raises(InputError, match=r"items\[5\]") as caught:
        load(InputConfig(), items=[{"id": 1}] * 100)
    assert "items[6]" not in caught.value.message


@pytest.mark.parametrize("on_duplicate", ["error", "first", "suffix"])
def test_blank_ids_are_named(
    put: Put, load: Load, on_duplicate: Literal["error", "first", "suffix"]
) -> None:
    path = put("a.csv", "k,v\na,1\n,2\n  ,3\n")
    with pytest.raises(
        InputError,
        match=r"a\.csv: the id in column 'k' is blank at .*line 3; .*line 4; fill it, or set",
    ):
        load(InputConfig(path=str(path), id="k", on_duplicate=on_duplicate))


@pytest.mark.parametrize(
    ("value", "text"),
    [(" a ", "a"), (7, "7"), (0, "0"), (1.5, "1.5"), (None, ""), (True, None), ([], None)],
)
def test_id_text(value: object, text: str | None) -> None:
    assert format_id(value) == text


def test_each_sample_has_an_id(tmp_path: Path) -> None:
    """The file has each row once; items of a row follow each other and share no data."""
    target, rows = tmp_path / "items.arrow", [{"id": "a", "n": [1]}, {"id": "b", "n": [2]}]
    summary = load_input(InputConfig(id="id"), target, [], rows, samples=3)
    assert (summary.items, summary.rows, summary.samples) == (6, 2, 3)
    with ItemStore(target) as store:
        ids = ["a", "a~2", "a~3", "b", "b~2", "b~3"]
        assert list(store.iter_ids()) == ids
        ranges = [(lo, hi) for lo in range(7) for hi in range(lo, 7)]
        assert [store.read_ids(*one) for one in ranges] == [ids[lo:hi] for lo, hi in ranges]
        items = store.read(1, 5)
        assert [(item.id, item.index, item.sample) for item in items] == [
            ("a~2", 1, 1),
            ("a~3", 2, 2),
            ("b", 3, 0),
            ("b~2", 4, 1),
        ]
        assert [item.row_id for item in items] == ["a", "a", "b", "b"]
        items[0].row["n"].append(9)
        assert items[1].row == {"id": "a", "n": [1]}
        assert [row["id"] for row, _ in store.iter_rows([0, 2, 5])] == ["a", "a", "b"]
        assert len(store) == 6
    plain = tmp_path / "plain.arrow"
    assert load_input(InputConfig(id="id"), plain, [], rows).digest == summary.digest


@pytest.mark.parametrize("order", [("a", "a~2"), ("a~2", "a")])
def test_an_id_that_a_sample_has(tmp_path: Path, order: tuple[str, str]) -> None:
    rows = [{"id": name} for name in order]
    target, config = tmp_path / "items.arrow", InputConfig(id="id")
    with pytest.raises(InputError, match="'a~2' is the id of a row, and of a sample of the row"):
        load_input(config, target, [], rows, samples=2)
    assert load_input(config, target, [], rows).items == 2
    load_input(config, target, [], [{"id": "a"}, {"id": "a~3"}, {"id": "a~02"}], samples=2)
