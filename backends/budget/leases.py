"""What was lent out of a budget to workers elsewhere, and what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ..core.errors import LedgerError
from ..core.money import Amount
from .reservations import Purse
from .spend_log import Lease, Shelf


class Leases:
    """The leases of one life of a run.

    Args:
        purse: What they are lent from.
        shelf: The run's books.
        earlier: What counts as spent of leases that earlier lives lent, and may come back.
    """

    def __init__(self, purse: Purse, shelf: Shelf, earlier: Mapping[str, Amount]) -> None:
        self._purse, self._shelf = purse, shelf
        self._out, self._lost = dict[str, Lease](), dict[str, Lease]()
        self._earlier = dict(earlier)

    async def lend(self, name: str, lease: Lease) -> None:
        """Lend something; on return the book has it on disk.

        Args:
            name: The lease's name; no other lease of the run has it.
            lease: What is lent.

        Raises:
            BudgetExhaustedError: There is not so much left, and nothing will come back.
            LedgerError: The book cannot be written.
        """
        await self._purse.reserve(lease.amount)
        self._out[name] = lease
        line = {"amount": lease.amount.to_json(), "until": lease.until, "booked": lease.booked}
        await self._purse.note({"lease": name} | line, sync=True)

    async def returned(self, name: str, used: Amount) -> None:
        """Take back what was not spent; a second return of a lease counts for nothing.

        Args:
            name: The lease's name.
            used: What was spent of it.

        Raises:
            LedgerError: The book cannot be written.
        """
        if lease := self._out.pop(name, None):
            self._purse.settle(lease.amount, used.least(lease.amount))
            await self._purse.note({"back": name}, sync=False)
        elif lease := self._lost.pop(name, None):
            self._purse.refund(lease.amount, used.least(lease.amount))
            await self._purse.note({"back": name}, sync=False)
        elif name in self._earlier:
            counted = self._earlier.pop(name)
            used = used.least(counted)
            self._purse.widen(counted.minus(used))
            await self._purse.note({"late": name, "used": used.to_json()}, sync=False)

    def lost(self, name: str) -> None:
        """Count a lease as spent whose worker is lost, until its book proves otherwise."""
        if lease := self._out.pop(name, None):
            self._lost[name] = lease
            self._purse.write_off(lease.amount)

    async def recover(self) -> None:
        """Look whether the books of lost leases prove by now that less was spent.

        Raises:
            LedgerError: A book is damaged, or cannot be written; the others are read all the same.
        """
        failed: LedgerError | None = None
        for name, lease in list(self._lost.items()):
            try:
                spent = await asyncio.to_thread(self._shelf.proven, name, lease)
            except LedgerError as error:
                failed = failed or error
                continue
            if spent != lease.amount:
                await self.returned(name, spent)
        if failed is not None:
            raise failed

    def give_up(self) -> None:
        """Count all that is still out as spent: this life ends."""
        for name in list(self._out):
            self.lost(name)
