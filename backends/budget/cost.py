"""Cost of a run: journal totals, node time, unaccounted spending."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from ...configs.raw_settings import read_settings
from ..core.money import (
    MS_PER_HOUR,
    NANO_PER_USD,
    Amount,
    BudgetLimits,
    NodeTime,
    UsageTotals,
)
from ..core.types import Json
from ..storage.journal_file import (
    ItemCounts,
    JournalSource,
    RunIds,
    check_line,
    parse_session_number,
    scan_lines,
)
from ..storage.run_folder import RunFolder
from .limits import SETTING_UNITS, estimate_total, format_amount, read_limits, report_limits
from .spend_log import open_spend_logs

NO_ENDPOINT: Final = "(none)"
"""Endpoint name of items that ended without a call."""

UsageRecord: TypeAlias = Mapping[str, Any]
"""Work of one endpoint for an item, with the field names of a journal record."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a run so far.

    Attributes:
        usage: Totals of the journal.
        node_time: Node time and its cost.
        unaccounted: Spending that may have happened in addition: by a session that was killed, on
            items that were cut off, on answers without usage; during a run also open reservations.
        priced: Whether tokens have a price.
    """

    usage: UsageTotals
    node_time: NodeTime = field(default_factory=NodeTime)
    unaccounted: Amount = field(default_factory=Amount)
    priced: bool = False

    @property
    def nano_usd(self) -> int | None:
        """Return nano-dollars for tokens and nodes; None if nothing has a price."""
        if not self.priced and not self.node_time.nano_usd:
            return None
        return self.usage.nano_usd + self.node_time.nano_usd

    @property
    def settled(self) -> Amount:
        """Return what the journal and the node time prove."""
        return self.usage.amount.plus(self.node_time.amount)

    @property
    def spent(self) -> Amount:
        """Return what counts against a budget: unaccounted spending included."""
        return self.settled.plus(self.unaccounted)

    def to_json(self) -> dict[str, Json]:
        """Return the data for ``--json``; dollars are null where nothing has a price."""
        node_time, nano = self.node_time, self.nano_usd
        return {
            "tokens": tokens_json(self.usage),
            "usd": None if nano is None else nano / NANO_PER_USD,
            "wasted_usd": self.usage.wasted_nano_usd / NANO_PER_USD if self.priced else None,
            "node_hours": node_time.node_ms / MS_PER_HOUR,
            "idle_node_hours": node_time.idle_ms / MS_PER_HOUR,
            "node_usd": node_time.nano_usd / NANO_PER_USD if node_time.nano_usd else None,
            "idle_node_usd": node_time.idle_nano_usd / NANO_PER_USD if node_time.nano_usd else None,
            "in_doubt": self.unaccounted_json(),
        }

    def unaccounted_json(self) -> dict[str, Json]:
        """Return unaccounted spending; dollars are null for tokens without a limit in dollars."""
        unaccounted = self.unaccounted
        unknown = self.nano_usd is None or (unaccounted.tokens > 0 and unaccounted.nano_usd == 0)
        return {
            "requests": unaccounted.requests,
            "tokens": unaccounted.tokens,
            "usd": None if unknown else unaccounted.nano_usd / NANO_PER_USD,
            "node_hours": unaccounted.node_ms / MS_PER_HOUR,
        }


def tokens_json(spent: UsageTotals) -> dict[str, Json]:
    """Return tokens by kind."""
    return {
        "prompt": spent.prompt_tokens,
        "cached": spent.cached_tokens,
        "completion": spent.completion_tokens,
        "useful": spent.useful_tokens,
        "lost": spent.lost_tokens,
        "wasted": spent.wasted_tokens,
    }


@dataclass(slots=True)
class UsageGroups:
    """Sums over all records of a journal; memory grows with the number of groups only.

    Attributes:
        sessions: Sums by session.
        by_key: Sums by the requested key.
    """

    sessions: dict[int, UsageTotals] = field(default_factory=dict)
    by_key: dict[str, UsageTotals] = field(default_factory=dict)

    @property
    def total(self) -> UsageTotals:
        """Return the sums over all groups."""
        return UsageTotals.total(self.sessions.values())

    def add(self, key: str, share: UsageRecord) -> None:
        """Add the work of one endpoint for an item."""
        self.by_key.setdefault(key, UsageTotals()).add(share)


GroupKey: TypeAlias = Callable[[UsageRecord, Mapping[str, Any]], str]
"""Returns the group of one endpoint's part of a record."""


def _endpoint(share: UsageRecord, _: Mapping[str, Any]) -> str:
    return share.get("endpoint") or NO_ENDPOINT


def _node(share: UsageRecord, _: Mapping[str, Any]) -> str:
    label = share.get("endpoint")
    if not label:
        return NO_ENDPOINT
    return urlsplit(label if "//" in label else f"//{label}").hostname or str(label)


def _day(_: UsageRecord, record: Mapping[str, Any]) -> str:
    return str(record.get("finished_at"))[:10]


GROUP_KEYS: Final[Mapping[str, GroupKey]] = {"endpoint": _endpoint, "node": _node, "day": _day}


def group_usage(journal: Path, run: RunIds, items: int, key: str | None, model: str) -> UsageGroups:
    """Sum all records of a run, including those replaced by newer ones; blocks.

    Args:
        journal: The journal's folder.
        run: The run's ids.
        items: Number of items of the run.
        key: ``model``, ``endpoint``, ``node``, ``day``, or None for the total only.
        model: The run's model name, for endpoints that never answered.

    Raises:
        JournalError: A file is damaged or belongs to another run.
    """
    groups = UsageGroups()
    records = _records(journal, run, items, groups.sessions)
    if key == "model":
        return _by_model(groups, records, model)
    for record in records:
        if key is not None:
            for share in record.get("shares") or (record,):
                groups.add(GROUP_KEYS[key](share, record), share)
    return groups


def _records(
    journal: Path, run: RunIds, items: int, sessions: dict[int, UsageTotals]
) -> Iterator[dict[str, Any]]:
    """Yield all records, and sum them by session."""
    for path in sorted(journal.glob("*.jsonl")):
        spent = sessions.setdefault(parse_session_number(path), UsageTotals())
        source = JournalSource(path, run)
        for line in scan_lines(source):
            check_line(line, source, items)
            spent.add(line.record)
            yield line.record


def _by_model(groups: UsageGroups, records: Iterator[dict[str, Any]], model: str) -> UsageGroups:
    """Group by the model name in answers; without one, by that of the endpoint's other answers."""
    names, unnamed = dict[str, str](), dict[str, UsageTotals]()
    for record in records:
        for share in record.get("shares") or (record,):
            endpoint, name = share.get("endpoint"), share.get("model")
            if name:
                groups.add(name, share)
                names[endpoint or NO_ENDPOINT] = name
            elif endpoint is None:
                groups.add(NO_ENDPOINT, share)
            else:
                unnamed.setdefault(endpoint, UsageTotals()).add(share)
    for endpoint, spent in unnamed.items():
        groups.by_key.setdefault(names.get(endpoint, model), UsageTotals()).merge(spent)
    return groups


_FINE: Final = 0.1 * NANO_PER_USD
"""Below this amount, dollars are shown with more digits."""


def read_cost(folder: RunFolder, run: RunIds, sessions: Mapping[int, UsageTotals]) -> Cost:
    """Return what a run has cost, from the files in its folder; blocks.

    Args:
        folder: The folder.
        run: The run's ids.
        sessions: Journal totals by session.

    Raises:
        JournalError: A spend log is damaged.
    """
    logs, total = (
        open_spend_logs(folder, run, is_working=False),
        UsageTotals.total(sessions.values()),
    )
    unaccounted = logs.unaccounted({session: spent.amount for session, spent in sessions.items()})
    return Cost(total, logs.total_node_time(), unaccounted, total.nano_usd > 0)


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """Return what several runs have cost together."""
    total = Cost(UsageTotals())
    for one in costs:
        total = Cost(
            UsageTotals.total([total.usage, one.usage]),
            total.node_time.plus(one.node_time),
            total.unaccounted.plus(one.unaccounted),
            total.priced or one.priced,
        )
    return total


def read_budget(folder: RunFolder, cost: Cost) -> dict[str, Json]:
    """Return, by limit, spending (unaccounted included) and limit; blocks.

    Raises:
        ConfigurationError: The budget in the settings is invalid.
        JournalError: The limits cannot be read.
    """
    return report_limits(_read_limits(folder), cost.spent)


def estimate_total_cost(folder: RunFolder, cost: Cost, counts: ItemCounts) -> dict[str, Json]:
    """Return, by limit, the total that all items need, as a pause reports it; blocks.

    Raises:
        ConfigurationError: The budget in the settings is invalid.
        JournalError: The limits cannot be read.
    """
    return estimate_total(cost.spent, cost.settled, _read_limits(folder), counts)


def _read_limits(folder: RunFolder) -> BudgetLimits:
    budget = read_settings(folder.settings).data.get("budget") or {}
    given = {key: budget.get(key) for key, _ in SETTING_UNITS.values()}
    if not all(map(_is_limit, given.values())):
        from ...configs.budget import BudgetConfig  # noqa: PLC0415 - pydantic takes 0.1 s

        given = BudgetConfig.model_validate(budget).limits
    return read_limits(folder, given)


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


def describe_cost(cost: Cost, limits: Collection[str]) -> Iterator[str]:
    """Yield lines that describe the cost of a run; none where nothing has a price or is in doubt.

    Args:
        cost: The cost.
        limits: Names of the budget's limits; node-hours without a price are only shown if limited.
    """
    priced, node_time = cost.nano_usd is not None, cost.node_time
    parts = [format_dollars(cost)] * priced + [format_node_hours(cost)] * bool(
        "node_hours" in limits or node_time.nano_usd
    )
    if parts:
        yield f"Cost: {'; '.join(parts)}"
    if more := format_unaccounted(cost):
        counted = ", and counted against the budget" if limits else ""
        yield f"In doubt{counted}: at most {more}"


def format_dollars(cost: Cost) -> str:
    """Return dollars in words, e.g. ``at most 3.21 USD, of which at most 0.12 wasted``.

    The cost of lost answers is an upper bound; without any, both amounts are exact.
    """
    total, wasted = cost.nano_usd or 0, cost.usage.wasted_nano_usd
    bound = "at most " if cost.usage.lost_tokens else ""
    words = f"{bound}{format_usd(total, total)} USD"
    if not wasted:
        return words
    return f"{words}, of which {bound}{format_usd(wasted, total)} wasted"


def format_usd(nano_usd: int, largest: int) -> str:
    """Return dollars with as many digits as the largest of several amounts needs."""
    return (
        f"{nano_usd / NANO_PER_USD:,.2f}" if largest >= _FINE else f"{nano_usd / NANO_PER_USD:.6f}"
    )


def format_node_hours(cost: Cost) -> str:
    """Return node-hours in words, e.g. ``2.00 node-hours held, 0.10 idle, for 5.00 USD``."""
    node_time = cost.node_time
    idle = format_amount("node_ms", node_time.idle_ms).removesuffix(" node-hours")
    price = f", for {format_amount('nano_usd', node_time.nano_usd)}" if node_time.nano_usd else ""
    return f"{format_amount('node_ms', node_time.node_ms)} held, {idle} idle{price}"


def format_unaccounted(cost: Cost) -> str:
    """Return unaccounted spending in words; empty if there is none."""
    shown = cost.unaccounted.to_json()
    if cost.nano_usd is None:
        del shown["nano_usd"]
    return ", ".join(format_amount(name, value) for name, value in shown.items() if value)
