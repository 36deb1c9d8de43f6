"""The search of ``rank`` against scores of single items and comparisons of pairs, in process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

from fanfold.nodes.operators.tournament import Group, Tournament

_COUNT, _BEST = 1000, 20


def measure(seeds: Sequence[int], exact: int = 200) -> None:
    """Print recall of the best 20 of 1,000 items and Kendall's tau of their order, against calls.

    True values are standard normal. The noise is the standard deviation of what the judge adds to
    each value that it sees, in each call anew.

    Args:
        seeds: Seeds of values and noise.
        exact: Runs of a judge without noise, whose best 20 are compared with the true ones.
    """
    asyncio.run(_measure(seeds, exact))


async def _measure(seeds: Sequence[int], exact: int) -> None:
    print(f"{'method':28} {'noise':>5} {'calls':>6} {'recall':>7} {'tau':>6}")
    for noise in (0.1, 0.3, 0.6):
        for name, group, repeats in (
            ("groups of 10", 10, 1),
            ("groups of 10, repeats: 3", 10, 3),
            ("pairs", 2, 1),
        ):
            found = [await _search(seed, noise, group, repeats) for seed in seeds]
            _print(name, noise, found)
        for scores in (1, 3):
            _print(f"scores, {scores} an item", noise, [_score(s, noise, scores) for s in seeds])
    right = 0
    for seed in range(exact):
        recall, tau, _ = await _search(seed, 0.0, 10, 1)
        right += recall == 1.0 and tau == 1.0
    print(f"without noise: {right} of {exact} runs have the true best {_BEST} in their order")


def _print(name: str, noise: float, found: Sequence[tuple[float, float, int]]) -> None:
    recall, tau, calls = (mean(one) for one in zip(*found, strict=True))
    print(f"{name:28} {noise:5.1f} {calls:6,.0f} {recall:7.2f} {tau:6.2f}", flush=True)


async def _search(seed: int, noise: float, group: int, repeats: int) -> tuple[float, float, int]:
    values, chance = _draw(seed), random.Random(seed + 10_000)

    async def judge(groups: Sequence[Group]) -> list[list[int]]:
        orders = []
        for one in groups:
            seen = {item: values[item] + chance.gauss(0, noise) for item in one}
            orders.append(sorted(one, key=lambda item: -seen[item]))
        return orders

    search = Tournament(
        _COUNT, judge, k=_BEST, group=group, repeats=repeats, seed=seed, max_rounds=5000
    )
    standing = await search.run()
    return *_rate(values, [placed.item for placed in standing.best]), standing.calls


def _score(seed: int, noise: float, scores: int) -> tuple[float, float, int]:
    values, chance = _draw(seed), random.Random(seed + 10_000)
    seen = [mean(value + chance.gauss(0, noise) for _ in range(scores)) for value in values]
    best = sorted(range(_COUNT), key=lambda item: -seen[item])[:_BEST]
    return *_rate(values, best), scores * _COUNT


def _draw(seed: int) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(0, 1) for _ in range(_COUNT)]


def _rate(values: Sequence[float], best: Sequence[int]) -> tuple[float, float]:
    """Return the share of the true best that were found, and Kendall's tau of their order."""
    true = set(sorted(range(_COUNT), key=lambda item: -values[item])[:_BEST])
    signs = [1 if values[a] > values[b] else -1 for a, b in combinations(best, 2)]
    return len(true & set(best)) / _BEST, mean(signs)
