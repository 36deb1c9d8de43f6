"""The tasks of a session: their shared template, and a budget lease for each."""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...backends.budget.budget import Budget, BudgetSettings, RunBudget
from ...backends.budget.spend_log import Lease, SpendLog, SpendLogs
from ...backends.core.errors import BudgetExhaustedError, ConfigurationError, FanfoldError
from ...backends.core.messages import WALLTIME_REASON, ShardResult, ShardTask
from ...backends.core.money import Amount, BudgetLimits, TokenPrices
from ...backends.core.templates import Template
from ...backends.core.types import Item, Json, Usage
from ...backends.discovery.connect import ReadyEndpoints, make_model_params
from ...backends.fleet.request import max_usage
from ...backends.storage.run_folder import RunFolder
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.serialize import find_lost_secrets

_POLL_S: Final = 1.0
LEASE_EXPIRED: Final = (
    f"{WALLTIME_REASON}: the task waited until its lease expired (backend.queue_s)"
)


@asynccontextmanager
async def open_lease(task: ShardTask, config: RunConfig) -> AsyncIterator[Budget | None]:
    """Open the budget that a task may spend; None means no limit.

    A task that is delivered twice may spend its lease once: the second waits until the first has
    ended, and then may spend nothing. A task that starts after its lease has expired may spend
    nothing either: the coordinator may have taken the lease back.

    Raises:
        JournalError: The spend log of the lease cannot be written.
    """
    lease = task.lease
    if lease is None:
        yield None
        return
    until, log, caps = time.time() + task.deadline_s, None, lease["caps"]
    if expiry_reason(task):
        caps = dict.fromkeys(caps, 0)
    elif lease["booked"] and task.journal is not None:
        logs = SpendLogs(Path(task.journal).parent / "budget", task.run["id"])
        log = await asyncio.to_thread(_open_lease_log, logs, lease["name"], until)
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


def expiry_reason(task: ShardTask) -> str | None:
    """Return why a task must not start now, or None."""
    lease = task.lease or {}
    return LEASE_EXPIRED if time.time() > lease.get("until", float("inf")) else None


def _open_lease_log(logs: SpendLogs, name: str, until: float) -> SpendLog | None:
    """Create the spend log of a lease; return None if another worker holds the lease."""
    path = logs.lease_path(name)
    if path.exists():
        return None
    log = logs.create(path)
    log.write({"until": until}, sync=True)
    return log


async def _wait_for_holder(logs: SpendLogs, name: str) -> None:
    """Wait until the holder of a lease has settled it, or it expires."""
    while True:
        state = await asyncio.to_thread(logs.read_lease, name)
        if state.settled is not None or time.time() > state.until:
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


_OF_THE_RUN: Final = ("requests_per_s", "tokens_per_min")
_OF_AN_ENDPOINT: Final = ("endpoint_requests_per_s", "endpoint_tokens_per_min")


def worker_streams(loaded: LoadedConfig) -> int:
    """Return the most items in flight in one worker."""
    config = loaded.config
    return max(1, -(-config.limits.streams // config.backend.concurrent_shards))


def worker_settings(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the settings for workers: rates divided by the workers, and no metrics port.

    Limits of an endpoint are divided as well, unless each worker uses the endpoints of its node.
    """
    settings = copy.deepcopy(loaded.plain)
    backend, limits = loaded.config.backend, settings["limits"]
    workers = backend.concurrent_shards
    keys = _OF_THE_RUN if backend.node_endpoints else (*_OF_THE_RUN, *_OF_AN_ENDPOINT)
    for key in keys:
        if limits.get(key) is not None:
            limits[key] = limits[key] / workers
    if limits.get("endpoint_streams") is not None and not backend.node_endpoints:
        limits["endpoint_streams"] = max(1, limits["endpoint_streams"] // workers)
    gateway = settings["endpoints"].get("first")
    if gateway and gateway.get("requests_per_s") is not None:
        gateway["requests_per_s"] = gateway["requests_per_s"] / workers
    settings["backend"]["user_endpoint_config"] = None  # for the endpoint, not for its workers
    if settings.get("metrics"):
        settings["metrics"] = {"port": None}  # the coordinator serves them
    return settings


@dataclass(frozen=True, slots=True)
class TaskTemplate:
    """What all tasks of a session share.

    Attributes:
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint``, ``session`` and
            the session's ``token``.
        settings: Its plain settings.
        urls: Endpoints for the workers that replace those of the settings, or None.
        journal: The run's journal folder if workers share it, else None.
        streams: Most items in flight in one worker.
        deadline_s: Seconds that a worker may take for one task.
        message_bytes: Most bytes of a task, and of a result.
        has_node_endpoints: True if each worker uses the endpoints of its own node.
        folder: The run's folder.
        config: The run's settings.
        token_prices: Prices of tokens.
        ends_at: Time after which workers start no item, in seconds since 1970, or None.
    """

    run: dict[str, Any]
    settings: dict[str, Any]
    urls: list[str] | None
    journal: Path | None
    streams: int
    deadline_s: float
    message_bytes: int
    has_node_endpoints: bool
    folder: Path
    config: RunConfig
    token_prices: dict[str, int]
    ends_at: float | None = None


def make_task_template(
    folder: RunFolder,
    loaded: LoadedConfig,
    ready: ReadyEndpoints,
    about: dict[str, Any],
    prices: TokenPrices,
) -> TaskTemplate:
    """Return the template of all tasks of a session.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        ready: Its endpoints.
        about: The run's provenance, with ``session``.
        prices: Prices of tokens.

    Raises:
        ConfigurationError: A key or token of the endpoints is in clear text in the settings;
            secrets are not sent to workers.
    """
    config = loaded.config
    sent = {key: loaded.plain[key] for key in ("endpoints", "model")}
    for secret in find_lost_secrets(sent):
        msg = (
            f"{secret} is written out, and keys are not sent to workers; write it as ${{VAR}} and "
            "set the variable where the workers run"
        )
        raise ConfigurationError(msg)
    run = {key: about[key] for key in ("model", "simulated", "fingerprint", "session")}
    return TaskTemplate(
        run=run | {"id": about["run"], "token": secrets.token_hex(4)},
        settings=worker_settings(loaded),
        urls=_simulated_urls(ready, config),
        journal=folder.journal.resolve() if config.backend.workers_share_folder else None,
        streams=worker_streams(loaded),
        deadline_s=config.backend.deadline_s,
        message_bytes=config.backend.message_bytes,
        has_node_endpoints=config.backend.node_endpoints,
        folder=folder.path,
        config=config,
        token_prices=prices.to_json(),
    )


def _simulated_urls(ready: ReadyEndpoints, config: RunConfig) -> list[str] | None:
    """Return the URLs of a simulated fleet that this process has started."""
    if config.endpoints.simulated is None or config.backend.node_endpoints:
        return None
    return [spec.url for spec in ready.specs]


_PER_WORKER: Final = 2
"""A lease is at most the rest of the budget divided by this number, per worker."""
_MARGIN: Final = 5, 4
"""Factor of 5/4: future items are estimated to need a quarter more than those measured."""


class LeaseManager:
    """Lends parts of a run's budget to tasks.

    Args:
        spending: The budget, or None if it has no limits.
        template: What the tasks share.
        workers: Returns the number of workers now.
    """

    def __init__(
        self, spending: RunBudget | None, template: TaskTemplate, workers: Callable[[], int]
    ) -> None:
        self._spending, self._template, self._workers = spending, template, workers
        self._config = config = template.config
        self._body = make_model_params(config, template.run["model"]).body()
        self._prompt, self._system = Template.parse(config.task.prompt), config.task.system
        self._booked = template.journal is not None
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
        self.mark_lost(shard)
        budget, leases = self._spending.budget, self._spending.leases
        item = self._of_one(items[0], budget.settings.prices)
        least = item.times(2 ** self._boost[shard])
        wanted = self._of_items(len(items), item).plus(
            item.times(min(self._template.streams, len(items)))
        )
        parts = _PER_WORKER * max(1, self._workers())
        part = Amount(*(max(0, left) // parts for left in budget.balance.left))
        amount = wanted.minimum(part).maximum(least)
        name = f"{self._template.run['session']}.{shard}.{attempt}"
        until = time.time() + self._config.backend.queue_s + self._template.deadline_s
        await leases.lend(name, Lease(amount, until, self._booked))
        self._open[shard] = name
        caps = dict(budget.balance.limited_fields(amount))
        return {"name": name, "caps": caps, "booked": self._booked, "until": until}

    def _of_one(self, item: Item, prices: TokenPrices) -> Amount:
        """Return the most that one item may need, including repairs."""
        try:
            question = self._prompt.render(item.row)
        except FanfoldError:
            question = ""  # it will fail without a call
        messages = [{"role": "system", "content": self._system}] if self._system else []
        most = max_usage(
            {**self._body, "messages": [*messages, {"role": "user", "content": question}]}
        )
        rounds = 1 + (0 if self._config.task.graph else self._config.task.repairs)
        longest = Usage((most.prompt or 0) + 2 * rounds * (most.completion or 0), most.completion)
        return prices.amount(longest).times(rounds)

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
