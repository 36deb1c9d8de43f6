"""The worker's side of a lease: what one order may spend, and what it has spent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ...backends.budget.budget import Budget, BudgetTerms
from ...backends.budget.spend_log import Book, Shelf
from ...backends.core.errors import BudgetExhaustedError
from ...backends.core.messages import WALLTIME, Order
from ...backends.core.money import Amount, Caps, Tariff
from ...configs.models import RunConfig

_LOOK_S: Final = 1.0
TOO_LATE: Final = f"{WALLTIME}: the order waited until its lease was over (backend.queue_s)"


@asynccontextmanager
async def leased(order: Order, config: RunConfig) -> AsyncIterator[Budget | None]:
    """Open what an order may spend; None is no limit.

    An order that is delivered twice may spend its lease once: the second waits until the first has
    ended, and then may spend nothing. Nor may one that begins when its lease is over: what was
    lent may have been given back.

    Raises:
        LedgerError: The lease's book cannot be written.
    """
    lease = order.lease
    if lease is None:
        yield None
        return
    until, book, caps = time.time() + order.deadline_s, None, lease["caps"]
    if too_late(order):
        caps = dict.fromkeys(caps, 0)
    elif lease["booked"] and order.journal is not None:
        shelf = Shelf(Path(order.journal).parent / "budget", order.run["id"])
        book = await asyncio.to_thread(_book, shelf, lease["name"], until)
        if book is None:
            await _other_ended(shelf, lease["name"])
            caps = dict.fromkeys(caps, 0)
    repairs = 0 if config.task.graph else config.task.repairs
    terms = BudgetTerms(Caps(**caps), Tariff(**order.tariff), repairs)
    budget = Budget(terms, Amount(), book, until)
    try:
        yield budget
    finally:
        await budget.purse.aclose()


def too_late(order: Order) -> str | None:
    """Tell why an order must not be begun now, or None."""
    lease = order.lease or {}
    return TOO_LATE if time.time() > lease.get("until", float("inf")) else None


def _book(shelf: Shelf, name: str, until: float) -> Book | None:
    """Begin a lease's book; None when somebody has it already."""
    path = shelf.of_lease(name)
    if path.exists():
        return None
    book = shelf.open(path)
    book.write({"until": until}, sync=True)
    return book


async def _other_ended(shelf: Shelf, name: str) -> None:
    """Wait until whoever has a lease has settled it, or its time is over."""
    while True:
        page = await asyncio.to_thread(shelf.page, name)
        if page.settled is not None or time.time() > page.until:
            return
        await asyncio.sleep(_LOOK_S)


def out_of_lease(error: Exception) -> bool:
    """Say whether an order ended because its lease is used up: the coordinator may lend more."""
    return isinstance(error, BudgetExhaustedError)


def used_of(budget: Budget | None) -> Amount | None:
    """Return what was spent of an order's own lease; what is still reserved may have been.

    Of a lease that another has, nothing is known here.
    """
    if budget is None or not budget.terms.caps.some:
        return None
    return budget.purse.settled.plus(budget.purse.reserved)
