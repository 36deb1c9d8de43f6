"""The items that a small model may answer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import pytest
from BARGAIN import BARGAIN_A, Oracle, Proxy
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.nodes.operators.threshold import Allocation, BettingTest, allocate

KINDS: dict[str, Callable[[float], float]] = {
    "calibrated": lambda certainty: 0.5 + 0.5 * certainty,
    "certain": lambda certainty: min(1.0, 0.8 + 0.4 * certainty),
    "below the target": lambda _: 0.93,
    "just below the target": lambda _: 0.949,
    "good": lambda _: 0.99,
    "half good": lambda certainty: 1.0 if certainty > 0.5 else 0.6,
}
"""Probability that the small model is right, by its certainty."""


def draw(kind: str, count: int, seed: int) -> tuple[list[float], list[bool]]:
    """Return certainties, and whether the small model agrees with the large one."""
    chance = random.Random(seed)
    certainties = [chance.random() for _ in range(count)]
    return certainties, [chance.random() < KINDS[kind](certainty) for certainty in certainties]


async def split(
    certainties: Sequence[float], agrees: Sequence[bool | None], target: float, **settings: Any
) -> tuple[Allocation, list[list[int]]]:
    """Allocate items; return the allocation and the rounds of the sample."""
    rounds: list[list[int]] = []

    async def ask(items: Sequence[int]) -> list[bool | None]:
        rounds.append(list(items))
        return [agrees[item] for item in items]

    chosen = {"delta": 0.1, "round_size": 32} | settings
    return await allocate(certainties, ask, target=target, **chosen), rounds


def agreement(allocation: Allocation, agrees: Sequence[bool | None]) -> float:
    """Return the share of all items whose final answer is the large model's."""
    return 1 - sum(not agrees[item] for item in allocation.small) / len(agrees)


@settings(max_examples=100, deadline=None)
@given(
    agrees=st.lists(st.one_of(st.booleans(), st.none()), min_size=1, max_size=150),
    target=st.floats(0.05, 1.0),
    round_size=st.integers(1, 40),
    seed=st.integers(0, 100),
)
async def test_each_item_has_one_model_and_is_sampled_once(
    agrees: list[bool | None], target: float, round_size: int, seed: int
) -> None:
    chance = random.Random(seed)
    certainties = [chance.choice([chance.random(), 0.5, -math.inf]) for _ in agrees]
    found, rounds = await split(certainties, agrees, target, round_size=round_size, seed=seed)
    assert sorted(found.small + found.large) == list(range(len(agrees)))
    asked = [item for items in rounds for item in items]
    assert sorted(asked) == list(found.sampled)
    assert len(set(asked)) == len(asked)
    assert set(found.sampled) <= set(found.large)
    assert all(1 <= len(items) <= round_size for items in rounds)
    assert all(certainties[item] > -math.inf for item in found.small)
    assert found.agreeing == sum(bool(agrees[item]) for item in asked)
    if found.certainty is not None:
        assert min(certainties[item] for item in found.small) >= found.certainty


@pytest.mark.parametrize("delta", [0.1, 0.05])
@pytest.mark.parametrize("kind", list(KINDS))
async def test_the_target_is_rarely_missed(kind: str, delta: float) -> None:
    misses = 0
    for seed in range(40):
        certainties, agrees = draw(kind, 400, seed)
        found, _ = await split(certainties, agrees, 0.95, delta=delta, seed=seed)
        misses += agreement(found, agrees) < 0.95 - 1e-9
    assert misses <= 40 * delta * 1.5


@pytest.mark.long
@pytest.mark.parametrize(("delta", "most"), [(0.1, 30), (0.05, 18)])
@pytest.mark.parametrize("kind", list(KINDS))
async def test_misses_in_two_hundred_data_sets(kind: str, delta: float, most: int) -> None:
    misses = 0
    for seed in range(200):
        certainties, agrees = draw(kind, 2000, seed)
        found, _ = await split(certainties, agrees, 0.95, delta=delta, round_size=64, seed=seed)
        misses += agreement(found, agrees) < 0.95 - 1e-9
    assert misses <= most


@pytest.mark.parametrize("kind", ["calibrated", "certain", "good", "half good"])
async def test_the_small_model_answers_about_as_much_as_in_the_reference(kind: str) -> None:
    ours, reference = [], []
    for seed in range(5):
        certainties, agrees = draw(kind, 1000, seed)
        found, _ = await split(certainties, agrees, 0.95, seed=seed)
        ours.append(len(found.small) / 1000)
        reference.append(_reference_share(certainties, agrees, seed))
    assert mean(ours) > 0.7 * mean(reference)


def _reference_share(certainties: list[float], agrees: list[bool], seed: int) -> float:
    class Small(Proxy):  # type: ignore[misc]
        def proxy_func(self, record: str) -> tuple[bool, float]:
            return True, certainties[int(record)]

    class Large(Oracle):  # type: ignore[misc]
        def oracle_func(self, record: str, _: Any) -> tuple[bool, bool]:
            return agrees[int(record)], agrees[int(record)]

    method = BARGAIN_A(
        Small(verbose=False, max_workers=1),
        Large(verbose=False, max_workers=1),
        target=0.95,
        delta=0.1,
        verbose=False,
        seed=seed,
    )
    names = [str(item) for item in range(len(agrees))]
    _, large = method.process(names, return_oracle_usage=True)
    return 1 - float(sum(large)) / len(agrees)


async def test_a_small_model_that_is_always_right_answers_nearly_all() -> None:
    found, rounds = await split([0.5] * 5000, [True] * 5000, 0.95)
    assert len(found.small) > 4500
    assert len(rounds) < 8


async def test_failures_of_the_large_model_count_against_the_small_one() -> None:
    found, _ = await split([0.5] * 1000, [None] * 1000, 0.95)
    assert len(found.small) <= 50


async def test_full_agreement_leaves_only_what_was_never_in_doubt() -> None:
    found, _ = await split([0.5] * 200, [True] * 200, 1.0)
    assert found.small == ()


async def test_the_same_seed_samples_the_same_items() -> None:
    certainties, agrees = draw("calibrated", 500, 1)
    first, rounds = await split(certainties, agrees, 0.9, seed=7)
    again, same = await split(certainties, agrees, 0.9, seed=7)
    assert (first, rounds) == (again, same)


def test_a_wrong_bound_is_seldom_reached() -> None:
    wrong = 0
    for seed in range(400):
        values = [True] * 940 + [False] * 60
        random.Random(seed).shuffle(values)
        test = BettingTest(1000, 0.945, delta=0.1)
        for value in values:
            test.add(value)
        wrong += test.reached
    assert wrong <= 40


def test_a_bound_that_holds_is_reached_at_the_latest_by_all_values() -> None:
    for good in (95, 96, 100):
        values = [True] * good + [False] * (100 - good)
        random.Random(good).shuffle(values)
        test = BettingTest(100, 0.95, delta=0.01)
        for value in values:
            test.add(value)
        assert test.reached
