"""Leases for the orders of one life: how much each worker may spend, and what came back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from ...backends.budget.budget import Spending
from ...backends.budget.spend_log import Lease
from ...backends.core.errors import FanfoldError
from ...backends.core.messages import Order, Summary
from ...backends.core.money import Amount, Tariff
from ...backends.core.templates import Template
from ...backends.core.types import Item, Json, Usage
from ...backends.discovery.connect import model_params
from ...backends.fleet.request import most_tokens
from .terms import Terms

_PER_WORKER: Final = 2
"""A lease takes at most one of so many parts of what is left, per worker."""
_MARGIN: Final = 5, 4
"""Items to come are reckoned to take a quarter more than those that were seen."""


class Lender:
    """Lends orders out of a run's budget.

    Args:
        spending: The budget, or None when it has no limits.
        terms: What the orders have in common.
        workers: Says how many work now.
    """

    def __init__(self, spending: Spending | None, terms: Terms, workers: Callable[[], int]) -> None:
        self._spending, self._terms, self._workers = spending, terms, workers
        self._config = config = terms.config
        self._body = model_params(config, terms.run["model"]).body()
        self._prompt, self._system = Template.parse(config.task.prompt), config.task.system
        self._booked = terms.journal is not None
        self._open = dict[str, str]()
        self._boost = Counter[str]()
        self._items, self._used = 0, Amount()

    async def lend(self, order: Order) -> dict[str, Json] | None:
        """Lend an order what its items may take.

        Returns:
            The lease as the order carries it; None when nothing is limited.

        Raises:
            BudgetExhaustedError: Not one item can be carried.
            LedgerError: The book cannot be written.
        """
        if self._spending is None:
            return None
        shard, attempt, items = order.shard, order.attempt, order.unpacked()
        self.lost(shard)
        budget, leases = self._spending.budget, self._spending.leases
        item = self._of_one(items[0], budget.terms.tariff)
        least = item.times(2 ** self._boost[shard])
        wanted = self._of_items(len(items), item).plus(
            item.times(min(self._terms.streams, len(items)))
        )
        parts = _PER_WORKER * max(1, self._workers())
        part = Amount(*(max(0, left) // parts for left in budget.purse.left))
        amount = wanted.least(part).most(least)
        name = f"{self._terms.run['life']}.{shard}.{attempt}"
        until = time.time() + self._config.backend.queue_s + self._terms.deadline_s
        await leases.lend(name, Lease(amount, until, self._booked))
        self._open[shard] = name
        caps = dict(budget.purse.limits(amount))
        return {"name": name, "caps": caps, "booked": self._booked, "until": until}

    def _of_one(self, item: Item, tariff: Tariff) -> Amount:
        """Return what one item may take, its repairs included."""
        try:
            question = self._prompt.render(item.row)
        except FanfoldError:
            question = ""  # it will fail without a call
        messages = [{"role": "system", "content": self._system}] if self._system else []
        most = most_tokens(
            {**self._body, "messages": [*messages, {"role": "user", "content": question}]}
        )
        rounds = 1 + (0 if self._config.task.graph else self._config.task.repairs)
        longest = Usage((most.prompt or 0) + 2 * rounds * (most.completion or 0), most.completion)
        return tariff.amount(longest).times(rounds)

    def _of_items(self, count: int, one: Amount) -> Amount:
        """Return what items are reckoned to take: by those that were seen, once there are some."""
        if not self._items:
            return one.times(count)
        more, of = _MARGIN
        return Amount(*(-(-count * more * used // (of * self._items)) for used in self._used))

    async def answered(self, summary: Summary) -> None:
        """Take back what an order has not spent.

        Raises:
            LedgerError: The book cannot be written.
        """
        if self._spending is None or summary.lease is None or summary.used is None:
            return  # what is not told counts as spent until a book proves less
        ended, used = sum((summary.tally or {}).values()), Amount.from_json(summary.used)
        self._items, self._used = self._items + ended, self._used.plus(used)
        self._boost[summary.shard] = 0 if ended else self._boost[summary.shard] + 1
        if self._open.get(summary.shard) == summary.lease:
            del self._open[summary.shard]
        await self._spending.leases.returned(summary.lease, used)

    def lost(self, shard: str) -> None:
        """Count a shard's lease as spent, if one is out: its worker is lost."""
        if self._spending is not None and (name := self._open.pop(shard, None)) is not None:
            self._spending.leases.lost(name)
