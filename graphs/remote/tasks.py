"""What the tasks of a session carry, and what each may spend (leases)."""

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

_LOOK_S: Final = 1.0
LEASE_EXPIRED: Final = (
    f"{WALLTIME_REASON}: the order waited until its lease was over (backend.queue_s)"
)


@asynccontextmanager
async def open_lease(order: ShardTask, config: RunConfig) -> AsyncIterator[Budget | None]:
    """Open what an order may spend; None is no limit.

    An order that is delivered twice may spend its lease once: the second waits until the first has
    ended, and then may spend nothing. Nor may one that begins when its lease is over: what was
    lent may have been given back.

    Raises:
        JournalError: The lease's book cannot be written.
    """
    lease = order.lease
    if lease is None:
        yield None
        return
    until, book, caps = time.time() + order.deadline_s, None, lease["caps"]
    if expiry_reason(order):
        caps = dict.fromkeys(caps, 0)
    elif lease["booked"] and order.journal is not None:
        shelf = SpendLogs(Path(order.journal).parent / "budget", order.run["id"])
        book = await asyncio.to_thread(_open_lease_log, shelf, lease["name"], until)
        if book is None:
            await _wait_for_holder(shelf, lease["name"])
            caps = dict.fromkeys(caps, 0)
    repairs = 0 if config.task.graph else config.task.repairs
    terms = BudgetSettings(BudgetLimits(**caps), TokenPrices(**order.tariff), repairs)
    budget = Budget(terms, Amount(), book, until)
    try:
        yield budget
    finally:
        await budget.balance.aclose()


def expiry_reason(order: ShardTask) -> str | None:
    """Tell why an order must not be begun now, or None."""
    lease = order.lease or {}
    return LEASE_EXPIRED if time.time() > lease.get("until", float("inf")) else None


def _open_lease_log(shelf: SpendLogs, name: str, until: float) -> SpendLog | None:
    """Begin a lease's book; None when somebody has it already."""
    path = shelf.lease_path(name)
    if path.exists():
        return None
    book = shelf.create(path)
    book.write({"until": until}, sync=True)
    return book


async def _wait_for_holder(shelf: SpendLogs, name: str) -> None:
    """Wait until whoever has a lease has settled it, or its time is over."""
    while True:
        page = await asyncio.to_thread(shelf.read_lease, name)
        if page.settled is not None or time.time() > page.until:
            return
        await asyncio.sleep(_LOOK_S)


def is_lease_exhausted(error: Exception) -> bool:
    """Say whether an order ended because its lease is used up: the coordinator may lend more."""
    return isinstance(error, BudgetExhaustedError)


def spent_of_lease(budget: Budget | None) -> Amount | None:
    """Return what was spent of an order's own lease; what is still reserved may have been.

    Of a lease that another has, nothing is known here.
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
    """Return the settings that travel: rates divided by the workers, nothing served twice.

    Limits of an endpoint are divided as well, unless each worker has endpoints of its own.
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
    """What all orders of a life have in common.

    Attributes:
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint``, ``life`` and the life's
            ``token``.
        settings: Its plain settings.
        urls: Endpoints for the workers, in place of the settings' own; or None.
        journal: The run's journal folder if workers share it, else None.
        streams: Most items in flight in one worker.
        deadline_s: Seconds that a worker may take for one order.
        message_bytes: Most bytes of an order, and of a summary.
        has_node_endpoints: Whether each worker has endpoints of its own.
        folder: The run's folder.
        config: The run's settings.
        token_prices: What tokens cost.
        ends_at: When workers take no more items, in seconds since 1970; or None.
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
    up: ReadyEndpoints,
    about: dict[str, Any],
    tariff: TokenPrices,
) -> TaskTemplate:
    """Return what the orders of one life of a run have in common.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        up: Its endpoints.
        about: What the run is, its ``life`` included.
        tariff: What tokens cost.

    Raises:
        ConfigurationError: A key or token of the endpoints stands in the settings in clear text;
            it would have to travel, and does not.
    """
    config = loaded.config
    told = {key: loaded.plain[key] for key in ("endpoints", "model")}
    for secret in find_lost_secrets(told):
        msg = (
            f"{secret} is written out, and keys do not travel to workers; write it as ${{VAR}} and "
            "set the variable where the workers run"
        )
        raise ConfigurationError(msg)
    run = {key: about[key] for key in ("model", "simulated", "fingerprint", "session")}
    return TaskTemplate(
        run=run | {"id": about["run"], "token": secrets.token_hex(4)},
        settings=worker_settings(loaded),
        urls=_simulated_urls(up, config),
        journal=folder.journal.resolve() if config.backend.workers_share_folder else None,
        streams=worker_streams(loaded),
        deadline_s=config.backend.deadline_s,
        message_bytes=config.backend.message_bytes,
        has_node_endpoints=config.backend.node_endpoints,
        folder=folder.path,
        config=config,
        token_prices=tariff.to_json(),
    )


def _simulated_urls(up: ReadyEndpoints, config: RunConfig) -> list[str] | None:
    """Return the URLs of a simulated fleet that was started here."""
    if config.endpoints.simulated is None or config.backend.node_endpoints:
        return None
    return [spec.url for spec in up.specs]


_PER_WORKER: Final = 2
"""A lease takes at most one of so many parts of what is left, per worker."""
_MARGIN: Final = 5, 4
"""Items to come are reckoned to take a quarter more than those that were seen."""


class LeaseManager:
    """Lends orders out of a run's budget.

    Args:
        spending: The budget, or None when it has no limits.
        terms: What the orders have in common.
        workers: Says how many work now.
    """

    def __init__(
        self, spending: RunBudget | None, terms: TaskTemplate, workers: Callable[[], int]
    ) -> None:
        self._spending, self._template, self._workers = spending, terms, workers
        self._config = config = terms.config
        self._body = make_model_params(config, terms.run["model"]).body()
        self._prompt, self._system = Template.parse(config.task.prompt), config.task.system
        self._booked = terms.journal is not None
        self._open = dict[str, str]()
        self._boost = Counter[str]()
        self._items, self._used = 0, Amount()

    async def lend(self, order: ShardTask) -> dict[str, Json] | None:
        """Lend an order what its items may take.

        Returns:
            The lease as the order carries it; None when nothing is limited.

        Raises:
            BudgetExhaustedError: Not one item can be carried.
            JournalError: The book cannot be written.
        """
        if self._spending is None:
            return None
        shard, attempt, items = order.shard, order.attempt, order.unpack_items()
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

    def _of_one(self, item: Item, tariff: TokenPrices) -> Amount:
        """Return what one item may take, its repairs included."""
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
        return tariff.amount(longest).times(rounds)

    def _of_items(self, count: int, one: Amount) -> Amount:
        """Return what items are reckoned to take: by those that were seen, once there are some."""
        if not self._items:
            return one.times(count)
        more, of = _MARGIN
        return Amount(*(-(-count * more * used // (of * self._items)) for used in self._used))

    async def settle(self, summary: ShardResult) -> None:
        """Take back what an order has not spent.

        Raises:
            JournalError: The book cannot be written.
        """
        if self._spending is None or summary.lease is None or summary.used is None:
            return  # what is not told counts as spent until a book proves less
        ended, used = sum((summary.tally or {}).values()), Amount.from_json(summary.used)
        self._items, self._used = self._items + ended, self._used.plus(used)
        self._boost[summary.shard] = 0 if ended else self._boost[summary.shard] + 1
        if self._open.get(summary.shard) == summary.lease:
            del self._open[summary.shard]
        await self._spending.leases.return_lease(summary.lease, used)

    def mark_lost(self, shard: str) -> None:
        """Count a shard's lease as spent, if one is out: its worker is lost."""
        if self._spending is not None and (name := self._open.pop(shard, None)) is not None:
            self._spending.leases.mark_lost(name)
