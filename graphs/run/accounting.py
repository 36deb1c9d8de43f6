"""An open run with its fleet, node time and endpoint reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ...backends.batch.transport import BatchTransport
from ...backends.budget.budget import Budget, RunBudget
from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import JournalError
from ...backends.core.money import NANO_PER_USD, TokenPrices
from ...backends.core.silence import SilenceWatch
from ...backends.core.types import Usage
from ...backends.fleet.fleet import Fleet
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.endpoints_table import FILE_NAME, append_endpoints
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder
from ...nodes.context import RunTools
from .node_time import NodeTimeMeter, meter_node_time, open_time_log
from .open_calls import record_open_calls

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenRun(RunTools):
    """An open run: the tools of its nodes, and its fleet for reports.

    Attributes:
        store: The items of the run.
        item_journal: The journal of the run.
        budget: The budget of the run, or None.
        fleet: The fleet; None if no item is open or workers send the requests.
        silence: Which endpoints answer nothing.
        batches: The transport of batches, if they answer the requests.
        is_level: Whether the run is a level of an operator, whose results nobody opens as a file.
    """

    store: ItemStore
    item_journal: Journal
    budget: Budget | None = None
    fleet: Fleet | None = None
    silence: SilenceWatch = field(default_factory=SilenceWatch)
    batches: BatchTransport | None = None
    is_level: bool = False


@asynccontextmanager
async def charge_node_time(
    run: OpenRun, spending: RunBudget | None, logs: SpendLogs, session: int
) -> AsyncIterator[None]:
    """Charge the node time of an open run while the block runs.

    Args:
        run: The run.
        spending: Its budget; None means no limit.
        logs: Its spend logs.
        session: The session number, from 1.

    Raises:
        JournalError: A spend log cannot be created.
    """

    def nodes() -> tuple[int, int]:
        if run.coordinator is not None:
            return run.coordinator.nodes
        return (0, 0) if run.fleet is None else run.fleet.nodes

    async with open_time_log(spending, logs, session) as write:
        meter = NodeTimeMeter(nodes, run.token_prices, run.progress.add_node_time, write)
        async with (
            record_open_calls(run.open_calls, run.token_prices, write),
            meter_node_time(meter, run.gate, spending),
        ):
            yield


def make_reporter(fleet: Fleet) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that reports the statistics of each endpoint."""
    return lambda: [asdict(one) for one in fleet.report() if one.calls or one.opened]


@asynccontextmanager
async def write_reports_at_end(
    reports: Callable[[], list[dict[str, Any]]],
    folder: RunFolder,
    session: int,
    prices: TokenPrices,
) -> AsyncIterator[None]:
    """Write the endpoint statistics when the block ends, also after an error.

    Args:
        reports: Returns one row per endpoint.
        folder: The run's folder.
        session: The session number, from 1.
        prices: Prices of tokens.
    """
    try:
        yield
    finally:
        found = [_row(row, prices) for row in reports() if row["calls"] or row["opened"]]
        try:
            await asyncio.to_thread(append_endpoints, folder.path / FILE_NAME, found, session)
        except JournalError as error:
            logger.warning("%s", error.message)  # the error that ended the run matters more


def _row(report: Mapping[str, Any], prices: TokenPrices) -> dict[str, Any]:
    """Return a report as a table row, with wasted tokens and cost."""
    row = dict(report)
    lost = Usage(row.pop("lost_prompt_tokens"), row.pop("lost_completion_tokens"))
    paid = Usage(row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"])
    usd = (prices.nano_usd(paid) + prices.nano_usd(lost)) / NANO_PER_USD
    wasted = paid.tokens + lost.tokens - row["useful_tokens"]
    return {**row, "wasted_tokens": wasted, "usd": usd if prices.priced else None}
