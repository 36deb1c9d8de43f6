"""The worker's side of a lease: what one order may spend, and what it has spent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ..backends.accounts.book import Book, Shelf
from ..backends.accounts.budget import Budget, BudgetTerms
from ..backends.contract.errors import BudgetExhaustedError, SiteError
from ..backends.contract.money import Amount, Caps, Tariff
from ..backends.contract.wire import Order
from ..configs.models import RunConfig


@asynccontextmanager
async def leased(order: Order, config: RunConfig) -> AsyncIterator[Budget | None]:
    """Open what an order may spend; None is no limit.

    Raises:
        SiteError: The order was delivered twice: somebody else spends its lease.
        LedgerError: The lease's book cannot be written.
    """
    lease = order.lease
    if lease is None:
        yield None
        return
    until = time.time() + order.deadline_s
    book = None
    if lease["booked"] and order.journal is not None:
        book = await asyncio.to_thread(_book, order, lease["name"], until)
    repairs = 0 if config.task.graph else config.task.repairs
    terms = BudgetTerms(Caps(**lease["caps"]), Tariff(**order.tariff), repairs)
    budget = Budget(terms, Amount(), book, until)
    try:
        yield budget
    finally:
        await budget.purse.aclose()


def _book(order: Order, name: str, until: float) -> Book:
    shelf = Shelf(Path(order.journal or "").parent / "budget", order.run["id"])
    path = shelf.of_lease(name)
    if path.exists():
        msg = f"shard {order.shard}: the order was delivered twice; its lease {name} is in use"
        raise SiteError(msg)
    book = shelf.open(path)
    book.write({"until": until}, sync=True)
    return book


def out_of_lease(error: Exception) -> bool:
    """Say whether an order ended because its lease is used up: the coordinator may lend more."""
    return isinstance(error, BudgetExhaustedError)


def used_of(budget: Budget) -> Amount:
    """Return what was spent; what is still reserved may have been."""
    return budget.purse.settled.plus(budget.purse.reserved)
