"""An open run whose endpoints this process asks itself, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...backends.budget.budget import Budget, RunBudget
from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import JournalError
from ...backends.core.money import NANO_PER_USD, TokenPrices
from ...backends.core.types import Usage
from ...backends.fleet.fleet import Fleet
from ...backends.storage.endpoints_table import FILE_NAME, append_endpoints
from ...backends.storage.journal_index import Journal
from ...backends.storage.run_folder import RunFolder
from ...nodes.context import RunTools
from .node_time import NodeTimeMeter, meter_node_time, open_time_log

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
    journal: Journal | None = None


@asynccontextmanager
async def charge_node_time(
    run: OpenedRun, spending: RunBudget | None, shelf: SpendLogs, life: int
) -> AsyncIterator[None]:
    """Account for what an open run spends besides its calls, while the block runs.

    Args:
        run: The run.
        spending: Its budget; None is no limit.
        shelf: Its books.
        life: The life's number, from 1.

    Raises:
        JournalError: A book cannot be created.
    """

    def nodes() -> tuple[int, int]:
        if run.coordinator is not None:
            return run.coordinator.nodes
        return (0, 0) if run.fleet is None else run.fleet.nodes

    async with open_time_log(spending, shelf, life) as note:
        sheet = NodeTimeMeter(nodes, run.token_prices, run.progress.add_node_time, note)
        async with meter_node_time(sheet, run.gate, spending):
            yield


def make_reporter(fleet: Fleet) -> Callable[[], list[dict[str, Any]]]:
    """Return what tells what each endpoint of a fleet did."""
    return lambda: [asdict(report) for report in fleet.report()]


def endpoints_table_path(folder: RunFolder) -> Path:
    """Return the table of what each endpoint did in each life."""
    return folder.path / FILE_NAME


@asynccontextmanager
async def write_reports_at_end(
    reports: Callable[[], list[dict[str, Any]]], folder: RunFolder, life: int, tariff: TokenPrices
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
            await asyncio.to_thread(append_endpoints, endpoints_table_path(folder), found, life)
        except JournalError as error:
            logger.warning("%s", error.message)  # the run's own end matters more


def _row(report: Mapping[str, Any], tariff: TokenPrices) -> dict[str, Any]:
    """Return a report as the table keeps it: with what was wasted, and what it cost."""
    row = dict(report)
    lost = Usage(row.pop("lost_prompt_tokens"), row.pop("lost_completion_tokens"))
    paid = Usage(row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"])
    usd = (tariff.nano_usd(paid) + tariff.nano_usd(lost)) / NANO_PER_USD
    wasted = paid.tokens + lost.tokens - row["useful_tokens"]
    return {**row, "wasted_tokens": wasted, "usd": usd if tariff.priced else None}
