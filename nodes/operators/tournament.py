"""Find the best k of many items by listwise comparisons in parallel rounds.

Two published methods work together. Pivots (ListK, arXiv 2603.17223) discard most items: an item
that loses to a pivot is out as soon as k others have won against it. The rest goes into a graph of
wins (BlitzRank, arXiv 2602.05448): each comparison of a group orders all its pairs, the transitive
closure orders more without a call, and items on a cycle are tied. The search ends when the order of
the best k follows from the graph.

A judge may be biased by position and may contradict itself. Groups are therefore shown in a random
order that only depends on ``seed``, pairs are decided by the majority of their comparisons, and
pairs on a cycle are compared again, in other groups, up to ``repeats`` times.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

Group = tuple[int, ...]
"""Items in the order in which the judge sees them."""
Judge = Callable[[Sequence[Group]], Awaitable[Sequence[Sequence[int] | None]]]
"""Orders the items of each group of a round, best first.

An order may lack items of the group, which then remain uncompared; None: the group failed.
"""

_SAMPLE: Final = 6
"""Groups of the sample that a pivot comes from."""
_ABOVE: Final = 4
"""Times k: the expected number of items that win against a pivot."""
_DIRECT: Final = 6
"""Times k: the items of which a graph is made without a pivot."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One of the best items.

    Attributes:
        item: Its number.
        rank: Its rank from 1; tied items share the best of their ranks.
        tied: Other items that share the rank.
        comparisons: Groups in which it was compared.
        wins: Share of its comparisons with single items that it won.
    """

    item: int
    rank: int
    tied: int
    comparisons: int
    wins: float


@dataclass(frozen=True, slots=True)
class Standing:
    """The best k items and what the order is based on.

    Attributes:
        best: The best items in order; fewer than k only if there are fewer items.
        calls: Groups that the judge ordered.
        failed: Groups that failed.
        rounds: Rounds that followed each other.
        comparisons: Pairs that were compared directly, repetitions included.
        contradictions: Compared pairs whose majority contradicts the stated order.
        settled: False if ``max_rounds`` ended the search before the order was determined.
    """

    best: tuple[Placed, ...]
    calls: int
    failed: int
    rounds: int
    comparisons: int
    contradictions: int
    settled: bool


class _Wins:
    """How often each item won against each other, and what follows from it.

    Only the orders are kept, by item: most pairs that a group compares are never asked for.
    """

    def __init__(self) -> None:
        self._orders = defaultdict[int, list[tuple[Sequence[int], int]]](list)
        """By item: the orders that contain it, each with its place in it."""
        self.pairs = 0

    def add(self, order: Sequence[int]) -> None:
        """Count an order of a group, best first."""
        for place, item in enumerate(order):
            self._orders[item].append((order, place))
        self.pairs += len(order) * (len(order) - 1) // 2

    def count_orders(self, item: int) -> int:
        """Return how many orders contain an item."""
        return len(self._orders.get(item, ()))

    def count_against(self, other: int) -> dict[int, int]:
        """Return, by each item that met the other one, its wins against it minus its defeats."""
        found = dict[int, int]()
        for order, place in self._orders.get(other, ()):
            for item in order[:place]:
                found[item] = found.get(item, 0) + 1
            for item in order[place + 1 :]:
                found[item] = found.get(item, 0) - 1
        return found

    def count_among(self, items: Sequence[int]) -> dict[int, dict[int, int]]:
        """Return how often each of some items won, by the other one of them that lost."""
        members, found = set(items), dict[int, dict[int, int]]()
        for item in items:
            beaten = found[item] = {}
            for order, place in self._orders.get(item, ()):
                for other in members.intersection(order[place + 1 :]):
                    beaten[other] = beaten.get(other, 0) + 1
        return found

    def share(self, item: int) -> float:
        """Return the share of an item's comparisons that it won."""
        orders = self._orders.get(item, ())
        lost = sum(place for _, place in orders)
        return _divide(sum(len(order) - 1 for order, _ in orders) - lost, lost)

    def shares(self, items: Sequence[int]) -> dict[int, float]:
        """Return, for each of some items, the share of its comparisons with them that it won."""
        won, lost = dict.fromkeys(items, 0), dict.fromkeys(items, 0)
        for item, beaten in self.count_among(items).items():
            for other, times in beaten.items():
                won[item] += times
                lost[other] += times
        return {item: _divide(won[item], lost[item]) for item in items}


def _divide(won: int, lost: int) -> float:
    return won / (won + lost) if won + lost else 0.5


class _Graph:
    """The transitive closure of the majority of wins among some items.

    Sets of items are bits of an integer, by position in ``items``.
    """

    def __init__(self, items: Sequence[int], wins: _Wins) -> None:
        self.items = items
        count = len(items)
        won, lost = [0] * count, [0] * count
        places = {item: place for place, item in enumerate(items)}
        found = wins.count_among(items)
        for one, item in enumerate(items):
            for other, times in found[item].items():
                if times > found[other].get(item, 0):
                    won[one] |= 1 << places[other]
                    lost[places[other]] |= 1 << one
        self.below, self.above = _close(won), _close(lost)
        self.cycle = [self.below[n] & self.above[n] for n in range(count)]

    def better(self, position: int) -> int:
        """Return how many items are known to be strictly better."""
        return (self.above[position] & ~self.cycle[position]).bit_count()

    def known(self, position: int) -> int:
        """Return the items whose relation to this one is known, itself included."""
        return self.above[position] | self.below[position] | 1 << position


def _close(direct: Sequence[int]) -> list[int]:
    """Return what each position reaches (Warshall's algorithm over bit sets)."""
    reach = list(direct)
    for middle, bit in ((n, 1 << n) for n in range(len(reach))):
        through = reach[middle]
        for start in range(len(reach)):
            if reach[start] & bit:
                reach[start] |= through
    return reach


class Tournament:
    """Finds the best k of many items."""

    def __init__(  # noqa: PLR0913  (the settings of one search)
        self,
        count: int,
        judge: Judge,
        *,
        k: int,
        group: int = 10,
        repeats: int = 1,
        seed: int = 0,
        max_rounds: int = 200,
    ) -> None:
        """Prepare a search.

        Args:
            count: Number of items; their numbers are 0 to ``count - 1``.
            judge: Orders the groups of a round.
            k: How many of the best are wanted.
            group: Items of a group.
            repeats: Most comparisons of a pair that lies on a cycle or near the first ranks.
            seed: Decides which items meet and in which order they are shown.
            max_rounds: Rounds after which the search ends in any case.
        """
        if count < 1 or k < 1 or group < 2 or repeats < 1:  # noqa: PLR2004
            raise ValueError(
                "a tournament needs items, k >= 1, groups of two or more, repeats >= 1"
            )
        self._count = count
        self._judge = judge
        self._k = min(k, count)
        self._group = min(group, count)
        self._repeats = repeats
        self._random = random.Random(seed)
        self._max_rounds = max_rounds
        self._wins = _Wins()
        self._latest: tuple[tuple[tuple[int, ...], int], _Graph] | None = None
        self._calls = self._failed = self._rounds = 0

    async def run(self) -> Standing:
        """Compare until the best k are settled."""
        candidates = await self._select()
        settled = await self._settle(candidates, self._k)
        for _ in range(self._repeats - 1):
            await self._confirm(candidates)
            settled = await self._settle(candidates, self._k)
        return self._state(candidates, settled=settled)

    async def _ask(self, groups: Sequence[Sequence[int]]) -> None:
        shown = [tuple(self._random.sample(list(group), len(group))) for group in groups]
        self._rounds += 1
        self._calls += len(shown)
        for group, order in zip(shown, await self._judge(shown), strict=True):
            if order is None:
                self._failed += 1
                continue
            members = set(group)
            if len(set(order)) != len(order) or not members.issuperset(order):
                raise ValueError("a judge's order has items twice or items of another group")
            self._wins.add(order)

    def _make_graph(self, items: Sequence[int]) -> _Graph:
        """Return the graph of some items; the latest one is kept for the next question about it."""
        key = tuple(items), self._wins.pairs
        if self._latest is None or self._latest[0] != key:
            self._latest = key, _Graph(items, self._wins)
        return self._latest[1]

    def _split(self, items: Sequence[int], size: int) -> list[list[int]]:
        """Return groups of nearly equal size, at most ``size`` each."""
        parts = -(-len(items) // size)
        return [list(items[part::parts]) for part in range(parts)]

    async def _select(self) -> list[int]:
        """Return the items that can still be among the best k, without the order."""
        kept: list[int] = []
        open_items = self._random.sample(range(self._count), self._count)
        while len(open_items) > _DIRECT * self._k and len(open_items) > 3 * self._group:
            need = self._k - len(kept)
            pivot = await self._choose_pivot(open_items, need)
            rest = [item for item in open_items if item != pivot]
            met = self._wins.count_against(pivot)
            unmet = [item for item in rest if item not in met]
            await self._ask([[*part, pivot] for part in self._split(unmet, self._group - 1)])
            # An item that failed to be compared stays in the race.
            below, above, lead = list[int](), list[int](), self._wins.count_against(pivot)
            for item in rest:
                (below if lead.get(item, 0) < 0 else above).append(item)
            if len(above) >= need:
                if len(above) + 1 >= len(open_items):
                    break
                open_items = above
            else:
                kept += [*above, pivot]
                open_items = below
                if len(kept) >= self._k:
                    return kept
        return kept + open_items

    async def _choose_pivot(self, items: Sequence[int], need: int) -> int:
        """Return an item whose rank is expected to be a few times what is needed."""
        sample = list(items[: min(len(items), _SAMPLE * self._group)])
        place = min(max(round(_ABOVE * need / len(items) * len(sample)), 1), len(sample) // 2)
        await self._settle(sample, place)
        return self._order(sample)[place - 1]

    async def _settle(self, items: Sequence[int], k: int) -> bool:
        """Compare until the order of the best k follows; return False if it does not."""
        while self._rounds < self._max_rounds:
            graph = self._make_graph(items)
            groups = self._group_unknown(graph, k)
            if not groups:
                return True
            before = self._wins.pairs
            await self._ask([[items[n] for n in group] for group in groups])
            if self._wins.pairs == before:
                return False
        return False

    def _group_unknown(self, graph: _Graph, k: int) -> list[list[int]]:
        """Return groups whose order decides pairs that matter and are unknown."""
        racing = [n for n in range(len(graph.items)) if graph.better(n) < k]
        mask = sum(1 << n for n in racing)
        unknown = {n: mask & ~graph.known(n) for n in racing}
        racing = [n for n in racing if unknown[n]]
        # Items with few known betters first: what they decide discards the most others.
        racing.sort(key=lambda n: (graph.better(n), -graph.below[n].bit_count()))
        free = sum(1 << n for n in racing)
        groups: list[list[int]] = []
        for first in racing:
            if not free >> first & 1:
                continue
            free ^= 1 << first
            group = [first]
            wanted = unknown[first]
            while len(group) < self._group:
                fitting = [n for n in racing if free >> n & 1 and wanted >> n & 1]
                if not fitting:
                    break
                chosen = sum(1 << n for n in group)
                best = max(
                    fitting[: 2 * self._group],
                    key=lambda n: (unknown[n] & chosen).bit_count(),
                )
                free ^= 1 << best
                group.append(best)
                wanted |= unknown[best]
            if len(group) > 1:
                groups.append(group)
        return groups

    async def _confirm(self, items: Sequence[int]) -> None:
        """Compare neighbours in the order of the first ranks once more, in overlapping groups."""
        front = self._order(items)[: 2 * self._k]
        step = max(self._group // 2, 1)
        starts = range(0, max(len(front) - step, 1), step)
        await self._ask([front[start : start + self._group] for start in starts])

    def _order(self, items: Sequence[int]) -> list[int]:
        """Return the items, best first; tied ones by their share of wins, then by number."""
        graph, shares = self._make_graph(items), self._wins.shares(items)
        places = sorted(
            range(len(items)), key=lambda n: (graph.better(n), -shares[items[n]], items[n])
        )
        return [items[n] for n in places]

    def _state(self, items: Sequence[int], *, settled: bool) -> Standing:
        graph = self._make_graph(items)
        places = {item: place for place, item in enumerate(items)}
        best = []
        for item in self._order(items)[: self._k]:
            place = places[item]
            tied = max(graph.cycle[place].bit_count() - 1, 0)
            best.append(
                Placed(
                    item=item,
                    rank=graph.better(place) + 1,
                    tied=tied,
                    comparisons=self._wins.count_orders(item),
                    wins=self._wins.share(item),
                )
            )
        contradictions, wins = 0, self._wins.count_among([one.item for one in best])
        for one, other in combinations(best, 2):
            won, lost = wins[one.item].get(other.item, 0), wins[other.item].get(one.item, 0)
            contradictions += lost > won and one.rank < other.rank
        return Standing(
            best=tuple(best),
            calls=self._calls,
            failed=self._failed,
            rounds=self._rounds,
            comparisons=self._wins.pairs,
            contradictions=contradictions,
            settled=settled,
        )
