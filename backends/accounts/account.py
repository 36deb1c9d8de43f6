"""What one item may spend: its first call is reserved together with its repairs."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final

from ..contract.calls import Count, Hold
from ..contract.money import Amount, Tariff
from ..contract.types import Usage
from .purse import Purse

_SEEN: Final = 32
"""Answers before what was seen is relied upon."""
_MARGIN: Final = 1.25
_SAID: Final = 256
"""Tokens of what is said to a model whose answer is sent back, besides its own answer."""


class Gauge:
    """How many prompt tokens a request takes, for a bound that is known from its length.

    A token is one byte at least, and four in most texts. Once some answers have come, the highest
    share of the bound that was seen, and a quarter more, takes the bound's place.

    Attributes:
        share: What is relied upon, at most 1.
    """

    def __init__(self) -> None:
        self._seen, self._highest = 0, 0.0
        self.share = 1.0

    def prompt(self, bound: int) -> int:
        """Return the tokens to reserve."""
        return int(bound * self.share) + 1

    def learn(self, bound: int, tokens: int) -> None:
        """Take note of what a prompt took."""
        self._seen += 1
        share = tokens / max(1, bound)
        self._highest = max(self._highest, share)
        if self._seen >= _SEEN:
            self.share = min(1.0, _MARGIN * self._highest)


class ItemAccount:
    """One item's share of a purse.

    Args:
        purse: The purse.
        tariff: What tokens cost.
        gauge: How prompts are estimated.
        repairs: How often an answer may be sent back: an item that has begun shall be carried to
            its end.
        count: Counts prompts as the model does, for when room is scarce; or None.
    """

    __slots__ = ("_begun", "_count", "_gauge", "_lock", "_pool", "_purse", "_repairs", "_tariff")

    def __init__(
        self,
        purse: Purse,
        tariff: Tariff,
        gauge: Gauge,
        repairs: int,
        count: Count | None = None,
    ) -> None:
        self._count = count
        self._purse, self._tariff, self._gauge = purse, tariff, gauge
        self._repairs, self._begun = repairs, False
        self._pool, self._lock = Amount(), Lock()

    async def hold(self, most: Usage, body: Mapping[str, Any]) -> Hold:
        """Reserve what one request may cost, waiting for what others may give back.

        Args:
            most: The most tokens that it may use.
            body: The request, to be counted better when room is scarce.

        Raises:
            BudgetExhaustedError: What is left does not carry it, and nobody gives anything back.
            LedgerError: The budget's book cannot be written.
        """
        usage = self._estimated(most)
        if not self._begun:
            usage = await self._begin(usage, body)
        elif not self._drawn(amount := self._tariff.amount(usage)):
            self.close()  # whoever waits holds nothing, or two items could wait for each other
            await self._purse.reserve(amount, begun=True)
        return _Hold(self, self._tariff.amount(usage), usage, most.prompt or 0)

    def _estimated(self, most: Usage) -> Usage:
        return Usage(self._gauge.prompt(most.prompt or 0), most.completion)

    async def _begin(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
        """Reserve the first request and the repairs; return what it was reckoned with."""
        repairs = self._of_repairs(usage)
        if not self._purse.reserve_now(self._tariff.amount(usage).plus(repairs)):
            if self._count is not None and (prompt := await self._count(body)) is not None:
                usage = Usage(prompt, usage.completion)
                repairs = self._of_repairs(usage)
            await self._purse.reserve(self._tariff.amount(usage).plus(repairs))
        self._begun = True
        with self._lock:
            self._pool = self._pool.plus(repairs)
        return usage

    def _of_repairs(self, usage: Usage) -> Amount:
        prompt, answer, total = usage.prompt or 0, usage.completion or 0, Amount()
        for _ in range(self._repairs):
            prompt += answer + _SAID
            total = total.plus(self._tariff.amount(Usage(prompt, answer)))
        return total

    def hold_now(self, most: Usage) -> Hold | None:
        """Reserve what one further request may cost if there is room at once."""
        usage = self._estimated(most)
        amount = self._tariff.amount(usage)
        if not self._purse.reserve_now(amount):
            return None
        return _Hold(self, amount, usage, most.prompt or 0)

    def _drawn(self, amount: Amount) -> bool:
        """Take a request out of what is reserved for repairs, if it is enough."""
        with self._lock:
            rest = self._pool.minus(amount)
            if min(rest) < 0:
                return False
            self._pool = rest
            return True

    def settle(self, reserved: Amount, usage: Usage, bound: int) -> None:
        """Settle a request that was answered."""
        self._gauge.learn(bound, usage.prompt or 0)
        self._purse.settle(reserved, self._tariff.amount(usage))

    def spend(self, reserved: Amount, used: Amount) -> None:
        """Settle a request that was not."""
        self._purse.settle(reserved, used)

    def close(self) -> None:
        """Give back what was reserved for repairs; the item has ended."""
        with self._lock:
            pool, self._pool = self._pool, Amount()
        if any(pool):
            self._purse.settle(pool, Amount())


class _Hold:
    """What is reserved for one request."""

    __slots__ = ("_account", "_amount", "_bound", "_open", "_usage")

    def __init__(self, account: ItemAccount, amount: Amount, usage: Usage, bound: int) -> None:
        self._account, self._amount, self._usage, self._bound = account, amount, usage, bound
        self._open = True

    def settle(self, usage: Usage) -> None:
        if usage.prompt is None or usage.completion is None:
            self.keep()
        elif self._ends():
            self._account.settle(self._amount, usage, self._bound)

    def keep(self) -> Usage:
        if self._ends():
            self._account.spend(self._amount, self._amount)
        return self._usage

    def free(self, *, sent: bool) -> None:
        if self._ends():
            self._account.spend(self._amount, Amount(requests=int(sent)))

    def _ends(self) -> bool:
        first, self._open = self._open, False
        return first
