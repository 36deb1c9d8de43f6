"""Figures against scikit-learn, krippendorff and SciPy: three data sets, and drawn ones."""

from __future__ import annotations

import math
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from fanfold.graphs.run.statistics import (
    Figure,
    LabelPairs,
    agree_on_labels,
    compare_labels,
    compare_numbers,
    correlate_ranks,
    f1_scores,
    mcnemar,
    mean_difference,
    share,
)


def make_labels(kind: str) -> tuple[Any, Any, int]:
    """Return gold labels and answers, as numbers, and how many labels there are."""
    draw = np.random.default_rng(7)
    if kind == "balanced":
        gold = draw.integers(0, 3, 400)
        return gold, np.where(draw.random(400) < 0.7, gold, draw.integers(0, 3, 400)), 3
    gold = draw.choice(6, 900, p=[0.7, 0.15, 0.1, 0.03, 0.015, 0.005])
    answers = np.where(draw.random(900) < 0.8, gold, 0)
    answers[gold == 4] = 1  # a label that is never answered
    return gold, answers, 6


def make_numbers() -> tuple[Any, Any]:
    """Return numbers with ties and outliers, and disturbed ones."""
    draw = np.random.default_rng(11)
    gold = draw.normal(-3, 2, 250).round(1)
    answers = (gold + draw.standard_t(3, 250) * 0.7).round(1)
    return gold, answers


def value_of(figure: Figure) -> float:
    assert figure.value is not None
    return figure.value


@pytest.mark.parametrize("kind", ["balanced", "rare labels"])
def test_labels_as_the_references(kind: str) -> None:
    gold, answers, size = make_labels(kind)
    found = compare_labels(LabelPairs.count(gold, answers, size))
    expected = {
        "accuracy": metrics.accuracy_score(gold, answers),
        "kappa": metrics.cohen_kappa_score(gold, answers),
        "alpha": krippendorff.alpha([gold, answers], level_of_measurement="nominal"),
    }
    for average in ("macro", "weighted"):
        names = [f"{name}_{average}" for name in ("precision", "recall", "f1")]
        values = metrics.precision_recall_fscore_support(
            gold, answers, average=average, zero_division=0
        )
        expected |= dict(zip(names, values, strict=False))
    assert {name: value_of(figure) for name, figure in found.items()} == pytest.approx(expected)
    assert all(figure.n == len(gold) for figure in found.values())


@pytest.mark.parametrize("kind", ["balanced", "rare labels"])
def test_classes_as_the_references(kind: str) -> None:
    gold, answers, size = make_labels(kind)
    pairs = LabelPairs.count(gold, answers, size)
    hits, first, second = pairs.sums()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        gold, answers, labels=range(size), zero_division=0
    )
    assert pairs.matrix().tolist() == metrics.confusion_matrix(gold, answers).tolist()
    assert first.tolist() == support.tolist()
    assert [share(h, n).value or 0 for h, n in zip(hits, second, strict=True)] == pytest.approx(
        precision
    )
    assert [share(h, n).value or 0 for h, n in zip(hits, first, strict=True)] == pytest.approx(
        recall
    )
    assert [figure.value for figure in f1_scores(pairs)] == pytest.approx(f1)


def test_numbers_as_the_references() -> None:
    gold, answers = make_numbers()
    found = compare_numbers(gold, answers)
    assert {name: value_of(figure) for name, figure in found.items()} == pytest.approx(
        {
            "mae": metrics.mean_absolute_error(gold, answers),
            "rmse": metrics.mean_squared_error(gold, answers) ** 0.5,
            "alpha": krippendorff.alpha([gold, answers], level_of_measurement="interval"),
            "spearman": stats.spearmanr(gold, answers)[0],
        }
    )


labels = st.integers(0, 4)
numbers = st.integers(-50, 50).map(lambda n: n / 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(labels, labels), min_size=2, max_size=40))
def test_drawn_labels(pairs: list[tuple[int, int]]) -> None:
    gold, answers = (np.array(one) for one in zip(*pairs, strict=True))
    assume(len({*gold, *answers}) > 1)
    found = compare_labels(LabelPairs.count(gold, answers, 5))
    macro = metrics.f1_score(gold, answers, average="macro", zero_division=0)
    assert value_of(found["f1_macro"]) == pytest.approx(macro)
    alpha = krippendorff.alpha([gold, answers], level_of_measurement="nominal")
    assert value_of(found["alpha"]) == pytest.approx(alpha)
    kappa = metrics.cohen_kappa_score(gold, answers)
    assert value_of(found["kappa"]) == pytest.approx(kappa)
    assert found["accuracy"] == share(sum(a == b for a, b in pairs), len(pairs))
    for figure in found.values():
        assert figure.value is not None
        if figure.low is not None and figure.high is not None:
            assert figure.low <= figure.high


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=30))
def test_drawn_numbers(pairs: list[tuple[float, float]]) -> None:
    gold, answers = (np.array(one) for one in zip(*pairs, strict=True))
    assume(len(set(gold)) > 1 and len(set(answers)) > 1)
    found = compare_numbers(gold, answers)
    assert value_of(found["spearman"]) == pytest.approx(stats.spearmanr(gold, answers)[0])
    alpha = krippendorff.alpha([gold, answers], level_of_measurement="interval")
    assert value_of(found["alpha"]) == pytest.approx(alpha)
    assert value_of(found["mae"]) == pytest.approx(metrics.mean_absolute_error(gold, answers))


@pytest.mark.parametrize(("count", "n"), [(0, 5), (5, 5), (1, 3), (480, 500), (1, 100_000)])
def test_wilson(count: int, n: int) -> None:
    found = share(count, n)
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("n", [300, 5_000])
def test_bootstrap_as_the_reference(n: int) -> None:
    """Above 2,000 items, groups of items are drawn; the intervals stay those of items."""
    draw = np.random.default_rng(3)
    gold = draw.normal(size=n)
    answers = gold + draw.exponential(0.5, n)
    found = compare_numbers(gold, answers)["mae"]
    expected = stats.bootstrap(
        (np.abs(gold - answers),),
        np.mean,
        n_resamples=2_000,
        batch=200,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low is not None
    assert found.high is not None
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_intervals_of_labels_contain_the_truth() -> None:
    """Of 200 samples from a known population, about 95 % of the intervals contain its kappa."""
    draw = np.random.default_rng(5)
    cells = np.array([[0.4, 0.1], [0.1, 0.4]])
    truth, hits = 0.6, 0
    for counts in draw.multinomial(150, cells.ravel(), size=200):
        rows, columns = np.divmod(np.arange(4), 2)
        figure = agree_on_labels(LabelPairs(2, rows, columns, counts))["kappa"]
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= truth <= figure.high
    assert 0.9 <= hits / 200 <= 0.99


def test_figures_are_repeatable() -> None:
    gold, answers, size = make_labels("balanced")
    pairs = LabelPairs.count(gold, answers, size)
    assert compare_labels(pairs) == compare_labels(pairs)
    assert compare_numbers(*make_numbers()) == compare_numbers(*make_numbers())


def test_nothing_to_compare() -> None:
    empty = np.array([], np.int64)
    found = compare_labels(LabelPairs.count(empty, empty, 0))
    found |= compare_numbers(np.array([]), np.array([]))
    assert len(found) == 12
    for figure in found.values():
        assert (figure.value, figure.low, figure.high, figure.n) == (None, None, None, 0)
    assert f1_scores(LabelPairs.count(empty, empty, 2))[1].value is None


def test_what_is_not_defined_has_no_value() -> None:
    """One label only: chance agrees always. One number only: there are no ranks."""
    same = np.zeros(9, np.int64)
    found = compare_labels(LabelPairs.count(same, same, 1))
    assert (found["accuracy"].value, found["kappa"].value, found["alpha"].value) == (1, None, None)
    numbers_found = compare_numbers(np.ones(9), np.arange(9.0))
    assert numbers_found["spearman"].value is None
    alone = compare_numbers(np.array([1.0]), np.array([3.0]))
    assert (alone["mae"].value, alone["mae"].low, alone["spearman"].value) == (2, None, None)
    assert compare_numbers(np.ones(5), np.ones(5))["alpha"].value is None


def test_large_numbers_do_not_break_figures() -> None:
    found = compare_numbers(np.array([1e300, -1e300, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert found["rmse"].value is None
    assert found["spearman"].value is not None
    assert math.isfinite(found["spearman"].value)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (10, 10), (5_000, 5_300)])
def test_mcnemar(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    expected = stats.binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected)


def test_a_paired_difference() -> None:
    draw = np.random.default_rng(2)
    first = draw.random(500)
    second = first - 0.1 + draw.normal(0, 0.1, 500)
    found = mean_difference(first, second)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.1 < found.high
    t = stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.002)


def test_perfect_ranks() -> None:
    found = correlate_ranks(np.arange(10.0), np.arange(10.0) ** 3)
    assert (found.value, found.low, found.high) == (1, 1, 1)
