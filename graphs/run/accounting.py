"""An open run with its fleet, node time and endpoint reports."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ...backends.batch.transport import BatchTransport
from ...backends.budget.budget import Budget, RunBudget
from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import JournalError
from ...backends.core.money import NANO_PER_USD, Amount, TokenPrices
from ...backends.core.protocols import CallLog
from ...backends.core.types import Usage
from ...backends.fleet.fleet import Fleet
from ...backends.fleet.request import max_usage
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.endpoints_table import FILE_NAME, append_endpoints
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder
from ...nodes.context import RunTools
from .node_time import NodeTimeMeter, WriteLine, meter_node_time, open_time_log

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenRun(RunTools):
    """An open run: the tools of its nodes, and its fleet for reports.

    Attributes:
        store: The items of the run.
        item_journal: The journal of the run.
        budget: The budget of the run, or None.
        fleet: The fleet; None if no item is open or workers send the requests.
        batches: The transport of batches, if they answer the requests.
    """

    store: ItemStore
    item_journal: Journal
    budget: Budget | None = None
    fleet: Fleet | None = None
    batches: BatchTransport | None = None


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
        async with _record_open_calls(run, write), meter_node_time(meter, run.gate, spending):
            yield


_POLL_S: Final = 0.05
_TICK_S: Final = 1.0
_SHARE: Final = 400
"""Sums take at most one part in so many of the time."""
_SHARE_AT_GROWTH: Final = 50
"""The same while the number of calls in flight grows."""


@asynccontextmanager
async def _record_open_calls(run: OpenRun, write: WriteLine) -> AsyncIterator[None]:
    """Record what calls of items without a record may cost, while the block runs.

    After a kill, the last line counts. A line therefore follows at once when more calls are in
    flight than before, and each line covers the interval before it too. The line at the end is
    exact: it contains the items that were cut off.
    """
    noted = Amount()

    async def note(amount: Amount) -> None:
        nonlocal noted
        if amount == noted:
            return
        noted = amount
        try:
            await write({"open": amount.to_json()})
        except JournalError as error:
            logger.warning("%s", error.message)  # the run ends at the journal's next failing write

    async def follow() -> None:
        most, before, due = 0, Amount(), 0.0
        while True:
            await asyncio.sleep(_POLL_S)
            in_flight = sum(len(log.sent) for log in run.open_calls.values())
            began = time.monotonic()
            if in_flight <= most and began < due:
                continue
            now = sum_open_calls(run.open_calls.values(), run.token_prices)
            took_s = time.monotonic() - began
            await note(now.maximum(before))
            most, before, due = in_flight, now, began + max(_TICK_S, _SHARE * took_s)
            await asyncio.sleep(_SHARE_AT_GROWTH * took_s)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await note(sum_open_calls(run.open_calls.values(), run.token_prices))


def sum_open_calls(logs: Iterable[CallLog], prices: TokenPrices) -> Amount:
    """Return the most that the calls of items without a record may have cost."""
    total = Amount()
    for log in logs:
        usage = log.usage + log.lost
        for body in tuple(log.sent.values()):
            usage += max_usage(body)
        total = total.plus(prices.amount(usage, log.requests))
    return total


def make_reporter(fleet: Fleet) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that reports the statistics of each endpoint."""
    return lambda: [asdict(report) for report in fleet.report()]


def endpoints_table_path(folder: RunFolder) -> Path:
    """Return the path of the table with statistics per endpoint and session."""
    return folder.path / FILE_NAME


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
            await asyncio.to_thread(append_endpoints, endpoints_table_path(folder), found, session)
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
