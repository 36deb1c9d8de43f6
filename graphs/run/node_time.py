"""The time of nodes: measured, noted in the run's books, and spent from its budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeAlias

from ...backends.budget.budget import Budget, Spending
from ...backends.budget.spend_log import Shelf
from ...backends.core.errors import BudgetExhaustedError, FanfoldError, LedgerError
from ...backends.core.money import Amount, Held, Tariff
from ...backends.core.types import Json
from ...nodes.shard.gate import Gate

logger = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_NOTE_S: Final = 5.0
_RECOVER_S: Final = 15.0

Nodes: TypeAlias = Callable[[], tuple[int, int]]
"""Says how many nodes are held, and how many of them work."""

Note: TypeAlias = Callable[[Mapping[str, Json]], Awaitable[None]]
"""Appends a line to a book."""


@asynccontextmanager
async def noting(spending: Spending | None, shelf: Shelf, life: int) -> AsyncIterator[Note]:
    """Open what notes lines in a life's book: the budget's, or one that only tells the time.

    Raises:
        LedgerError: The book cannot be created.
    """
    if spending is not None:
        purse = spending.budget.purse
        yield lambda line: purse.note(line, sync=False)
        return
    book = await asyncio.to_thread(shelf.open, shelf.of_life(life))
    try:
        yield lambda line: asyncio.to_thread(book.write, line, sync=False)
    finally:
        book.close()


class Timesheet:
    """Measures how long nodes are held in one life.

    Args:
        nodes: How many are held, and how many work.
        tariff: What they cost.
        count: Is told of each further while.
        note: Notes it.
    """

    def __init__(
        self, nodes: Nodes, tariff: Tariff, count: Callable[[Held], None], note: Note
    ) -> None:
        self._nodes, self._tariff, self._count, self._note = nodes, tariff, count, note
        self._then, self._busy = time.monotonic(), 0
        self._held, self._noted = Held(), Held()

    def cost(self, seconds: float) -> Amount:
        """Return what the nodes that are held now, one at least, cost for a while."""
        held, _ = self._nodes()
        return self._tariff.held(round(1000 * max(1, held) * seconds))

    def tick(self) -> Amount:
        """Count the time since the last tick; return what it comes to."""
        now = time.monotonic()
        held, busy = self._nodes()
        cost = self._tariff.held(round(1000 * held * (now - self._then)))
        idle = max(0, held - max(busy, self._busy))  # idle at both ends of the while
        further = Held(cost.node_ms, round(1000 * idle * (now - self._then)), cost.nano_usd)
        self._held, self._then, self._busy = self._held.plus(further), now, busy
        self._count(further)
        return cost

    async def note(self) -> None:
        """Note what has been counted, if anything is new."""
        if self._held == self._noted:
            return
        self._noted = self._held
        try:
            await self._note({"held": self._held.to_json()})
        except LedgerError as error:
            logger.warning("%s", error.message)  # the journal's own write will end the run


@asynccontextmanager
async def watched(sheet: Timesheet, gate: Gate, spending: Spending | None) -> AsyncIterator[None]:
    """Count the time of nodes, and warn as the budget is used up, while the block runs.

    Args:
        sheet: Measures the time.
        gate: Is closed when no node-hours are left; so much of them is put aside that those in
            flight can end.
        spending: The budget; None is no limit.
    """
    payer = _payer(sheet, gate, spending)
    if payer is not None:
        await payer.begin()
    task = asyncio.create_task(_watch(sheet, payer, spending))
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
                payer.end(cost)
            await sheet.note()
            if spending is not None:
                spending.budget.warn()


def _payer(sheet: Timesheet, gate: Gate, spending: Spending | None) -> _Payer | None:
    """Return who spends time from the budget, if it is limited or costs anything."""
    if spending is None:
        return None
    terms = spending.budget.terms
    timed = terms.caps.node_ms is not None or terms.tariff.node > 0
    return _Payer(spending.budget, gate, sheet) if timed else None


async def _watch(sheet: Timesheet, payer: _Payer | None, spending: Spending | None) -> None:
    noted = recovered = time.monotonic()
    told = set[str]()
    while True:
        await asyncio.sleep(_TICK_S)
        cost, now = sheet.tick(), time.monotonic()
        if payer is not None:
            payer.spend(cost)
        if now - noted > _NOTE_S:
            await sheet.note()
            noted = now
        if spending is not None:
            spending.budget.warn()
            if now - recovered > _RECOVER_S:
                await _recover(spending, told)
                recovered = time.monotonic()


async def _recover(spending: Spending, told: set[str]) -> None:
    """Look for what lost workers did not spend; a book that cannot be read now may be later.

    Args:
        spending: The budget.
        told: What went wrong before; it is not told again.
    """
    try:
        await spending.leases.recover()
    except (FanfoldError, OSError) as error:
        if str(error) not in told:
            told.add(str(error))
            logger.warning("%s; what was lent counts as spent meanwhile", error)


class _Payer:
    """Spends the time of nodes from a budget as it goes by."""

    def __init__(self, budget: Budget, gate: Gate, sheet: Timesheet) -> None:
        self._budget, self._gate, self._sheet = budget, gate, sheet
        self._owed, self._aside = Amount(), Amount()

    async def begin(self) -> None:
        """Put aside what the end of those in flight will take; close the gate without so much."""
        aside = self._sheet.cost(self._gate.drain_s + _TICK_S)
        try:
            await self._budget.purse.reserve(aside)
        except BudgetExhaustedError as error:
            self._gate.close(error.message, error)
        else:
            self._aside = self._budget.purse.aside = aside

    def spend(self, cost: Amount) -> None:
        """Spend a while; close the gate when there is no more."""
        self._owed = self._owed.plus(cost)
        spent = self._budget.purse.tick(self._owed)
        if spent is None:
            return  # the book is being written: with the next while
        if not spent:
            msg = self._budget.refusal(self._owed.plus(self._aside))
            self._gate.close(msg, BudgetExhaustedError(msg))
            self._pay(self._owed)
        self._owed = Amount()

    def end(self, cost: Amount) -> None:
        """Spend the last while, and give back what was put aside."""
        self._pay(self._owed.plus(cost))
        self._budget.purse.aside = Amount()
        self._budget.purse.settle(self._aside, Amount())

    def _pay(self, cost: Amount) -> None:
        """Count time that has gone by, of what is left and then of what was put aside."""
        purse = self._budget.purse
        free = cost.least(purse.left.most(Amount()))
        purse.settle(Amount(), free)
        used = cost.minus(free).least(self._aside)
        self._aside = purse.aside = self._aside.minus(used)
        purse.settle(used, used)
