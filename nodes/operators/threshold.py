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
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

AskLarge = Callable[[Sequence[int]], Awaitable[Sequence[bool | None]]]
"""Has the large model answer items; returns whether the small model's answer agrees with it.

None: the large model failed. That counts against the small model in the test.
"""

_TRUNCATION: Final = 0.75
"""Largest share of the wealth that one bet may lose; 3/4 as in the paper's experiments."""
_LEAST_LABELS: Final = 50
"""Labels of a step before its mean may end the search."""
_LEAST_ROUND: Final = 32
"""Labels to which a round is filled with those that later steps need."""


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
        self.bound = bound
        self._log_goal = math.log(1 / delta)
        self._log_wealth = 0.0
        self.seen = 0
        self._sum = 0
        self._squares = 0.25
        self.reached = bound <= 0

    def add(self, value: bool) -> None:
        """Bet on the next value."""
        # The mean of the values that are left if the mean of all is just the bound.
        left = (self._total * self.bound - self._sum) / (self._total - self.seen)
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
        if self.seen == self._total and self._sum >= self._total * self.bound - 1e-9:
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
    ends = sorted({max(1, round(len(answered) * n / steps)) for n in range(1, steps + 1)})
    tests = [
        # Items of the large model agree; the small model's may miss the target by as much.
        _Step(end, end - before, BettingTest(end, 1 - (1 - target) * count / end, delta))
        for before, end in pairwise([0, *ends])
        if end <= len(answered)
    ]
    sample = _Sample(answered, turn, ask_large, round_size)
    accepted = tried = 0
    for number, step in enumerate(tests):
        tried += 1
        if not await sample.reaches(step, tests[number + 1 :]):
            break
        accepted = step.end
    agrees = sample.agrees
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


@dataclass(frozen=True, slots=True)
class _Step:
    """One threshold.

    Attributes:
        end: Number of items whose certainty reaches it.
        gain: Items that the step before has not.
        test: Tests whether their agreement reaches the bound; nothing has been added.
    """

    end: int
    gain: int
    test: BettingTest


class _Sample:
    """The labels of a sample, in one uniform order of all items.

    The order is uniform for each set of the items, so that labels of one step serve all others.

    Attributes:
        agrees: Whether the answers about an item agree, by item.
    """

    def __init__(
        self,
        answered: Sequence[int],
        turn: Mapping[int, int],
        ask_large: AskLarge,
        round_size: int,
    ) -> None:
        self.agrees = dict[int, bool]()
        self._ask_large, self._round_size = ask_large, round_size
        self._place = {item: place for place, item in enumerate(answered)}
        self._queue = sorted(answered, key=turn.__getitem__)

    async def reaches(self, step: _Step, later: Sequence[_Step]) -> bool:
        """Return True if the agreement of a step's items is shown to reach its bound.

        More labels than the step can gain are not asked for. A round has no more labels than the
        test needs if all of them agree. A short round also has those that later steps need then:
        each round waits for its slowest answer, and if such a step is not reached, the large model
        answers its items anyway.
        """
        test, spent = copy.copy(step.test), 0
        waiting = self._list_items(step)
        item = next(waiting, None)
        while not test.reached:
            if item is not None and item in self.agrees:
                test.add(self.agrees[item])
                item = next(waiting, None)
                continue
            if item is None or _is_hopeless(test) or spent >= step.gain:
                return False
            needed = self._list_needed(step, min(self._round_size, step.gain - spent))
            spent += len(needed)
            await self._ask(needed, later)
        return True

    async def _ask(self, needed: Collection[int], later: Sequence[_Step]) -> None:
        """Ask for the labels that a step needs, and for some that later steps would need."""
        most = min(self._round_size, _LEAST_ROUND)
        asked = dict.fromkeys(needed)
        for step in later:
            if len(asked) >= most:
                break
            asked |= dict.fromkeys(self._list_needed(step, min(most, step.gain)))
        items = list(asked)[: max(len(needed), most)]
        answers = await self._ask_large(items)
        self.agrees |= {item: bool(one) for item, one in zip(items, answers, strict=True)}

    def _list_items(self, step: _Step) -> Iterator[int]:
        return (item for item in self._queue if self._place[item] < step.end)

    def _list_needed(self, step: _Step, most: int) -> list[int]:
        """Return the items without a label that a step needs if all of them agree."""
        bold, needed = copy.copy(step.test), list[int]()
        for item in self._list_items(step):
            if bold.reached or len(needed) >= most:
                break
            bold.add(self.agrees.get(item, True))
            if item not in self.agrees:
                needed.append(item)
        return needed


def _is_hopeless(test: BettingTest) -> bool:
    return test.seen >= _LEAST_LABELS and test.mean < test.bound
