"""The budget of one open run: what is left of it, in accounts for items."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..core.money import HOUR_MS, NANO, Amount, Caps, Tariff
from ..core.protocols import Count
from ..core.types import Json
from .account import ItemAccount
from .reservations import Purse
from .spend_log import Book

logger = logging.getLogger(__name__)

SHOWN: Final[dict[str, tuple[str, int]]] = {
    "requests": ("requests", 1),
    "tokens": ("tokens", 1),
    "nano_usd": ("usd", NANO),
    "node_ms": ("node_hours", HOUR_MS),
}
"""By field of an amount: its name in settings, and how many of the field's unit make one."""

_FINE: Final = 0.1 * NANO
"""Smaller sums are shown with more digits."""


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """What a budget is.

    Attributes:
        caps: The most that all lives of a run may spend together.
        tariff: What things cost.
        repairs: How often an answer may be sent back.
        warn_at: Shares of a cap at which to warn.
    """

    caps: Caps
    tariff: Tariff
    repairs: int = 0
    warn_at: Sequence[float] = ()


class Budget:
    """What an open run may still spend.

    Args:
        terms: What the budget is.
        before: What earlier lives have spent.
        book: Where this life's level is kept; None in a worker that keeps none.
        until: Unix time in seconds after which nothing is spent any more.

    Attributes:
        terms: As given.
        before: As given.
        purse: What is left.
        needed: What could not be reserved, if that has been refused.
        count: Counts prompts as the model does, for when room is scarce; or None.
    """

    def __init__(
        self,
        terms: BudgetTerms,
        before: Amount,
        book: Book | None,
        until: float = float("inf"),
    ) -> None:
        self.terms, self.before = terms, before
        self.purse = Purse(_left(terms.caps, before), book, self.refusal, until)
        self.needed: Amount | None = None
        self.count: Count | None = None
        self._warned = set[tuple[str, float]]()

    def account(self) -> ItemAccount:
        """Return an account for one item."""
        terms = self.terms
        return ItemAccount(self.purse, terms.tariff, terms.repairs, self.count)

    def spent(self) -> Amount:
        """Return what all lives have spent, with what is in doubt."""
        return self.before.plus(self.purse.settled).plus(self.purse.lost)

    def carries(self, needed: Amount) -> bool:
        """Say whether what is left carries an amount, once nothing is in flight."""
        return min(self.purse.left.plus(self.purse.reserved).minus(needed)) >= 0

    def warn(self) -> None:
        """Log, once each, the shares of caps that are passed; of several at once the highest."""
        spent = self.spent()
        for name, cap in _limits(self.terms.caps):
            value = getattr(spent, name)
            passed = {(name, share) for share in self.terms.warn_at if value >= share * cap}
            if passed - self._warned:
                self._warned |= passed
                part = f"{100 * value / cap:.0f} % of the budget"
                logger.warning("%s: %s of %s", part, said(name, value), said(name, cap))

    def report(self) -> dict[str, Json]:
        """Return, by limit, what is spent of which cap."""
        spent = self.spent()
        return {
            key: {"spent": getattr(spent, name) / unit, "cap": cap / unit}
            for name, cap in _limits(self.terms.caps)
            for key, unit in [SHOWN[name]]
        }

    def refusal(self, needed: Amount) -> str:
        """Say what is exhausted, and keep what was needed."""
        self.needed = needed
        spent = self.spent()
        short = [
            f"{said(name, getattr(spent, name))} are spent of {said(name, cap)}, and the next item "
            f"may take {said(name, getattr(needed, name))}"
            for name, cap in _limits(self.terms.caps)
            if getattr(spent.plus(self.purse.reserved).plus(needed), name) > cap
        ]
        return f"the budget is exhausted: {'; '.join(short)}"


def _limits(caps: Caps) -> list[tuple[str, int]]:
    pairs = zip(Amount._fields, caps.each(), strict=True)
    return [(name, cap) for name, cap in pairs if cap is not None]


def _left(caps: Caps, before: Amount) -> Caps:
    pairs = zip(caps.each(), before, strict=True)
    return Caps(*(None if cap is None else max(0, cap - spent) for cap, spent in pairs))


def said(name: str, value: int) -> str:
    """Return one field of an amount in words, e.g. ``12.50 USD``."""
    if name == "nano_usd":
        return f"{value / NANO:,.2f} USD" if value >= _FINE else f"{value / NANO:.6f} USD"
    if name == "node_ms":
        digits = 2 if 10 * value >= HOUR_MS else 4
        return f"{value / HOUR_MS:,.{digits}f} node-hours"
    return f"{value:,} {name}"
