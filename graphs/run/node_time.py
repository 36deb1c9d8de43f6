"""Node time: measure it, record it in the run's spend log, and charge it to the budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeAlias

from ...backends.budget.budget import Budget, RunBudget
from ...backends.budget.spend_log import SpendLog, SpendLogs
from ...backends.core.errors import BudgetExhaustedError, FanfoldError, JournalError
from ...backends.core.money import Amount, NodeTime, TokenPrices
from ...backends.core.types import Json
from ...nodes.shard.gate import Gate

logger = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_NOTE_S: Final = 5.0
_RECOVER_S: Final = 15.0

ReadNodeCounts: TypeAlias = Callable[[], tuple[int, int]]
"""Returns the number of nodes that are held, and of those that work."""

WriteLine: TypeAlias = Callable[[Mapping[str, Json]], Awaitable[None]]
"""Appends a line to a spend log."""


@asynccontextmanager
async def open_time_log(
    spending: RunBudget | None, logs: SpendLogs, session: int
) -> AsyncIterator[WriteLine]:
    """Open a session's spend log for node time and open calls: the budget's, or a separate one.

    Raises:
        JournalError: The spend log cannot be created.
    """
    if spending is not None:
        balance = spending.budget.balance
        yield lambda line: balance.append_line(line, sync=False)
        return
    writer = LineWriter(lambda: logs.create(logs.session_path(session)))
    try:
        await writer.open()
        yield writer.write
    finally:
        writer.close()


class LineWriter:
    """Appends lines to a spend log in a thread of its own, one after the other.

    A line's checksum continues that of the line before it, and a line whose caller is cancelled may
    still be in the thread: the next one must wait for it.

    Args:
        open_log: Returns the spend log; called in the thread, at the latest before the first line.
    """

    def __init__(self, open_log: Callable[[], SpendLog]) -> None:
        self._open_log = open_log
        self._log: SpendLog | None = None
        self._thread = ThreadPoolExecutor(1, "spend log")

    async def open(self) -> None:
        """Open the spend log.

        Raises:
            JournalError: It cannot be created.
        """
        await asyncio.wrap_future(self._thread.submit(self._open))

    async def write(self, line: Mapping[str, Json]) -> None:
        """Append a line.

        Raises:
            JournalError: It cannot be written.
        """
        await asyncio.wrap_future(self._thread.submit(self._append, line))

    def close(self) -> None:
        """Close the spend log after the last line."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _open(self) -> SpendLog:
        if self._log is None:
            self._log = self._open_log()
        return self._log

    def _append(self, line: Mapping[str, Json]) -> None:
        self._open().write(line, sync=False)

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()


class NodeTimeMeter:
    """Measures how long a session holds nodes.

    Args:
        nodes: Returns the number of nodes held, and of those that work.
        prices: Prices of node time.
        count: Receives each increment of node time.
        write: Appends it to the spend log.
    """

    def __init__(
        self,
        nodes: ReadNodeCounts,
        prices: TokenPrices,
        count: Callable[[NodeTime], None],
        write: WriteLine,
    ) -> None:
        self._nodes, self._prices, self._count, self._write_line = nodes, prices, count, write
        self._then, self._busy = time.monotonic(), 0
        self._held, self._noted = NodeTime(), NodeTime()

    def estimate_cost(self, seconds: float) -> Amount:
        """Return the cost of the nodes held now, at least one, for a number of seconds."""
        held, _ = self._nodes()
        return self._prices.node_amount(round(1000 * max(1, held) * seconds))

    def tick(self) -> Amount:
        """Count the time since the last tick; return its cost."""
        now = time.monotonic()
        held, busy = self._nodes()
        cost = self._prices.node_amount(round(1000 * held * (now - self._then)))
        idle = max(0, held - max(busy, self._busy))  # idle at both ends of the interval
        further = NodeTime(cost.node_ms, round(1000 * idle * (now - self._then)), cost.nano_usd)
        self._held, self._then, self._busy = self._held.plus(further), now, busy
        self._count(further)
        return cost

    async def write(self) -> None:
        """Record the node time, if it has changed."""
        if self._held == self._noted:
            return
        held = self._held
        try:
            await self._write_line({"held": held.to_json()})
        except JournalError as error:
            logger.warning("%s", error.message)  # the run ends at the journal's next failing write
        self._noted = held  # not if cancelled: the line may not have been written


@asynccontextmanager
async def meter_node_time(
    meter: NodeTimeMeter, gate: Gate, spending: RunBudget | None
) -> AsyncIterator[None]:
    """Count node time, and warn when the budget runs low, while the block runs.

    Args:
        meter: Measures the time.
        gate: Closed when no node-hours are left; a reserve lets the items in flight finish.
        spending: The budget; None means no limit.
    """
    charger = _make_charger(meter, gate, spending)
    if charger is not None:
        await charger.reserve()
    task = asyncio.create_task(_meter_loop(meter, charger, spending))
    try:
        yield
    finally:
        task.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await task
        finally:
            cost = meter.tick()
            if charger is not None:
                charger.close(cost)
            await meter.write()
            if spending is not None:
                spending.budget.warn()


def _make_charger(
    meter: NodeTimeMeter, gate: Gate, spending: RunBudget | None
) -> NodeTimeCharger | None:
    """Return a charger if node time is limited or has a price, else None."""
    if spending is None:
        return None
    settings = spending.budget.settings
    timed = settings.limits.node_ms is not None or settings.prices.node > 0
    return NodeTimeCharger(spending.budget, gate, meter) if timed else None


async def _meter_loop(
    meter: NodeTimeMeter, charger: NodeTimeCharger | None, spending: RunBudget | None
) -> None:
    noted = recovered = time.monotonic()
    logged = set[str]()
    while True:
        await asyncio.sleep(_TICK_S)
        cost, now = meter.tick(), time.monotonic()
        if charger is not None:
            charger.charge(cost)
        if now - noted > _NOTE_S:
            await meter.write()
            noted = now
        if spending is not None:
            spending.budget.warn()
            if now - recovered > _RECOVER_S:
                await _recover_leases(spending, logged)
                recovered = time.monotonic()


async def _recover_leases(spending: RunBudget, logged: set[str]) -> None:
    """Recover what lost workers did not spend; retry spend logs that cannot be read now.

    Args:
        spending: The budget.
        logged: Errors that were logged before.
    """
    try:
        await spending.leases.recover_lost()
    except (FanfoldError, OSError) as error:
        if str(error) not in logged:
            logged.add(str(error))
            logger.warning("%s; the lease counts as spent until it can be read", error)


class NodeTimeCharger:
    """Charges node time to a budget as it passes."""

    def __init__(self, budget: Budget, gate: Gate, meter: NodeTimeMeter) -> None:
        self._budget, self._gate, self._meter = budget, gate, meter
        self._unpaid, self._reserved = Amount(), Amount()

    async def reserve(self) -> None:
        """Reserve what the items in flight need to finish; close the gate if that is not left."""
        reserve = self._meter.estimate_cost(self._gate.drain_s + _TICK_S)
        try:
            await self._budget.balance.reserve(reserve)
        except BudgetExhaustedError as error:
            self._gate.close(error.message, error)
        else:
            self._reserved = self._budget.balance.set_aside = reserve

    def charge(self, cost: Amount) -> None:
        """Charge an interval; close the gate when the budget is exhausted."""
        self._unpaid = self._unpaid.plus(cost)
        spent = self._budget.balance.try_spend(self._unpaid)
        if spent is None:
            return  # the spend log is busy: charge it with the next interval
        if not spent:
            msg = self._budget.record_refusal(self._unpaid.plus(self._reserved))
            self._gate.close(msg, BudgetExhaustedError(msg))
            self._settle(self._unpaid)
        self._unpaid = Amount()

    def close(self, cost: Amount) -> None:
        """Charge the last interval, and release the reserve."""
        self._settle(self._unpaid.plus(cost))
        self._budget.balance.set_aside = Amount()
        self._budget.balance.settle(self._reserved, Amount())

    def _settle(self, cost: Amount) -> None:
        """Charge elapsed time to the rest of the budget, then to the reserve."""
        balance = self._budget.balance
        free = cost.minimum(balance.left.maximum(Amount()))
        balance.settle(Amount(), free)
        used = cost.minus(free).minimum(self._reserved)
        self._reserved = balance.set_aside = self._reserved.minus(used)
        balance.settle(used, used)
