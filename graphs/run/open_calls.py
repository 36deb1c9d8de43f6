"""Calls of items without a record: the most that they may have cost, in a spend log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from ...backends.budget.spend_log import SpendLogs
from ...backends.core.errors import JournalError
from ...backends.core.money import Amount, TokenPrices
from ...backends.core.protocols import CallLog
from ...backends.fleet.request import max_usage
from .node_time import LineWriter, WriteLine

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_TICK_S: Final = 1.0
_SHARE: Final = 400
"""Sums take at most one part in so many of the time."""
_SHARE_AT_GROWTH: Final = 50
"""The same while the number of calls in flight grows."""


@asynccontextmanager
async def record_open_calls(
    open_calls: Mapping[int, CallLog], prices: TokenPrices, write: WriteLine
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Record what calls of items without a record may cost, while the block runs.

    After a kill, the last line counts. A line therefore follows at once when more calls are in
    flight than before, and each line covers the interval before it too. The line at the end is
    exact: it contains the items that were cut off.

    Args:
        open_calls: The calls of the items that have no record yet.
        prices: Prices of tokens.
        write: Appends a line to the spend log.

    Yields:
        A function that records the exact amount at once.
    """
    noted, before, most = Amount(), Amount(), 0
    writing = asyncio.Lock()

    async def note(amount: Amount) -> None:
        nonlocal noted
        if amount == noted:
            return
        try:
            await write({"open": amount.to_json()})
        except JournalError as error:
            logger.warning("%s", error.message)  # the run ends at the journal's next failing write
        noted = amount  # not if cancelled: the line may not have been written

    async def record_now() -> None:
        nonlocal before, most
        async with writing:
            most = _count_in_flight(open_calls)
            before = sum_open_calls(open_calls.values(), prices)
            await note(before)

    async def follow() -> None:
        nonlocal before, most
        due = 0.0
        while True:
            await asyncio.sleep(_POLL_S)
            if _count_in_flight(open_calls) <= most and time.monotonic() < due:
                continue
            async with writing:
                began = time.monotonic()
                most = _count_in_flight(open_calls)
                now, earlier = sum_open_calls(open_calls.values(), prices), before
                took_s, before = time.monotonic() - began, now
                await note(now.maximum(earlier))
            due = began + max(_TICK_S, _SHARE * took_s)
            await asyncio.sleep(_SHARE_AT_GROWTH * took_s)

    task = asyncio.create_task(follow())
    try:
        yield record_now
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await record_now()


def _count_in_flight(open_calls: Mapping[int, CallLog]) -> int:
    return sum(len(log.sent) for log in open_calls.values())


def sum_open_calls(logs: Iterable[CallLog], prices: TokenPrices) -> Amount:
    """Return the most that the calls of items without a record may have cost."""
    total = Amount()
    for log in logs:
        usage = log.usage + log.lost
        for body in tuple(log.sent.values()):
            usage += max_usage(body)
        total = total.plus(prices.amount(usage, log.requests))
    return total


@asynccontextmanager
async def record_worker_calls(
    open_calls: Mapping[int, CallLog],
    prices: TokenPrices,
    logs: SpendLogs,
    session: int,
    worker: str,
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Record the open calls of a worker in a spend log of its own, while the block runs.

    The file is created when the first request is sent.

    Args:
        open_calls: The calls of the items that have no record yet.
        prices: Prices of tokens.
        logs: The spend logs of the run, in the shared folder.
        session: Number of the coordinator's session.
        worker: Host and process, e.g. ``node17:4242``.

    Yields:
        A function that records the exact amount at once.
    """
    writer = LineWriter(lambda: logs.create(logs.worker_path(session, worker)))
    try:
        async with record_open_calls(open_calls, prices, writer.write) as record_now:
            yield record_now
    finally:
        writer.close()
