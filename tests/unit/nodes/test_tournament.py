"""The best k of many items by listwise comparisons."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.nodes.operators.tournament import Group, Standing, Tournament


class NoisyJudge:
    """Orders items by scores with noise, an advantage for the first places, and failures."""

    def __init__(
        self, count: int, seed: int, noise: float = 0.0, bias: float = 0.0, failures: float = 0.0
    ) -> None:
        """Draw the scores."""
        self._random = random.Random(seed)
        self.scores = [self._random.gauss(0, 1) for _ in range(count)]
        self._noise, self._bias, self._failures = noise, bias, failures
        self.rounds: list[list[Group]] = []

    @property
    def order(self) -> list[int]:
        """Return the items, best first."""
        return sorted(range(len(self.scores)), key=lambda item: -self.scores[item])

    async def __call__(self, groups: Sequence[Group]) -> list[list[int] | None]:
        """Order each group."""
        self.rounds.append(list(groups))
        orders: list[list[int] | None] = []
        for group in groups:
            if self._random.random() < self._failures:
                orders.append(None)
                continue
            seen = {
                item: self.scores[item] + self._random.gauss(0, self._noise) - self._bias * place
                for place, item in enumerate(group)
            }
            orders.append(sorted(group, key=lambda item: -seen[item]))
        return orders


def recall(standing: Standing, judge: NoisyJudge, k: int) -> float:
    """Return the share of the true best k that were found."""
    return len({placed.item for placed in standing.best} & set(judge.order[:k])) / k


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 160),
    k=st.integers(1, 30),
    group=st.integers(2, 12),
    seed=st.integers(0, 10_000),
)
async def test_a_judge_without_noise_gives_the_best_in_order(
    count: int, k: int, group: int, seed: int
) -> None:
    judge = NoisyJudge(count, seed)
    standing = await Tournament(count, judge, k=k, group=group, seed=seed).run()
    assert [placed.item for placed in standing.best] == judge.order[:k]
    assert [placed.rank for placed in standing.best] == list(range(1, min(k, count) + 1))
    assert standing.settled
    assert standing.contradictions == standing.failed == 0
    assert standing.calls == sum(len(groups) for groups in judge.rounds)
    for groups in judge.rounds:
        members = [item for shown in groups for item in shown]
        assert all(len(set(shown)) == len(shown) <= max(group, 2) for shown in groups)
        assert set(members) <= set(range(count))


async def test_most_items_are_compared_once() -> None:
    judge = NoisyJudge(1000, seed=5)
    standing = await Tournament(1000, judge, k=20, seed=5).run()
    assert [placed.item for placed in standing.best] == judge.order[:20]
    assert standing.calls < 250
    assert standing.rounds < 25


async def test_noise_costs_as_much_recall_as_one_score_for_each_item() -> None:
    listwise, pointwise, calls = [], [], []
    for seed in range(6):
        judge = NoisyJudge(400, seed, noise=0.3)
        standing = await Tournament(400, judge, k=10, seed=seed).run()
        listwise.append(recall(standing, judge, 10))
        calls.append(standing.calls)
        scores = random.Random(seed + 1000)
        noisy = sorted(range(400), key=lambda i: -judge.scores[i] - scores.gauss(0, 0.3))
        pointwise.append(len(set(noisy[:10]) & set(judge.order[:10])) / 10)
        assert len({placed.item for placed in standing.best}) == 10
    assert mean(listwise) > mean(pointwise) - 0.15
    assert max(calls) < 200


async def test_repetitions_raise_the_recall_of_a_noisy_judge() -> None:
    found = {}
    for repeats in (1, 6):
        shares = []
        for seed in range(6):
            judge = NoisyJudge(200, seed, noise=0.6)
            standing = await Tournament(200, judge, k=10, repeats=repeats, seed=seed).run()
            shares.append(recall(standing, judge, 10))
        found[repeats] = mean(shares)
    assert found[6] > found[1]


async def test_a_judge_that_contradicts_itself_gives_ties() -> None:
    judge = NoisyJudge(40, seed=2, noise=100.0)
    standing = await Tournament(40, judge, k=10, repeats=4, seed=2).run()
    ranks = [placed.rank for placed in standing.best]
    assert any(placed.tied for placed in standing.best)
    assert ranks == sorted(ranks)
    for placed in standing.best:
        assert ranks.count(placed.rank) <= placed.tied + 1
        assert placed.rank == 1 + sum(rank < placed.rank for rank in ranks)
    assert standing.settled


async def test_the_order_of_presentation_does_not_decide() -> None:
    async def first_place(groups: Sequence[Group]) -> list[list[int]]:
        """Prefer whatever is shown first."""
        return [list(group) for group in groups]

    wins = [0] * 30
    for seed in range(120):
        standing = await Tournament(30, first_place, k=3, seed=seed).run()
        for placed in standing.best:
            wins[placed.item] += 1
    assert min(wins) > 0
    assert max(wins) < 4 * mean(wins)


async def test_failed_groups_are_asked_in_other_groups() -> None:
    judge = NoisyJudge(120, seed=3, failures=0.3)
    standing = await Tournament(120, judge, k=5, seed=3).run()
    assert [placed.item for placed in standing.best] == judge.order[:5]
    assert standing.failed > 0


async def test_a_judge_that_always_fails_ends_the_search() -> None:
    judge = NoisyJudge(100, seed=1, failures=1.0)
    standing = await Tournament(100, judge, k=5).run()
    assert not standing.settled
    assert len(standing.best) == 5
    assert standing.comparisons == 0


async def test_the_same_answers_lead_to_the_same_questions() -> None:
    rounds = []
    for _ in range(2):
        judge = NoisyJudge(300, seed=9)
        await Tournament(300, judge, k=10, seed=4, repeats=2).run()
        rounds.append(judge.rounds)
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("order", [[0, 0], [0, 99]])
async def test_an_order_cannot_add_items(order: list[int]) -> None:
    async def judge(groups: Sequence[Group]) -> list[list[int]]:
        return [order for _ in groups]

    with pytest.raises(ValueError, match="items"):
        await Tournament(4, judge, k=1).run()


@pytest.mark.long
async def test_two_hundred_runs_without_noise_are_right() -> None:
    for seed in range(200):
        judge = NoisyJudge(1000, seed)
        standing = await Tournament(1000, judge, k=20, seed=seed).run()
        assert [placed.item for placed in standing.best] == judge.order[:20]
