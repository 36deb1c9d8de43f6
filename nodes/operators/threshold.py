"""Find the items that a small model may answer, with a guarantee on the agreement of the whole.

The small model has answered all items, each with a certainty. The large model answers a sample, in
rounds, and the least certainty is lowered step by step while a test shows that the answers of the
whole still agree with the large model's in ``target`` of the items. The items below that certainty
go to the large model.

The statement "the answers agree with the large model's in at least ``target`` of the items" is
wrong with a probability of at most ``delta``: see BARGAIN (arXiv 2509.02896, section on accuracy
targets) for the order of the tests, and Waudby-Smith and Ramdas (arXiv 2010.09686, section 3.3 and
appendix on sampling without replacement) for the test itself. Steps are tested in a fixed order,
and the first that fails ends the search, so that several steps need no correction.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

AskLarge = Callable[[Sequence[int]], Awaitable[Sequence[bool | None]]]
"""Has the large model answer items; returns whether the small model's answer agrees with it.

None: the large model failed. That counts against the small model in the test.
"""

_TRUNCATION: Final = 0.75
"""Largest share of the wealth that one bet may lose; 3/4 as in the paper's experiments."""
_LEAST_LABELS: Final = 50
"""Labels of a step before its mean may end the search."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Which model answers which items.

    Attributes:
        small: Items that keep the small model's answer.
        large: The other items, those of the sample included.
        sampled: Items that the large model answered for the test.
        agreeing: Sampled items whose answers agree.
        certainty: The least certainty of the items in ``small``; None if there are none.
        steps: Steps that were tested or held without a test.
        target: The agreement that was asked for.
        delta: The probability with which it may be missed.
    """

    small: tuple[int, ...]
    large: tuple[int, ...]
    sampled: tuple[int, ...]
    agreeing: int
    certainty: float | None
    steps: int
    target: float
    delta: float


class BettingTest:
    """Tests whether a mean of values in {0, 1} reaches a bound, one value after the other.

    The values are drawn without replacement from a known number of them. A gambler who bets against
    "the mean is below the bound" multiplies a wealth of 1; if the statement is true, the wealth
    reaches ``1 / delta`` with a probability of at most ``delta``, however long the gambler plays.
    """

    def __init__(self, total: int, bound: float, delta: float) -> None:
        """Start a test.

        Args:
            total: Number of values that exist.
            bound: The mean to be reached.
            delta: Probability of a wrong "reached".
        """
        self._total = total
        self._bound = bound
        self._log_goal = math.log(1 / delta)
        self._log_wealth = 0.0
        self.seen = 0
        self._sum = 0
        self._squares = 0.25
        self.reached = bound <= 0

    def add(self, value: bool) -> None:
        """Bet on the next value."""
        # The mean of the values that are left if the mean of all is just the bound.
        left = (self._total * self._bound - self._sum) / (self._total - self.seen)
        if left <= 0:
            self.reached = True
        elif not self.reached:
            turn = self.seen + 1
            variance = self._squares / turn
            stake = math.sqrt(2 * self._log_goal / (variance * turn * math.log(turn + 1)))
            # Above 1, the values that are left cannot reach the bound: no bet is won any more.
            stake = min(stake, _TRUNCATION / left)
            self._log_wealth += math.log1p(stake * (value - left))
            self.reached = self._log_wealth >= self._log_goal
        self.seen += 1
        self._sum += value
        mean = (0.5 + self._sum) / (self.seen + 1)
        self._squares += (value - mean) ** 2
        if self.seen == self._total and self._sum >= self._total * self._bound - 1e-9:
            self.reached = True

    @property
    def mean(self) -> float:
        """Mean of the values seen; 1 before the first."""
        return self._sum / self.seen if self.seen else 1.0


async def allocate(  # noqa: PLR0913  (the settings of one cascade)
    certainties: Sequence[float],
    ask_large: AskLarge,
    *,
    target: float,
    delta: float,
    round_size: int,
    steps: int = 20,
    seed: int = 0,
) -> Allocation:
    """Decide which items keep the small model's answer.

    Args:
        certainties: Certainty of the small model's answer, by item; ``-inf`` for an item that it
            failed to answer, which always goes to the large model.
        ask_large: Has the large model answer items of the sample, once each.
        target: Share of all items whose answer must agree with the large model's.
        delta: Probability with which the share may be missed.
        round_size: Items of the sample that are asked at the same time.
        steps: Thresholds that are tried.
        seed: Decides which items are sampled.

    Returns:
        The items of each model, with the sample.
    """
    count = len(certainties)
    order = random.Random(seed).sample(range(count), count)
    turn = {item: place for place, item in enumerate(order)}
    answered = [item for item in range(count) if certainties[item] > -math.inf]
    answered.sort(key=lambda item: (-certainties[item], turn[item]))
    agrees: dict[int, bool] = {}
    accepted = tried = 0
    for end in sorted({max(1, round(len(answered) * n / steps)) for n in range(1, steps + 1)}):
        if end > len(answered):
            break
        tried += 1
        # Items of the large model agree; the small model's may miss the target by as much.
        bound = 1 - (1 - target) * count / end
        if not await _reaches(
            answered[:end], bound, delta, agrees, turn, ask_large, round_size, end - accepted
        ):
            break
        accepted = end
    small = [item for item in answered[:accepted] if item not in agrees]
    kept = set(small)
    return Allocation(
        small=tuple(sorted(small)),
        large=tuple(item for item in range(count) if item not in kept),
        sampled=tuple(sorted(agrees)),
        agreeing=sum(agrees.values()),
        certainty=certainties[answered[accepted - 1]] if small else None,
        steps=tried,
        target=target,
        delta=delta,
    )


async def _reaches(  # noqa: PLR0913, PLR0917
    items: Sequence[int],
    bound: float,
    delta: float,
    agrees: dict[int, bool],
    turn: dict[int, int],
    ask_large: AskLarge,
    round_size: int,
    gain: int,
) -> bool:
    """Return True if the agreement of the items is shown to reach the bound.

    The items are sampled in the order of ``turn``, which is a uniform order of any set of them; so
    labels of earlier steps serve again. More labels than the step can gain are not asked for.
    A round has no more labels than the test needs if all of them agree.
    """
    if bound <= 0:
        return True
    test = BettingTest(len(items), bound, delta)
    queue = sorted(items, key=turn.__getitem__)
    spent = 0
    while not test.reached:
        waiting = queue[test.seen :]
        ready = next((n for n, item in enumerate(waiting) if item not in agrees), len(waiting))
        if ready == 0:
            if not waiting or (test.seen >= _LEAST_LABELS and test.mean < bound) or spent >= gain:
                return False
            asked = _list_needed(test, waiting, agrees)[: min(round_size, max(gain - spent, 1))]
            answers = await ask_large(asked)
            for item, answer in zip(asked, answers, strict=True):
                agrees[item] = bool(answer)
            spent += len(asked)
            continue
        for item in waiting[:ready]:
            test.add(agrees[item])
            if test.reached:
                return True
    return True


def _list_needed(
    test: BettingTest, waiting: Sequence[int], agrees: Mapping[int, bool]
) -> list[int]:
    """Return the items without a label that the test needs if all of them agree."""
    bold, needed = copy.copy(test), list[int]()
    for item in waiting:
        if bold.reached:
            break
        bold.add(agrees.get(item, True))
        if item not in agrees:
            needed.append(item)
    return needed
