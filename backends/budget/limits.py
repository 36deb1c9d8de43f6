"""Limits of a budget as they are read and shown; needs neither balance nor event loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from ..core.money import MS_PER_HOUR, NANO_PER_USD, Amount, BudgetLimits
from ..core.types import Json
from ..storage.journal_file import ItemCounts
from ..storage.run_folder import RunFolder, read_raised_limits

SETTING_UNITS: Final[dict[str, tuple[str, int]]] = {
    "requests": ("requests", 1),
    "tokens": ("tokens", 1),
    "nano_usd": ("usd", NANO_PER_USD),
    "node_ms": ("node_hours", MS_PER_HOUR),
}
"""By field of an amount: setting name, and number of the field's units in one unit of it."""

_FINE: Final = 0.1 * NANO_PER_USD
"""Below this amount, dollars are shown with more digits."""


def list_limits(caps: BudgetLimits) -> list[tuple[str, int]]:
    """Return the limits that are set: field of an amount, and its limit."""
    pairs = zip(Amount._fields, caps.as_tuple(), strict=True)
    return [(name, cap) for name, cap in pairs if cap is not None]


def format_amount(name: str, value: int) -> str:
    """Return one field of an amount in words, e.g. ``12.50 USD``."""
    if name == "nano_usd":
        return (
            f"{value / NANO_PER_USD:,.2f} USD"
            if value >= _FINE
            else f"{value / NANO_PER_USD:.6f} USD"
        )
    if name == "node_ms":
        digits = 2 if 10 * value >= MS_PER_HOUR else 4
        return f"{value / MS_PER_HOUR:,.{digits}f} node-hours"
    return f"{value:,} {name}"


def read_limits(folder: RunFolder, given: Mapping[str, float | None]) -> BudgetLimits:
    """Return a run's limits: those of the settings, overridden by those raised at a pause.

    Args:
        folder: The run folder.
        given: The limits of the settings, by their names there.

    Raises:
        JournalError: The raised limits cannot be read.
    """
    return BudgetLimits.from_settings(**{**given, **read_raised_limits(folder.raised_limits)})


def report_limits(limits: BudgetLimits, spent: Amount) -> dict[str, Json]:
    """Return, by limit, what is spent of it and its amount, in the units of the settings."""
    return {
        key: {"spent": getattr(spent, name) / unit, "cap": cap / unit}
        for name, cap in list_limits(limits)
        for key, unit in [SETTING_UNITS[name]]
    }


def estimate_total(
    spent: Amount, settled: Amount, limits: BudgetLimits, counts: ItemCounts
) -> dict[str, Json]:
    """Estimate the total for all items, by limit; empty before the first item has ended.

    Items taken over from another run cost nothing, and are no measure of further items.

    Args:
        spent: What counts as spent, amounts in doubt included.
        settled: The part of it that the ended items and the nodes are known to have used. Only this
            part is extrapolated: a killed session's reservations are no measure of further items.
        limits: The budget's limits.
        counts: Items of the run.
    """
    ended = counts.done + counts.failed - counts.taken_over
    if ended <= 0:
        return {}
    return {
        key: _round_up(getattr(spent, name) + getattr(settled, name) * counts.open / ended, unit)
        for name, _ in list_limits(limits)
        for key, unit in [SETTING_UNITS[name]]
    }


def _round_up(value: float, unit: int) -> float:
    """Return a value in the user's unit, rounded up; money to the cent or a millionth."""
    if unit == 1:
        return math.ceil(value)
    digits = 2 if value > unit else 6
    return math.ceil(value / unit * float(10**digits)) / float(10**digits)
