"""What one item may spend: its first call is reserved together with its repairs."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final

from ..core.money import Amount, Tariff
from ..core.protocols import CallLog, Count, Hold
from ..core.types import Usage
from .reservations import Purse

_SAID: Final = 512
"""Tokens of what is said to a model whose answer is sent back, besides its own answer."""


class ItemAccount:
    """One item's share of a purse.

    Args:
        purse: The purse.
        tariff: What tokens cost.
        repairs: How often an answer may be sent back: an item that has begun shall be carried to
            its end.
        count: Counts prompts as the model does, for when room is scarce; or None.

    Attributes:
        waits: Calls of the item that wait for the budget.
    """

    __slots__ = (
        "_asking",
        "_beginning",
        "_begun",
        "_closed",
        "_count",
        "_holds",
        "_known",
        "_lock",
        "_log",
        "_pool",
        "_purse",
        "_repairs",
        "_tariff",
        "waits",
    )

    def __init__(
        self, purse: Purse, tariff: Tariff, repairs: int, count: Count | None = None
    ) -> None:
        self._purse, self._tariff, self._count = purse, tariff, count
        self._repairs, self._asking = repairs, 0
        self._beginning = self._begun = self._known = self._closed = False
        self._pool, self._lock = Amount(), Lock()
        self._holds = set[_Hold]()
        self._log: CallLog | None = None
        self.waits = 0

    @property
    def reserved(self) -> Amount:
        """What the item has reserved, for requests in flight and for repairs."""
        total = self._pool
        for hold in tuple(self._holds):
            total = total.plus(hold.amount)
        return total

    @property
    def gives_back(self) -> bool:
        """Whether the item may give something back before any other item does.

        An item without a call under way works by itself, and ends.
        """
        log = self._log
        if log is not None and log.blocked:
            return False
        if log is not None and log.calls:
            return log.goes_on
        return any(self.reserved)

    async def hold(self, most: Usage, body: Mapping[str, Any], log: CallLog | None = None) -> Hold:
        """Reserve what one request may cost, waiting for what others may give back.

        Args:
            most: The most tokens that it may use.
            body: The request, to be counted better when room is scarce.
            log: The item's calls: whether its reservations can be given back while it waits.

        Raises:
            BudgetExhaustedError: What is left does not carry it, and nobody gives anything back.
            LedgerError: The budget's book cannot be written.
        """
        self._asking += 1
        if log is not None and not self._known:
            self._log, self._known = log, True
            self._purse.add_holder(self)
        try:
            if self._beginning:
                usage = await self._go_on(most, body)
            else:
                self._beginning = True
                try:
                    usage = await self._begin(most, body)
                finally:
                    self._beginning = self._begun
            return self._held(usage)
        finally:
            self._asking -= 1
            self._forget()

    def _held(self, usage: Usage) -> _Hold:
        hold = _Hold(usage, self._tariff.amount(usage), self)
        self._holds.add(hold)
        return hold

    def end(self, hold: _Hold, used: Amount) -> None:
        """Settle one request."""
        self._holds.discard(hold)
        self._purse.settle(hold.amount, used)
        self._forget()

    def price(self, usage: Usage) -> Amount:
        """Return what a request costs."""
        return self._tariff.amount(usage)

    async def _begin(self, most: Usage, body: Mapping[str, Any]) -> Usage:
        """Reserve the first request and the repairs; return what it was reckoned with."""
        usage, repairs = most, self._of_repairs(most)
        if not self._purse.reserve_now(self._tariff.amount(usage).plus(repairs)):
            usage = await self._counted(most, body)
            repairs = self._of_repairs(usage)
            await self._purse.reserve(self._tariff.amount(usage).plus(repairs), holder=self)
        self._begun = True
        with self._lock:
            self._pool = self._pool.plus(repairs)
        if self.waits or self._closed:
            self._give_repairs_back()
        return usage

    async def _go_on(self, most: Usage, body: Mapping[str, Any]) -> Usage:
        """Reserve a further request, of what is reserved for repairs if it is enough."""
        if self._drawn(self._tariff.amount(most)):
            return most
        usage = await self._counted(most, body)
        if not self._drawn(self._tariff.amount(usage)):
            # A waiting item holds no repairs, or two items could wait for each other.
            self._give_repairs_back()
            amount = self._tariff.amount(usage)
            await self._purse.reserve(amount, begun=self._begun, holder=self)
        return usage

    async def _counted(self, most: Usage, body: Mapping[str, Any]) -> Usage:
        """Return the most that a request may use, its prompt counted if somebody can."""
        prompt = None if self._count is None else await self._count(body)
        return most if prompt is None else Usage(prompt, most.completion)

    def _of_repairs(self, usage: Usage) -> Amount:
        prompt, answer, total = usage.prompt or 0, usage.completion or 0, Amount()
        for _ in range(self._repairs):
            prompt += answer + _SAID
            total = total.plus(self._tariff.amount(Usage(prompt, answer)))
        return total

    def hold_now(self, most: Usage) -> Hold | None:
        """Reserve what one further request may cost if there is room at once."""
        if not self._purse.reserve_now(self._tariff.amount(most)):
            return None
        return self._held(most)

    def _drawn(self, amount: Amount) -> bool:
        """Take a request out of what is reserved for repairs, if it is enough."""
        with self._lock:
            rest = self._pool.minus(amount)
            if min(rest) < 0:
                return False
            self._pool = rest
            return True

    def close(self) -> None:
        """Give back what was reserved for repairs; the item has ended."""
        self._closed = True
        self._give_repairs_back()
        self._forget()

    def _forget(self) -> None:
        """Leave the purse when the item has ended, and requests that it left behind, too."""
        if self._closed and self._known and not self._holds and not self._asking:
            self._known = False
            self._purse.remove_holder(self)

    def _give_repairs_back(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, Amount()
        if any(pool):
            self._purse.settle(pool, Amount())


class _Hold:
    """What is reserved for one request."""

    __slots__ = ("_account", "_open", "_usage", "amount")

    def __init__(self, usage: Usage, amount: Amount, account: ItemAccount) -> None:
        self._usage, self._account = usage, account
        self.amount, self._open = amount, True

    def settle(self, usage: Usage) -> None:
        if usage.prompt is None or usage.completion is None:
            self.keep()
        else:
            self._end(self._account.price(usage))

    def keep(self) -> Usage:
        self._end(self.amount)
        return self._usage

    def free(self, *, sent: bool) -> None:
        self._end(Amount(requests=int(sent)))

    def _end(self, used: Amount) -> None:
        if self._open:
            self._open = False
            self._account.end(self, used)
