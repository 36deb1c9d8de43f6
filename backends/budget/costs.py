"""What a run has cost: added up while it is open, or from what lies in its folder; in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ...configs.budget import BudgetConfig
from ...configs.load import peek
from ..core.money import FREE, NANO
from ..core.types import Json
from ..storage.journal import RunIds, Spent
from ..storage.run_folder import RunFolder
from .budget import Budget, BudgetTerms, said
from .cost import Cost, total_of
from .spend_log import Shelf
from .spending import caps_of

_FINE: Final = 0.1 * NANO
"""Where all amounts are smaller, they are shown with more digits."""


def cost_so_far(folder: RunFolder, run: RunIds, lives: Mapping[int, Spent]) -> Cost:
    """Return what a run has cost, by what lies in its folder; blocks.

    Args:
        folder: The folder.
        run: The run's ids.
        lives: By life, what the journal says.

    Raises:
        LedgerError: A book is damaged.
    """
    shelf, total = Shelf(folder.budget, run), total_of(lives)
    doubt = shelf.doubt({life: spent.amount for life, spent in lives.items()})
    return Cost(total, shelf.held(), doubt, total.nano_usd > 0)


def budget_so_far(folder: RunFolder, cost: Cost) -> dict[str, Json]:
    """Return, by limit, what is spent of which cap, what is in doubt included; blocks.

    Raises:
        ConfigurationError: The settings' budget is none.
        LedgerError: The caps cannot be read.
    """
    config = BudgetConfig.model_validate(peek(folder.settings)[0].get("budget") or {})
    before = cost.spent.amount.plus(cost.held.amount).plus(cost.doubt)
    return Budget(BudgetTerms(caps_of(folder, config), FREE), before, None).report()


def in_words(cost: Cost, *, timed: bool) -> Iterator[str]:
    """Yield lines that say what a run has cost; none where nothing has a price.

    Args:
        cost: What it has cost.
        timed: Whether node-hours matter though they have no price.
    """
    priced, held = cost.nano_usd is not None, cost.held
    parts = [dollars(cost)] * priced + [nodes(cost)] * bool(timed or held.nano_usd)
    if parts:
        yield f"Cost: {'; '.join(parts)}"
    if more := doubts(cost):
        yield f"In doubt, and counted against the budget: up to {more}"


def dollars(cost: Cost) -> str:
    """Return dollars in words, e.g. ``3.21 USD, of which up to 0.12 wasted``."""
    total, wasted = cost.nano_usd or 0, cost.spent.wasted_nano_usd
    words = f"{figure(total, total)} USD"
    if not wasted:
        return words
    bound = "up to " if cost.spent.lost_tokens else ""
    return f"{words}, of which {bound}{figure(wasted, total)} wasted"


def figure(nano_usd: int, largest: int) -> str:
    """Return dollars with as many digits as the largest of several amounts needs."""
    return f"{nano_usd / NANO:,.2f}" if largest >= _FINE else f"{nano_usd / NANO:.6f}"


def nodes(cost: Cost) -> str:
    """Return node-hours in words, e.g. ``2.00 node-hours held, 0.10 idle, for 5.00 USD``."""
    held = cost.held
    idle = said("node_ms", held.idle_ms).removesuffix(" node-hours")
    price = f", for {said('nano_usd', held.nano_usd)}" if held.nano_usd else ""
    return f"{said('node_ms', held.node_ms)} held, {idle} idle{price}"


def doubts(cost: Cost) -> str:
    """Return what is in doubt, in words; empty if nothing is."""
    shown = cost.doubt.to_json()
    if cost.nano_usd is None:
        del shown["nano_usd"]
    return ", ".join(said(name, value) for name, value in shown.items() if value)
