"""The budget of an open run: from its settings, its books and its journal."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...configs.budget import BudgetConfig
from ...configs.models import RunConfig
from ..core.errors import BudgetExhaustedError
from ..core.money import FREE, Amount, Caps, Tariff
from ..core.types import Json
from ..storage.journal import RunIds
from ..storage.journal_index import Ledger
from ..storage.run_folder import RunFolder, read_allowed, read_requested, run_ids, write_allowed
from .budget import SHOWN, Budget, BudgetTerms
from .leases import Leases
from .pricing import tariff
from .spend_log import Shelf


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
