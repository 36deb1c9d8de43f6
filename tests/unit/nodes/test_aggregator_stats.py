from __future__ import annotations

import statistics
from fractions import Fraction
from functools import reduce
from math import floor, inf, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.types import Json, Outcome
from fanfold.nodes.aggregators import build_aggregators, combine_states
from fanfold.nodes.aggregators.numeric import ExactSum

finite = st.floats(allow_nan=False, allow_infinity=False)
QUANTILES = [0, 0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
STATS = build_aggregators([{"op": "stats", "field": "x", "quantiles": QUANTILES}])


def outcomes(values: list[Json]) -> list[Outcome]:
    return [Outcome(i, str(i), "done", {"x": value}) for i, value in enumerate(values)]


def stats(values: list[Json]) -> dict[str, Any]:
    return STATS.present(STATS.lift(outcomes(values)))[0]


@settings(deadline=None)
@given(st.lists(finite, min_size=1))
def test_the_mean_is_correctly_rounded(values: list[float]) -> None:
    assert stats(values)["mean"] == float(sum(map(Fraction, values)) / len(values))


@settings(deadline=None)
@given(st.lists(st.floats(-1e150, 1e150), min_size=2))
def test_the_sd_is_correctly_rounded(values: list[float]) -> None:
    # The standard library computes in fractions, and rounds the root once.
    assert stats(values)["sd"] == statistics.stdev(values)


def test_the_sd_does_not_cancel() -> None:
    assert stats([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16])["sd"] == statistics.stdev([4, 7, 13, 16])
    assert stats([0.1] * 10)["sd"] == 0.0


def test_an_sd_beyond_doubles_is_unknown() -> None:
    found = stats([1.7e308, -1.7e308])
    assert found["sd"] is None
    assert found["mean"] == 0.0


def within_one_percent(found: float, exact: float, largest: float) -> bool:
    return abs(found - exact) <= 0.01 * abs(exact) + largest * 2.0**-126 + 5e-324


@settings(deadline=None)
@given(st.lists(st.one_of(finite, st.floats(-10, 10), st.sampled_from([0.0, 1.0])), min_size=1))
def test_quantiles_are_within_one_percent(values: list[float]) -> None:
    ranked, largest = sorted(values), max(map(abs, values))
    found = stats(values)["quantiles"]
    for q in QUANTILES:
        exact = ranked[floor(q * (len(values) - 1))]
        assert within_one_percent(found[str(q)], exact, largest)
        assert ranked[0] <= found[str(q)] <= ranked[-1]


@settings(deadline=None)
@given(st.floats(1e-300, 1e300))
def test_the_error_of_a_bucket(value: float) -> None:
    found = stats([value / 2, value, value * 2])["quantiles"]["0.5"]
    assert abs(found - value) <= value / 129 * (1 + 1e-12)


def test_wide_data_stays_bounded_and_independent_of_order() -> None:
    values: list[Json] = [s * 1.05 ** (i - 14_000) for i in range(28_000) for s in (1, -1)]
    parts = [STATS.lift(outcomes(values[i : i + 5_000])) for i in range(0, 56_000, 5_000)]
    forward, backward = reduce(combine_states, parts), reduce(combine_states, parts[::-1])
    assert len(forward["stages"][0]["positive"]) <= 8_192
    assert len(forward["stages"][0]["negative"]) <= 8_192
    assert STATS.present(forward) == STATS.present(backward)
    ranked = sorted(values)
    found = STATS.present(forward)[0]["quantiles"]
    for q, largest in ((0.02, 0.0), (0.05, ranked[-1]), (0.5, ranked[-1]), (0.95, ranked[-1])):
        exact = ranked[floor(q * (len(ranked) - 1))]
        assert within_one_percent(found[str(q)], exact, largest)


@pytest.mark.parametrize("odd", [None, True, "3", nan, inf, -inf, [1], {"y": 1}, 10**400])
def test_what_is_no_finite_number_is_missing(odd: Json) -> None:
    found = stats([1, odd, 3.0])
    assert (found["count"], found["missing"], found["mean"], found["max"]) == (2, 1, 2.0, 3.0)


def test_failed_items_are_not_missing() -> None:
    state = STATS.lift([*outcomes([1, 2]), Outcome(2, "c", "failed", None, "BackendError")])
    assert STATS.present(state)[0]["missing"] == 0


def test_too_few_values() -> None:
    none = stats([])
    assert [none[name] for name in ("count", "mean", "sd", "min", "max")] == [0, None, None] + [
        None
    ] * 2
    assert set(none["quantiles"].values()) == {None}
    one = stats([2])
    assert (one["mean"], one["sd"], one["quantiles"]["0.5"]) == (2.0, None, 2.0)
    assert "within 1 %" in one["note"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**300), 2**300), st.integers(-50, 50)), max_size=5))
def test_exact_sums_are_written_the_same_whatever_their_parts(parts: list[tuple[int, int]]) -> None:
    numbers = [ExactSum(n, e) for n, e in parts]
    total = sum((Fraction(n) * Fraction(2) ** e for n, e in parts), Fraction())
    forward = reduce(ExactSum.__add__, numbers, ExactSum())
    backward = reduce(ExactSum.__add__, numbers[::-1], ExactSum())
    assert forward.to_json() == backward.to_json()
    again = ExactSum.from_json(forward.to_json())
    assert Fraction(again.n) * Fraction(2) ** again.e == total
