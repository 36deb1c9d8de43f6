"""An open run whose endpoints this process asks itself, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...backends.budget.budget import Budget, Spending
from ...backends.budget.spend_log import Shelf
from ...backends.core.errors import LedgerError
from ...backends.core.money import NANO, Tariff
from ...backends.core.types import Usage
from ...backends.fleet.fleet import Fleet
from ...backends.storage.endpoints_table import FILE, append_endpoints
from ...backends.storage.journal_index import Ledger
from ...backends.storage.run_folder import RunFolder
from ...nodes.context import RunTools
from .node_time import Timesheet, noting, watched

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun(RunTools):
    """The tools of a run, and its fleet for whoever watches.

    Attributes:
        fleet: The fleet; None when nothing is to be asked, or workers elsewhere ask.
        budget: What the run may spend.
        journal: Its ledger, for whoever adds up.
    """

    fleet: Fleet | None = None
    budget: Budget | None = None
    journal: Ledger | None = None


@asynccontextmanager
async def accounted(
    run: OpenedRun, spending: Spending | None, shelf: Shelf, life: int
) -> AsyncIterator[None]:
    """Account for what an open run spends besides its calls, while the block runs.

    Args:
        run: The run.
        spending: Its budget; None is no limit.
        shelf: Its books.
        life: The life's number, from 1.

    Raises:
        LedgerError: A book cannot be created.
    """

    def nodes() -> tuple[int, int]:
        if run.crew is not None:
            return run.crew.nodes
        return (0, 0) if run.fleet is None else run.fleet.nodes

    async with noting(spending, shelf, life) as note:
        sheet = Timesheet(nodes, run.tariff, run.progress.hold, note)
        async with watched(sheet, run.gate, spending):
            yield


def reports_of(fleet: Fleet) -> Callable[[], list[dict[str, Any]]]:
    """Return what tells what each endpoint of a fleet did."""
    return lambda: [asdict(report) for report in fleet.report()]


def endpoints_file(folder: RunFolder) -> Path:
    """Return the table of what each endpoint did in each life."""
    return folder.path / FILE


@asynccontextmanager
async def reported(
    reports: Callable[[], list[dict[str, Any]]], folder: RunFolder, life: int, tariff: Tariff
) -> AsyncIterator[None]:
    """Write what each endpoint did when the block ends, however it ends.

    Args:
        reports: Returns it, a row per endpoint.
        folder: The run's folder.
        life: The life's number, from 1.
        tariff: What tokens cost.
    """
    try:
        yield
    finally:
        found = [_row(row, tariff) for row in reports() if row["calls"] or row["opened"]]
        try:
            await asyncio.to_thread(append_endpoints, endpoints_file(folder), found, life)
        except LedgerError as error:
            logger.warning("%s", error.message)  # the run's own end matters more


def _row(report: Mapping[str, Any], tariff: Tariff) -> dict[str, Any]:
    """Return a report as the table keeps it: with what was wasted, and what it cost."""
    row = dict(report)
    lost = Usage(row.pop("lost_prompt_tokens"), row.pop("lost_completion_tokens"))
    paid = Usage(row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"])
    usd = (tariff.nano_usd(paid) + tariff.nano_usd(lost)) / NANO
    wasted = paid.tokens + lost.tokens - row["useful_tokens"]
    return {**row, "wasted_tokens": wasted, "usd": usd if tariff.priced else None}
