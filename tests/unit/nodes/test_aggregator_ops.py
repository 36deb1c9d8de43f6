from __future__ import annotations

from functools import reduce
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.types import Json, Outcome
from fanfold.nodes.aggregators import build_aggregators, combine_states
from fanfold.nodes.aggregators.grouped import FOLLOWED_GROUPS


def outcomes(values: list[Json], field: str = "x") -> list[Outcome]:
    return [Outcome(i, f"i{i}", "done", {field: value}) for i, value in enumerate(values)]


def one(spec: dict[str, Json], items: list[Outcome]) -> dict[str, Any]:
    stage = build_aggregators([spec])
    return stage.present(stage.lift(items))[0]


def failed(index: int, error: str | None) -> Outcome:
    return Outcome(index, str(index), "failed", None, error)


def test_count() -> None:
    errors = ["BackendError", "AnswerError", "BackendError", None]
    items = [*outcomes([1]), *(failed(i + 1, e) for i, e in enumerate(errors))]
    found = one({"op": "count"}, items)
    assert (found["done"], found["failed"]) == (1, 4)
    assert list(found["failed_by_class"].items()) == [
        ("BackendError", 2),
        ("AnswerError", 1),
        ("unknown", 1),
    ]


def test_count_tells_at_most_100_classes_apart_in_any_order() -> None:
    stage = build_aggregators([{"op": "count"}])
    states = [stage.lift([failed(i, f"E{i % 150:03}")]) for i in range(300)]
    forward = stage.present(reduce(combine_states, states))[0]
    assert forward == stage.present(reduce(combine_states, states[::-1]))[0]
    assert forward["failed"] == 300
    assert len(forward["failed_by_class"]) == 101
    assert forward["failed_by_class"]["E099"] == 2
    assert forward["failed_by_class"]["other classes"] == 100


def test_histogram_of_labels() -> None:
    found = one({"op": "histogram", "field": "x"}, outcomes(["b", "a", "b", None, ["b"]]))
    assert found["counts"] == [{"value": "b", "count": 2}, {"value": "a", "count": 1}]
    assert found["missing"] == 2


def test_histogram_tells_types_apart() -> None:
    found = one({"op": "histogram", "field": "x"}, outcomes([1, True, "1", "true", 1.0]))
    pairs = {(type(row["value"]), row["value"]): row["count"] for row in found["counts"]}
    assert pairs == {(int, 1): 2, (bool, True): 1, (str, "1"): 1, (str, "true"): 1}


def test_histogram_of_numbers_rises() -> None:
    found = one({"op": "histogram", "field": "x"}, outcomes([10, 9, 10, 2, 0.5]))
    assert [row["value"] for row in found["counts"]] == [0.5, 2, 9, 10]


def test_histogram_with_bins() -> None:
    spec: dict[str, Json] = {"op": "histogram", "field": "x", "bins": 4, "low": 0, "high": 2}
    values: list[Json] = [0, 0.49, 0.5, 1.99, 2, -0.01, 2.01, "1", None]
    found = one(spec, outcomes(values))
    assert [row["count"] for row in found["bins"]] == [2, 1, 0, 2]
    assert [row["low"] for row in found["bins"]] == [0, 0.5, 1, 1.5]
    assert found["bins"][-1]["high"] == 2
    assert (found["under"], found["over"], found["missing"]) == (1, 1, 2)


@pytest.mark.parametrize(("low", "high", "bins"), [(0.1, 0.7, 3), (-1e308, 1e308, 7), (0, 49, 49)])
def test_the_ends_of_the_range_are_inside(low: float, high: float, bins: int) -> None:
    spec: dict[str, Json] = {"op": "histogram", "field": "x"}
    found = one(spec | {"bins": bins, "low": low, "high": high}, outcomes([low, high]))
    assert (found["bins"][0]["count"], found["bins"][-1]["count"]) == (1, 1)


def test_histogram_with_edges() -> None:
    spec: dict[str, Json] = {"op": "histogram", "field": "x", "bins": [0, 1, 10]}
    found = one(spec, outcomes([0, 1, 10, 11]))
    assert [row["count"] for row in found["bins"]] == [1, 2]
    assert found["over"] == 1


def test_histogram_refuses_too_many_values_in_lift_and_in_combine() -> None:
    stage = build_aggregators([{"op": "histogram", "field": "x"}])
    with pytest.raises(ConfigurationError, match=r"'x' met more than 1,000.*enum"):
        stage.lift(outcomes(list(range(1_001))))
    half = stage.lift(outcomes(list(range(1_000))))
    with pytest.raises(ConfigurationError, match="1,000"):
        combine_states(half, stage.lift(outcomes(["another"])))


def test_a_full_histogram_with_bins_is_no_error() -> None:
    spec: dict[str, Json] = {"op": "histogram", "field": "x", "bins": 1_000, "low": 0, "high": 1}
    found = one(spec, outcomes([-1, 2, *((i + 0.5) / 1_000 for i in range(1_000))]))
    assert {row["count"] for row in found["bins"]} == {1}


def test_top_k() -> None:
    items = [
        Outcome(i, f"i{i}", "done", {"a": {"b": v}}, None, {"s": "C" * i, "t": 1})
        for i, v in enumerate([1, 5, 5.0, None, True, "9", float("nan"), 3])
    ]
    spec: dict[str, Json] = {"op": "top_k", "field": "a.b", "k": 3, "show": ["s", "absent"]}
    found = one(spec, items)
    assert [row["id"] for row in found["rows"]] == ["i1", "i2", "i7"]
    assert found["rows"][0] == {
        "rank": 1,
        "id": "i1",
        "value": 5,
        "output": {"a": {"b": 5}},
        "show": {"s": "C", "absent": None},
    }
    assert found["missing"] == 4
    smallest = one(spec | {"order": "smallest", "k": 9}, items)
    assert [row["id"] for row in smallest["rows"]] == ["i0", "i7", "i1", "i2"]


def test_top_k_compares_large_integers_exactly() -> None:
    spec: dict[str, Json] = {"op": "top_k", "field": "x", "k": 1}
    assert one(spec, outcomes([2**62, 2**62 + 1]))["rows"][0]["id"] == "i1"


def test_top_k_cuts_long_texts_in_show_columns_only() -> None:
    long = "é" * 2_001
    item = Outcome(0, "a", "done", {"x": 1, "why": long}, None, {"s": long, "n": [long]})
    row = one({"op": "top_k", "field": "x", "show": ["s", "n"]}, [item])["rows"][0]
    assert row["show"] == {"s": "é" * 1_999 + "…", "n": ["é" * 1_999 + "…"]}
    assert row["output"]["why"] == long


def test_collect() -> None:
    items = [*outcomes([7, 8, 9])[::-1], failed(3, "BackendError")]
    found = one({"op": "collect", "limit": 2}, items)
    assert found["rows"] == [{"id": "i0", "output": {"x": 7}}, {"id": "i1", "output": {"x": 8}}]
    found = one({"op": "collect", "limit": 2, "field": "x"}, items)
    assert found["rows"] == [{"id": "i0", "value": 7}, {"id": "i1", "value": 8}]
    assert one({"op": "collect", "field": "y"}, items)["rows"][0]["value"] is None


def parts(*lists: Json) -> list[Outcome]:
    return [
        Outcome(i, f"i{i}", "done", {"x": [{"v": v} for v in one]}) for i, one in enumerate(lists)
    ]


def test_values_in_the_elements_of_a_list() -> None:
    items = [*parts([1, 2], [], [None, "a"], [3]), Outcome(4, "i4", "done", {"x": None})]
    found = one({"op": "stats", "field": "x[].v"}, items)
    assert (found["count"], found["items"], found["missing"]) == (3, 2, 3)
    assert found["mean"] == 2
    found = one({"op": "histogram", "field": "x[].v"}, items)
    assert {row["value"]: row["count"] for row in found["counts"]} == {1: 1, 2: 1, 3: 1, "a": 1}
    assert (found["items"], found["missing"]) == (3, 2)
    found = one({"op": "collect", "field": "x[].v", "limit": 3}, items)
    assert [row["value"] for row in found["rows"]] == [[1, 2], [], [None, "a"]]


def test_top_k_ranks_each_element_of_a_list() -> None:
    stage = build_aggregators([{"op": "top_k", "field": "x[].v", "k": 3}])
    items = parts([1, 5, 5], [5, None], [0])
    whole = stage.present(stage.lift(items))[0]
    assert [(row["id"], row["value"]) for row in whole["rows"]] == [("i0", 5), ("i0", 5), ("i1", 5)]
    assert (whole["items"], whole["missing"]) == (3, 0)
    states = [stage.lift([item]) for item in reversed(items)]
    assert stage.present(reduce(combine_states, states))[0] == whole


def test_categories_that_do_not_occur_are_shown() -> None:
    spec: dict[str, Json] = {"op": "histogram", "field": "x", "categories": ["c", "b", 1, True]}
    found = one(spec, outcomes(["b", "z", 1.0]))
    counts = {(type(row["value"]), row["value"]): row["count"] for row in found["counts"]}
    assert counts == {(str, "c"): 0, (str, "b"): 1, (int, 1): 1, (bool, True): 0, (str, "z"): 1}
    assert [row["count"] for row in found["counts"]] == [1, 1, 1, 0, 0]


def test_categories_are_no_part_of_states() -> None:
    plain, shown = ({"op": "histogram", "field": "x", "categories": c} for c in ([], ["a"]))
    assert build_aggregators([plain]).empty() == build_aggregators([shown]).empty()


def grouped(spec: dict[str, Json], items: list[Outcome]) -> dict[Json, Any]:
    found = one(spec, items)
    return {group.pop("group"): group for group in found["groups"]} | {"others": found["others"]}


def test_a_result_for_each_group() -> None:
    items = [
        Outcome(i, f"i{i}", "done", {"x": i, "g": g}, None, {"c": i % 2})
        for i, g in enumerate(["b", "a", "b", None, ["a"]])
    ]
    items.append(failed(5, "BackendError"))
    found = one({"op": "stats", "field": "x", "group_by": "g", "groups": ["a", "c"]}, items)
    assert (found["op"], found["field"], found["group_by"]) == ("stats", "x", "g")
    shown = [(group["group"], group["size"], group["mean"]) for group in found["groups"]]
    assert shown == [("b", 2, 1), ("a", 1, 1), ("c", 0, None), (None, 3, 3.5)]
    assert found["others"] == 0
    by_column = grouped({"op": "count", "group_by": "input.c"}, items)
    assert (by_column[0]["done"], by_column[1]["done"]) == (3, 2)
    assert by_column[None]["failed_by_class"] == {"BackendError": 1}
    top = grouped({"op": "top_k", "field": "x", "k": 1, "group_by": "g"}, items)
    assert [row["id"] for row in top["b"]["rows"]] == ["i2"]


def test_the_largest_groups_are_shown_in_any_order() -> None:
    stage = build_aggregators([{"op": "count", "group_by": "x", "max_groups": 3}])
    values: list[Json] = ["b", 10, 9, None, "a", True, 9.0, "b", 10, None, "b", "c"]
    states = [stage.lift([item]) for item in outcomes(values)]
    found = stage.present(reduce(combine_states, states))[0]
    assert found == stage.present(reduce(combine_states, states[::-1]))[0]
    assert found == stage.present(stage.lift(outcomes(values)))[0]
    sizes = [(group["group"], group["size"]) for group in found["groups"]]
    assert sizes == [("b", 3), (9, 2), (10, 2), (None, 2)]
    assert (found["others"], found["other_groups"]) == (3, 3)


def test_the_largest_groups_are_found_among_thousands_however_late_they_come() -> None:
    """The last name has most items, and most of them arrive when others fill the state."""
    stage = build_aggregators([{"op": "stats", "field": "y", "group_by": "x", "max_groups": 2}])
    names = [f"n{n:04}" for n in range(FOLLOWED_GROUPS)]
    answers = [{"x": name, "y": 1} for name in [names[-1], *names, *[names[-1]] * 5, names[7]]]
    items = [Outcome(n, f"i{n}", "done", one) for n, one in enumerate(answers)]
    shards = [stage.lift(items[at : at + 500]) for at in range(0, len(items), 500)]
    (found,) = stage.present(reduce(combine_states, shards))
    sizes = [(group["group"], group["size"], group["count"]) for group in found["groups"]]
    assert sizes == [(names[-1], 7, 7), (names[7], 2, 2)]
    assert (found["others"], found["other_groups"]) == (FOLLOWED_GROUPS - 2,) * 2

    more = stage.lift([Outcome(0, "z", "done", {"x": "z", "y": 2})])
    (found,) = stage.present(reduce(combine_states, [*shards, more]))
    assert [group["group"] for group in found["groups"]] == [names[-1], names[7]]
    assert (found["others"], found["other_groups"]) == (FOLLOWED_GROUPS - 1, None)


def test_groups_of_numbers_rise_with_null_last() -> None:
    found = one({"op": "count", "group_by": "x"}, outcomes([10, None, None, None, 9, 10]))
    assert [group["group"] for group in found["groups"]] == [9, 10, None]


def test_an_item_is_in_the_group_of_each_of_its_elements() -> None:
    items = [
        Outcome(
            0, "i0", "done", {"x": [{"k": "a", "v": 1}, {"k": "b", "v": 5}, {"k": "a", "v": 3}]}
        ),
        Outcome(1, "i1", "done", {"x": [{"k": "b", "v": 7}, {"v": 9}]}),
        Outcome(2, "i2", "done", {"x": []}),
    ]
    found = grouped({"op": "stats", "field": "x[].v", "group_by": "x[].k"}, items)
    shown = {
        name: (g["size"], g["count"], g["mean"]) for name, g in found.items() if name != "others"
    }
    assert shown == {"a": (1, 2, 2), "b": (2, 2, 6), None: (2, 1, 9)}
    top = grouped({"op": "top_k", "field": "x[].v", "group_by": "x[].k", "k": 1}, items)
    assert top["a"]["rows"][0]["output"] == {"x": [{"k": "a", "v": 1}, {"k": "a", "v": 3}]}


def test_ids_of_more_than_64_bits_are_groups_of_their_own() -> None:
    found = one({"op": "count", "group_by": "x"}, outcomes([2**63 + 1, 2**63, -(2**63), 2**63]))
    sizes = {group["group"]: group["size"] for group in found["groups"]}
    assert sizes == {"0x8000000000000000": 2, "0x8000000000000001": 1, -(2**63): 1}
    counts = one({"op": "histogram", "field": "x"}, outcomes([2**63 + 1, 2**63, 2**63]))["counts"]
    assert [entry["count"] for entry in counts] == [2, 1]


def test_long_names_of_groups_are_cut() -> None:
    found = grouped({"op": "count", "group_by": "x"}, outcomes(["é" * 300 + "a", "é" * 300 + "b"]))
    assert found["é" * 199 + "…"]["size"] == 2


def test_odd_outputs_are_made_writable() -> None:
    deep: Json = 1
    for _ in range(2_000):
        deep = [deep]
    odd = {"nan": float("nan"), "big": 2**70, "half": "\ud800", "\udfff": (1, True), "deep": deep}
    found = one({"op": "collect"}, [Outcome(0, "\ud800", "done", odd)])
    orjson.dumps(found)
    row = found["rows"][0]
    assert row["id"] == "?"
    assert (row["output"]["nan"], row["output"]["big"]) == (None, hex(2**70))
    assert (row["output"]["half"], row["output"]["?"]) == ("?", [1, True])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"op": "median"},
            "unknown op 'median'; the ops are agreement, collect, count, histogram, stats",
        ),
        ({}, "unknown op None"),
        ({"op": ["stats"]}, "unknown op"),
        ({"op": "stats"}, "stats needs 'field'"),
        ({"op": "stats", "field": "x", "bins": 3}, "stats has no parameter 'bins'"),
        ({"op": "count", "field": "x"}, "its parameters: none"),
        ({"op": "stats", "field": "x", "quantiles": [5]}, "numbers from 0 to 1"),
        ({"op": "top_k", "field": "x", "k": 0}, "top_k.k is 0; it must be at least 1"),
        ({"op": "top_k", "field": "x", "order": "best"}, "largest or smallest"),
        ({"op": "collect", "limit": 0}, "at least 1"),
        ({"op": "histogram", "field": "x", "bins": 3}, "histogram.low is None"),
        ({"op": "histogram", "field": "x", "bins": 3, "low": 0}, "histogram.high is None"),
        ({"op": "histogram", "field": "x", "bins": 3, "low": 1, "high": 1}, "above low"),
        ({"op": "histogram", "field": "x", "bins": 0, "low": 0, "high": 1}, "from 1 to 1,000"),
        ({"op": "histogram", "field": "x", "bins": True, "low": 0, "high": 1}, "from 1 to"),
        ({"op": "histogram", "field": "x", "low": 0}, "a number of bins"),
        ({"op": "histogram", "field": "x", "bins": [1]}, "rising, finite edges"),
        ({"op": "histogram", "field": "x", "bins": [1, 1]}, "rising"),
        ({"op": "histogram", "field": "x", "bins": [1, float("inf")]}, "finite"),
    ],
)
def test_wrong_parameters(spec: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_aggregators([spec])
