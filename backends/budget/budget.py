"""Budget of an open run, and its leases."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from ...configs.models import BudgetConfig, RunConfig
from ..core.errors import BudgetExhaustedError, LedgerError
from ..core.money import FREE, HOUR_MS, NANO, Amount, Caps, Tariff
from ..core.protocols import Count
from ..core.types import Json
from ..storage.journal import RunIds
from ..storage.journal_index import Ledger
from ..storage.run_folder import RunFolder, read_allowed, read_requested, run_ids, write_allowed
from .pricing import tariff
from .reservations import ItemAccount, Purse
from .spend_log import Book, Lease, Shelf

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


@dataclass(frozen=True, slots=True)
class Spending:
    """A budget in use.

    Attributes:
        budget: What is left.
        leases: What workers elsewhere have of it.
        shelf: The run's books.
    """

    budget: Budget
    leases: Leases
    shelf: Shelf


def caps_of(folder: RunFolder, config: BudgetConfig) -> Caps:
    """Return a run's caps: the settings', with what was allowed at a pause on top.

    Raises:
        LedgerError: What was allowed cannot be read.
    """
    given = config.model_dump(include={key for key, _ in SHOWN.values()})
    return Caps.of(**{**given, **read_allowed(folder.caps)})


def allow(folder: RunFolder, answer: Any, *, requested: bool = False) -> str | None:
    """Take an answer to a pause as the run's new caps; return what is wrong with it, or None.

    Args:
        folder: The run's folder.
        answer: The answer.
        requested: Whether it comes from a request.

    Raises:
        LedgerError: The caps cannot be read or written.
    """
    names = [key for key, _ in SHOWN.values()]
    if not isinstance(answer, Mapping) or not answer or answer.keys() - set(names):
        return f"answer with new totals, e.g. {{'usd': 20}}; names: {', '.join(names)}"
    if truths := [key for key, value in answer.items() if isinstance(value, bool)]:
        return f"{truths[0]}: give a number"
    try:
        asked = BudgetConfig.model_validate(dict(answer))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    checked = asked.model_dump(include=set(answer))
    before = read_requested(folder.caps)
    marked = before | checked.keys() if requested else before - checked.keys()
    write_allowed(folder.caps, {**read_allowed(folder.caps), **checked}, marked)
    return None


def lower_allowed(folder: RunFolder, most: Mapping[str, float]) -> None:
    """Lower the caps that requests have set to what their graph is bound to now.

    Args:
        folder: The run's folder.
        most: The bound totals by name.

    Raises:
        LedgerError: The caps cannot be read or written.
    """
    caps, requested = read_allowed(folder.caps), read_requested(folder.caps)
    lowered = dict(caps)
    for key in requested & most.keys():
        cap: Any = caps[key]
        lowered[key] = most[key] if cap is None else min(cap, most[key])
    if lowered != caps:
        write_allowed(folder.caps, lowered, requested)


def spent_before(shelf: Shelf, ledger: Ledger) -> Amount:
    """Return the most that all lives so far may have spent.

    Raises:
        LedgerError: A book is damaged.
    """
    return shelf.spent({life: spent.amount for life, spent in ledger.spent.items()})


def budget_terms(folder: RunFolder, config: RunConfig, price: Tariff) -> BudgetTerms:
    """Return what a run's budget is."""
    repairs = 0 if config.task.graph else config.task.repairs
    caps = caps_of(folder, config.budget)
    return BudgetTerms(caps, price, repairs, tuple(config.budget.warn_at))


@asynccontextmanager
async def spending(
    folder: RunFolder, config: RunConfig, price: Tariff, ledger: Ledger, run: RunIds
) -> AsyncIterator[Spending | None]:
    """Open a run's budget; None when it has no limits.

    Raises:
        LedgerError: A book is damaged, or cannot be written.
    """
    terms = await asyncio.to_thread(budget_terms, folder, config, price)
    if not terms.caps.any:
        yield None
        return
    opened = await asyncio.to_thread(_opened, folder, terms, ledger, run)
    try:
        yield opened
    finally:
        opened.leases.give_up()
        await opened.budget.purse.aclose()


def _opened(folder: RunFolder, terms: BudgetTerms, ledger: Ledger, run: RunIds) -> Spending:
    shelf = Shelf(folder.budget, run)
    before, earlier = spent_before(shelf, ledger), shelf.lent()
    budget = Budget(terms, before, shelf.open(shelf.of_life(ledger.life)))
    return Spending(budget, Leases(budget.purse, shelf, earlier), shelf)


def shortfall(
    folder: RunFolder, config: RunConfig, needed: Amount, live: Budget | None
) -> dict[str, Json] | None:
    """Return what to ask of the user while a run's budget does not carry something, or None.

    Args:
        folder: The run's folder.
        config: Its settings.
        needed: What could not be reserved.
        live: The run's budget, if it is open: one that has refused something is exhausted.

    Raises:
        BudgetExhaustedError: The settings say to stop rather than to ask.
        LedgerError: Books or journal cannot be read.
    """
    about = folder.read_provenance()
    with Ledger(folder.journal, run_ids(about), about["input"]["items"]) as ledger:
        counts, budget = ledger.counts(), live
        if budget is None:
            before = spent_before(Shelf(folder.budget, run_ids(about)), ledger)
            budget = Budget(_terms(folder, config, about), before, None)
    if not (live is not None and live.needed) and budget.carries(needed):
        return None
    refusal = budget.refusal(needed)
    if config.budget.on_limit == "stop":
        raise BudgetExhaustedError(refusal)
    return {
        "question": f"{refusal}. Answer with a higher total, e.g. {_example(budget)}.",
        "why": refusal,
        "budget": budget.report(),
        "items": {"done": counts.done, "failed": counts.failed, "open": counts.open},
        "total_to_finish": _to_finish(budget, counts.done + counts.failed, counts.open),
    }


def _terms(folder: RunFolder, config: RunConfig, about: Mapping[str, Any]) -> BudgetTerms:
    price = tariff(config, about["model"], about["simulated"])
    return budget_terms(folder, config, price or FREE)


def _to_finish(budget: Budget, ended: int, left: int) -> dict[str, Json]:
    """Return what all items will have taken, by what those that ended have."""
    spent, report = budget.spent(), budget.report()
    if not ended:
        return {}
    return {
        key: _rounded(getattr(spent, name) * (ended + left) / ended, unit)
        for name, (key, unit) in SHOWN.items()
        if key in report
    }


def _rounded(value: float, unit: int) -> float:
    """Return a value in what a user counts, rounded up; money to the cent or a millionth."""
    if unit == 1:
        return math.ceil(value)
    digits = 2 if value > unit else 6
    return math.ceil(value / unit * float(10**digits)) / float(10**digits)


def _example(budget: Budget) -> str:
    """Return an answer that would do, as a user writes it."""
    return "{" + ", ".join(f'"{k}": {2 * v["cap"]:g}' for k, v in budget.report().items()) + "}"
