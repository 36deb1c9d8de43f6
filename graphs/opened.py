"""An open run whose endpoints this process asks itself, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends.accounts.budget import Budget
from ..backends.accounts.endpoints import FILE, append_endpoints
from ..backends.accounts.folder import RunFolder
from ..backends.contract.errors import LedgerError
from ..backends.fleet.fleet import Fleet
from ..nodes.context import RunTools
from .spending import Spending, watched

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun(RunTools):
    """The tools of a run, and its fleet for whoever watches.

    Attributes:
        fleet: The fleet; None when nothing is to be asked, or workers elsewhere ask.
        budget: What the run may spend.
    """

    fleet: Fleet | None = None
    budget: Budget | None = None


@asynccontextmanager
async def spent_in(spending: Spending, run: OpenedRun) -> AsyncIterator[None]:
    """Watch the budget of an open run while the block runs."""

    def nodes() -> tuple[int, int]:
        if run.crew is not None:
            return run.crew.nodes
        return (0, 0) if run.fleet is None else run.fleet.nodes

    terms = spending.budget.terms
    timed = terms.caps.node_ms is not None or terms.tariff.node > 0
    async with watched(spending, run.gate, nodes, timed):
        yield


def reports_of(fleet: Fleet) -> Callable[[], list[dict[str, Any]]]:
    """Return what tells what each endpoint of a fleet did."""
    return lambda: [asdict(report) for report in fleet.report()]


def endpoints_file(folder: RunFolder) -> Path:
    """Return the table of what each endpoint did in each life."""
    return folder.path / FILE


@asynccontextmanager
async def reported(
    reports: Callable[[], list[dict[str, Any]]], folder: RunFolder, life: int
) -> AsyncIterator[None]:
    """Write what each endpoint did when the block ends, however it ends.

    Args:
        reports: Returns it, a row per endpoint.
        folder: The run's folder.
        life: The life's number, from 1.
    """
    try:
        yield
    finally:
        found = [row for row in reports() if row["calls"] or row["opened"]]
        try:
            await asyncio.to_thread(append_endpoints, endpoints_file(folder), found, life)
        except LedgerError as error:
            logger.warning("%s", error.message)  # the run's own end matters more
