"""The time of nodes: measured, noted in the run's books, and spent from its budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeAlias

from ...backends.budget.budget import Budget, RunBudget
from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import BudgetExhaustedError, FanfoldError, JournalError
from ...backends.core.money import Amount, NodeTime, TokenPrices
from ...backends.core.types import Json
from ...nodes.shard.gate import Gate

logger = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_NOTE_S: Final = 5.0
_RECOVER_S: Final = 15.0

ReadNodeCounts: TypeAlias = Callable[[], tuple[int, int]]
"""Says how many nodes are held, and how many of them work."""

WriteLine: TypeAlias = Callable[[Mapping[str, Json]], Awaitable[None]]
"""Appends a line to a book."""


@asynccontextmanager
async def open_time_log(
    spending: RunBudget | None, shelf: SpendLogs, life: int
) -> AsyncIterator[WriteLine]:
    """Open what notes lines in a life's book: the budget's, or one that only tells the time.

    Raises:
        JournalError: The book cannot be created.
    """
    if spending is not None:
        purse = spending.budget.balance
        yield lambda line: purse.append_line(line, sync=False)
        return
    book = await asyncio.to_thread(shelf.create, shelf.session_path(life))
    try:
        yield lambda line: asyncio.to_thread(book.write, line, sync=False)
    finally:
        book.close()


class NodeTimeMeter:
    """Measures how long nodes are held in one life.

    Args:
        nodes: How many are held, and how many work.
        tariff: What they cost.
        count: Is told of each further while.
        write: Notes it.
    """

    def __init__(
        self,
        nodes: ReadNodeCounts,
        tariff: TokenPrices,
        count: Callable[[NodeTime], None],
        note: WriteLine,
    ) -> None:
        self._nodes, self._tariff, self._count, self._note = nodes, tariff, count, note
        self._then, self._busy = time.monotonic(), 0
        self._held, self._noted = NodeTime(), NodeTime()

    def estimate_cost(self, seconds: float) -> Amount:
        """Return what the nodes that are held now, one at least, cost for a while."""
        held, _ = self._nodes()
        return self._tariff.node_amount(round(1000 * max(1, held) * seconds))

    def tick(self) -> Amount:
        """Count the time since the last tick; return what it comes to."""
        now = time.monotonic()
        held, busy = self._nodes()
        cost = self._tariff.node_amount(round(1000 * held * (now - self._then)))
        idle = max(0, held - max(busy, self._busy))  # idle at both ends of the while
        further = NodeTime(cost.node_ms, round(1000 * idle * (now - self._then)), cost.nano_usd)
        self._held, self._then, self._busy = self._held.plus(further), now, busy
        self._count(further)
        return cost

    async def write(self) -> None:
        """Note what has been counted, if anything is new."""
        if self._held == self._noted:
            return
        self._noted = self._held
        try:
            await self._note({"held": self._held.to_json()})
        except JournalError as error:
            logger.warning("%s", error.message)  # the journal's own write will end the run


@asynccontextmanager
async def meter_node_time(
    sheet: NodeTimeMeter, gate: Gate, spending: RunBudget | None
) -> AsyncIterator[None]:
    """Count the time of nodes, and warn as the budget is used up, while the block runs.

    Args:
        sheet: Measures the time.
        gate: Is closed when no node-hours are left; so much of them is put aside that those in
            flight can end.
        spending: The budget; None is no limit.
    """
    payer = _make_charger(sheet, gate, spending)
    if payer is not None:
        await payer.reserve()
    task = asyncio.create_task(_meter_loop(sheet, payer, spending))
    try:
        yield
    finally:
        task.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await task
        finally:
            cost = sheet.tick()
            if payer is not None:
                payer.close(cost)
            await sheet.write()
            if spending is not None:
                spending.budget.warn()


def _make_charger(
    sheet: NodeTimeMeter, gate: Gate, spending: RunBudget | None
) -> NodeTimeCharger | None:
    """Return who spends time from the budget, if it is limited or costs anything."""
    if spending is None:
        return None
    terms = spending.budget.settings
    timed = terms.limits.node_ms is not None or terms.prices.node > 0
    return NodeTimeCharger(spending.budget, gate, sheet) if timed else None


async def _meter_loop(
    sheet: NodeTimeMeter, payer: NodeTimeCharger | None, spending: RunBudget | None
) -> None:
    noted = recovered = time.monotonic()
    told = set[str]()
    while True:
        await asyncio.sleep(_TICK_S)
        cost, now = sheet.tick(), time.monotonic()
        if payer is not None:
            payer.charge(cost)
        if now - noted > _NOTE_S:
            await sheet.write()
            noted = now
        if spending is not None:
            spending.budget.warn()
            if now - recovered > _RECOVER_S:
                await _recover_leases(spending, told)
                recovered = time.monotonic()


async def _recover_leases(spending: RunBudget, told: set[str]) -> None:
    """Look for what lost workers did not spend; a book that cannot be read now may be later.

    Args:
        spending: The budget.
        told: What went wrong before; it is not told again.
    """
    try:
        await spending.leases.recover_lost()
    except (FanfoldError, OSError) as error:
        if str(error) not in told:
            told.add(str(error))
            logger.warning("%s; what was lent counts as spent meanwhile", error)


class NodeTimeCharger:
    """Spends the time of nodes from a budget as it goes by."""

    def __init__(self, budget: Budget, gate: Gate, sheet: NodeTimeMeter) -> None:
        self._budget, self._gate, self._sheet = budget, gate, sheet
        self._unpaid, self._reserved = Amount(), Amount()

    async def reserve(self) -> None:
        """Put aside what the end of those in flight will take; close the gate without so much."""
        aside = self._sheet.estimate_cost(self._gate.drain_s + _TICK_S)
        try:
            await self._budget.balance.reserve(aside)
        except BudgetExhaustedError as error:
            self._gate.close(error.message, error)
        else:
            self._reserved = self._budget.balance.set_aside = aside

    def charge(self, cost: Amount) -> None:
        """Spend a while; close the gate when there is no more."""
        self._unpaid = self._unpaid.plus(cost)
        spent = self._budget.balance.try_spend(self._unpaid)
        if spent is None:
            return  # the book is being written: with the next while
        if not spent:
            msg = self._budget.record_refusal(self._unpaid.plus(self._reserved))
            self._gate.close(msg, BudgetExhaustedError(msg))
            self._settle(self._unpaid)
        self._unpaid = Amount()

    def close(self, cost: Amount) -> None:
        """Spend the last while, and give back what was put aside."""
        self._settle(self._unpaid.plus(cost))
        self._budget.balance.set_aside = Amount()
        self._budget.balance.settle(self._reserved, Amount())

    def _settle(self, cost: Amount) -> None:
        """Count time that has gone by, of what is left and then of what was put aside."""
        purse = self._budget.balance
        free = cost.minimum(purse.left.maximum(Amount()))
        purse.settle(Amount(), free)
        used = cost.minus(free).minimum(self._reserved)
        self._reserved = purse.set_aside = self._reserved.minus(used)
        purse.settle(used, used)
