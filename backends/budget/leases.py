"""Leases: lend tasks parts of a run's budget, open and settle them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ...configs.models import RunConfig
from ..core.errors import BudgetExhaustedError, FanfoldError
from ..core.images import add_unread_images
from ..core.messages import WALLTIME_REASON, ShardResult, ShardTask
from ..core.money import Amount, BudgetLimits, TokenPrices
from ..core.request_urls import REQUEST_URLS, URL_FIELD
from ..core.types import CHAT_URL, Item, Json, Usage
from ..discovery.connect import make_model_params
from ..fleet.request import max_usage
from ..storage.run_folder import RunFolder
from .budget import Budget, BudgetSettings, RunBudget
from .spend_log import (
    CLOCK_SKEW_S,
    Lease,
    SpendLog,
    SpendLogs,
    open_spend_logs,
    read_lease_clock,
)

_POLL_S: Final = 1.0
LEASE_EXPIRED: Final = (
    f"{WALLTIME_REASON}: the task waited until its lease expired (backend.queue_s)"
)


@asynccontextmanager
async def open_lease(
    task: ShardTask, config: RunConfig, received: float | None = None
) -> AsyncIterator[Budget | None]:
    """Open the budget that a task may spend; None means no limit.

    It ends when the task's time has passed since its receipt, by the monotonic clock of this host,
    which also counts the time while the host is suspended: no change of a clock, and no difference
    between clocks, prolongs it.

    A task that is delivered twice may spend its lease once: the second waits until the first has
    ended, and then may spend nothing. A task that starts after its lease has expired may spend
    nothing either: the coordinator may have taken the lease back.

    Args:
        task: The task.
        config: The run's settings.
        received: When the task was received, by ``read_lease_clock``; None: now.

    Raises:
        JournalError: The spend log of the lease cannot be written.
    """
    lease = task.lease
    if lease is None:
        yield None
        return
    until = (read_lease_clock() if received is None else received) + task.deadline_s
    log, caps = None, lease["caps"]
    if expiry_reason(task):
        caps = dict.fromkeys(caps, 0)
    elif lease["booked"] and task.journal is not None:
        logs = await asyncio.to_thread(open_worker_logs, task)
        log = await asyncio.to_thread(_open_lease_log, logs, lease["name"], task.deadline_s)
        if log is None:
            await _wait_for_holder(logs, lease["name"])
            caps = dict.fromkeys(caps, 0)
    repairs = 0 if config.task.graph else config.task.repairs
    settings = BudgetSettings(BudgetLimits(**caps), TokenPrices(**task.tariff), repairs)
    budget = Budget(settings, Amount(), log, until)
    try:
        yield budget
    finally:
        await budget.balance.aclose()


def open_worker_logs(task: ShardTask) -> SpendLogs:
    """Return the spend logs of the run of a task whose worker shares the run folder; blocks.

    Raises:
        JournalError: The provenance of the run's pipeline cannot be read.
    """
    assert task.journal is not None, "the worker shares the folder"
    return open_spend_logs(RunFolder(Path(task.journal).parent), task.run["id"])


def expiry_reason(task: ShardTask) -> str | None:
    """Return why a task must not start now, or None."""
    until = float((task.lease or {}).get("until", float("inf")))
    return LEASE_EXPIRED if time.time() > until + CLOCK_SKEW_S else None


def _open_lease_log(logs: SpendLogs, name: str, term: float) -> SpendLog | None:
    """Create the spend log of a lease; return None if it was received or taken back before."""
    log = logs.create_lease_log(name)
    if log is not None:
        log.write({"until": max(0.0, time.time() + term), "term": max(0.0, term)}, sync=True)
    return log


async def _wait_for_holder(logs: SpendLogs, name: str) -> None:
    """Wait until the holder of a lease has settled it, or it expires."""
    began = read_lease_clock()
    while True:
        state = await asyncio.to_thread(logs.read_lease, name)
        if state.settled is not None or read_lease_clock() - began > state.term:
            return
        await asyncio.sleep(_POLL_S)


def is_lease_exhausted(error: Exception) -> bool:
    """Return True if a task ended because its lease is used up: the coordinator may lend more."""
    return isinstance(error, BudgetExhaustedError)


def spent_of_lease(budget: Budget | None) -> Amount | None:
    """Return what a task has spent of its lease, including open reservations.

    Return None for a lease that another worker holds.
    """
    if budget is None or not budget.settings.limits.can_spend:
        return None
    return budget.balance.settled.plus(budget.balance.reserved)


_PER_WORKER: Final = 2
"""A lease is at most the rest of the budget divided by this number, per worker."""
_MARGIN: Final = 5, 4
"""Factor of 5/4: future items are estimated to need a quarter more than those measured."""


class LeaseManager:
    """Lends parts of a run's budget to tasks.

    Args:
        spending: The budget, or None if it has no limits.
        config: The run's settings.
        model: The model's name.
        workers: Returns the number of workers now.
    """

    def __init__(
        self,
        spending: RunBudget | None,
        config: RunConfig,
        model: str,
        workers: Callable[[], int],
    ) -> None:
        self._spending, self._config, self._workers = spending, config, workers
        self._body = make_model_params(config, model).body()
        self._prompt = config.parse_prompt()
        self._open = dict[str, str]()
        self._boost = Counter[str]()
        self._items, self._used = 0, Amount()

    async def lend(self, task: ShardTask) -> dict[str, Json] | None:
        """Lend a task what its items may need.

        Returns:
            The lease as plain data for the task; None if there is no limit.

        Raises:
            BudgetExhaustedError: The budget does not cover one item.
            JournalError: The spend log cannot be written.
        """
        if self._spending is None:
            return None
        shard, attempt, items = task.shard, task.attempt, task.unpack_items()
        budget, leases = self._spending.budget, self._spending.leases
        item = self._of_one(items[0], budget.settings.prices)
        least = item.times(2 ** self._boost[shard])
        wanted = self._of_items(len(items), item).plus(item.times(min(task.streams, len(items))))
        parts = _PER_WORKER * max(1, self._workers())
        part = Amount(*(max(0, left) // parts for left in budget.balance.left))
        amount = wanted.minimum(part).maximum(least)
        name = f"{task.run['session']}.{shard}.{attempt}"
        until = time.time() + self._config.backend.queue_s + task.deadline_s
        has_log = task.journal is not None
        await leases.lend(name, Lease(amount, until, has_log))
        self._open[shard] = name
        caps = dict(budget.balance.limited_fields(amount))
        return {"name": name, "caps": caps, "booked": has_log, "until": until}

    def _of_one(self, item: Item, prices: TokenPrices) -> Amount:
        """Return the most that one item may need, including repairs."""
        if self._config.input.is_batch:
            return self._of_request(item, prices)
        try:
            messages = self._prompt.build_messages(item.row)
        except FanfoldError:  # it will fail without a call; others may not
            messages = self._prompt.build_messages(defaultdict(str))
        if (images := self._config.task.images) is not None:
            messages = add_unread_images(messages, item.row, images.columns)
        most = max_usage({**self._body, "messages": messages})
        rounds = 1 + (0 if self._config.task.graph else self._config.task.repairs)
        longest = Usage((most.prompt or 0) + 2 * rounds * (most.completion or 0), most.completion)
        return prices.amount(longest).times(rounds)

    def _of_request(self, item: Item, prices: TokenPrices) -> Amount:
        """Return the most that an item may need that is a request itself."""
        url, body = item.row["url"], item.row["body"]
        if url not in REQUEST_URLS:
            return prices.amount(Usage(0, 0))  # it will fail without a call
        return prices.amount(max_usage(body if url == CHAT_URL else {**body, URL_FIELD: url}))

    def _of_items(self, count: int, one: Amount) -> Amount:
        """Estimate the need of items from those measured, or from one item before any is."""
        if not self._items:
            return one.times(count)
        more, of = _MARGIN
        return Amount(*(-(-count * more * used // (of * self._items)) for used in self._used))

    async def settle(self, result: ShardResult) -> None:
        """Take back what a task has not spent.

        Raises:
            JournalError: The spend log cannot be written.
        """
        if self._spending is None or result.lease is None or result.used is None:
            return  # unreported amounts count as spent until a spend log proves less
        ended, used = sum((result.tally or {}).values()), Amount.from_json(result.used)
        self._items, self._used = self._items + ended, self._used.plus(used)
        self._boost[result.shard] = 0 if ended else self._boost[result.shard] + 1
        if self._open.get(result.shard) == result.lease:
            del self._open[result.shard]
        await self._spending.leases.return_lease(result.lease, used)

    def mark_lost(self, shard: str) -> None:
        """Count the open lease of a shard, if any, as spent: its worker is lost."""
        if self._spending is not None and (name := self._open.pop(shard, None)) is not None:
            self._spending.leases.mark_lost(name)
