"""What all calls of one tool may ask for and spend together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

from langchain_core.tools import ToolException

from ...backends.budget.budget import spent_before
from ...backends.budget.spend_log import Shelf
from ...backends.core.money import NANO, Amount
from ...backends.storage.journal_index import Ledger
from ...backends.storage.run_folder import open_folder, run_ids
from ...configs.loader import Loaded, load
from ...configs.models import BudgetConfig

_CAPS: Final = ("usd", "tokens", "requests")
_REPORT: Final = "Report this to the user: only the tool's owner can allow more."


class Allowance:
    """Items and budget over all calls; what one call may still spend is what the others left.

    Args:
        loaded: The settings; their ``budget`` holds for all calls together, or for each.
        most_items: Most items over all calls; None sets no limit.
        each: Whether the budget is each call's.
    """

    def __init__(self, loaded: Loaded, most_items: int | None, *, each: bool) -> None:
        self._loaded, self._caps = loaded, {} if each else _capped(loaded.config.budget)
        self._most = self._left = most_items
        self._spent, self._busy = Amount(), False
        self._lock = threading.Lock()  # sync calls come from several threads

    def begin(self, items: int) -> Loaded:
        """Take so many items; return the settings of a call, its budget being what is left.

        Every call that begins must :meth:`end`. Blocks.

        Raises:
            ToolException: So much is not left, or another call is spending it.
        """
        with self._lock:
            loaded = self._bounded() if self._caps else self._loaded
            self._take(items)
            self._busy = bool(self._caps)
            return loaded

    def paused(self, items: int) -> int:
        """Give items back that a call will take again when its graph goes on; return what is left.

        Args:
            items: What it has taken.
        """
        with self._lock:
            self._left = None if self._left is None else self._left + items
        return 0

    def end(self, items: int, folder: Path) -> None:
        """Count what a call has spent; blocks.

        Args:
            items: What it has taken; given back if it made no run, for then nothing was asked.
            folder: Its run folder.
        """
        with self._lock:
            self._busy = False
            if not folder.exists():
                self._left = None if self._left is None else self._left + items
            elif self._caps:
                self._spent = self._spent.plus(_spent_in(folder))

    def _take(self, items: int) -> None:
        if self._left is None or items <= self._left:
            self._left = None if self._left is None else self._left - items
            return
        msg = (
            f"{items:,} items are more than the {self._left:,} left of the {self._most:,} that "
            f"this tool's owner allows. {'Ask for fewer.' if self._left else _REPORT}"
        )
        raise ToolException(msg)

    def _bounded(self) -> Loaded:
        if self._busy:
            msg = "Another call of this tool is spending its budget; call again when it has ended."
            raise ToolException(msg)
        spent = {
            "usd": self._spent.nano_usd / NANO,
            "tokens": self._spent.tokens,
            "requests": self._spent.requests,
        }
        left = {key: cap - spent[key] for key, cap in self._caps.items()}
        if gone := [key for key, rest in left.items() if rest <= 0]:
            msg = f"The budget of this tool is spent ({', '.join(gone)}). {_REPORT}"
            raise ToolException(msg)
        changes = {f"budget.{key}": rest for key, rest in left.items()}
        return load(self._loaded.raw, settings={**changes, "budget.on_limit": "stop"})


def _capped(budget: BudgetConfig) -> dict[str, Any]:
    return {key: cap for key in _CAPS if (cap := getattr(budget, key)) is not None}


def _spent_in(path: Path) -> Amount:
    """Return the most that a run may have spent."""
    folder = open_folder(path)
    about = folder.read_provenance()
    with Ledger(folder.journal, run_ids(about), about["input"]["items"]) as ledger:
        return spent_before(Shelf(folder.budget, run_ids(about)), ledger)
