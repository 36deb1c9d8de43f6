"""What a run has cost: journal, node time, in doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from ...configs.loader import peek
from ...configs.models import BudgetConfig
from ..core.money import FREE, HOUR_MS, NANO, Amount, Held
from ..core.types import Json
from ..storage.journal import RunIds, Source, Spent, check_line, life_of, scan
from ..storage.run_folder import RunFolder
from .budget import Budget, BudgetTerms, caps_of, said
from .spend_log import Shelf

NOBODY: Final = "(nobody)"
"""Stands for the endpoint of items that ended without a call."""

Share: TypeAlias = Mapping[str, Any]
"""What one endpoint did for an item; has the names of a journal record."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run has cost so far.

    Attributes:
        spent: What the journal says.
        held: How long nodes were held, and what that costs.
        doubt: What may have been spent besides: by a life that was killed, on items that were cut
            off, on answers that do not say what they used; while a run goes on, also what is
            reserved.
        priced: Whether tokens have a price.
    """

    spent: Spent
    held: Held = field(default_factory=Held)
    doubt: Amount = field(default_factory=Amount)
    priced: bool = False

    @property
    def nano_usd(self) -> int | None:
        """Return nano-dollars for tokens and nodes; None: nothing has a price."""
        if not self.priced and not self.held.nano_usd:
            return None
        return self.spent.nano_usd + self.held.nano_usd

    def to_json(self) -> dict[str, Json]:
        """Return it as ``--json`` tells it; dollars are null where nothing has a price."""
        held, nano = self.held, self.nano_usd
        return {
            "tokens": tokens_json(self.spent),
            "usd": None if nano is None else nano / NANO,
            "wasted_usd": self.spent.wasted_nano_usd / NANO if self.priced else None,
            "node_hours": held.node_ms / HOUR_MS,
            "idle_node_hours": held.idle_ms / HOUR_MS,
            "node_usd": held.nano_usd / NANO if held.nano_usd else None,
            "idle_node_usd": held.idle_nano_usd / NANO if held.nano_usd else None,
            "in_doubt": self.doubt_json(),
        }

    def doubt_json(self) -> dict[str, Json]:
        """Return what is in doubt; dollars are null where tokens are and no cap reckons in them."""
        doubt = self.doubt
        unknown = self.nano_usd is None or (doubt.tokens > 0 and doubt.nano_usd == 0)
        return {
            "requests": doubt.requests,
            "tokens": doubt.tokens,
            "usd": None if unknown else doubt.nano_usd / NANO,
            "node_hours": doubt.node_ms / HOUR_MS,
        }


def tokens_json(spent: Spent) -> dict[str, Json]:
    """Return tokens by kind."""
    return {
        "prompt": spent.prompt_tokens,
        "cached": spent.cached_tokens,
        "completion": spent.completion_tokens,
        "useful": spent.useful_tokens,
        "wasted": spent.wasted_tokens,
    }


def total_of(lives: Mapping[int, Spent]) -> Spent:
    """Return the sums over all lives."""
    total = Spent()
    for spent in lives.values():
        total.merge(spent)
    return total


@dataclass(slots=True)
class Groups:
    """Sums over all records of a journal, in memory that grows with the groups only.

    Attributes:
        lives: By life of the run.
        by: By the key that was asked for.
    """

    lives: dict[int, Spent] = field(default_factory=dict)
    by: dict[str, Spent] = field(default_factory=dict)

    @property
    def total(self) -> Spent:
        """Return the sums over all."""
        return total_of(self.lives)

    def add(self, key: str, share: Share) -> None:
        """Add what one endpoint did for an item."""
        self.by.setdefault(key, Spent()).add(share)


Key: TypeAlias = Callable[[Share, Mapping[str, Any]], str]
"""Names the group of a share of a record."""


def _endpoint(share: Share, _: Mapping[str, Any]) -> str:
    return share.get("endpoint") or NOBODY


def _node(share: Share, _: Mapping[str, Any]) -> str:
    label = share.get("endpoint")
    if not label:
        return NOBODY
    return urlsplit(label if "//" in label else f"//{label}").hostname or str(label)


def _day(_: Share, record: Mapping[str, Any]) -> str:
    return str(record.get("finished_at"))[:10]


KEYS: Final[Mapping[str, Key]] = {"endpoint": _endpoint, "node": _node, "day": _day}


def grouped(journal: Path, run: RunIds, items: int, key: str | None, model: str) -> Groups:
    """Add up all records of a run, those that newer ones replaced included; blocks.

    Args:
        journal: The journal's folder.
        run: The run's ids.
        items: Number of items of the run.
        key: ``model``, ``endpoint``, ``node``, ``day``, or None to add up the total only.
        model: The model's name in the run, for endpoints that never answered.

    Raises:
        LedgerError: A file is damaged or belongs to another run.
    """
    groups = Groups()
    records = _records(journal, run, items, groups.lives)
    if key == "model":
        return _by_model(groups, records, model)
    for record in records:
        if key is not None:
            for share in record.get("shares") or (record,):
                groups.add(KEYS[key](share, record), share)
    return groups


def _records(
    journal: Path, run: RunIds, items: int, lives: dict[int, Spent]
) -> Iterator[dict[str, Any]]:
    """Yield all records, and add them up by life."""
    for path in sorted(journal.glob("*.jsonl")):
        spent = lives.setdefault(life_of(path), Spent())
        source = Source(path, run)
        for line in scan(source):
            check_line(line, source, items)
            spent.add(line.record)
            yield line.record


def _by_model(groups: Groups, records: Iterator[dict[str, Any]], model: str) -> Groups:
    """Group by the name in the answers; where an endpoint gave none, by that of its others."""
    names, unnamed = dict[str, str](), dict[str, Spent]()
    for record in records:
        for share in record.get("shares") or (record,):
            endpoint, name = share.get("endpoint"), share.get("model")
            if name:
                groups.add(name, share)
                names[endpoint or NOBODY] = name
            elif endpoint is None:
                groups.add(NOBODY, share)
            else:
                unnamed.setdefault(endpoint, Spent()).add(share)
    for endpoint, spent in unnamed.items():
        groups.by.setdefault(names.get(endpoint, model), Spent()).merge(spent)
    return groups


_FINE: Final = 0.1 * NANO
"""Where all amounts are smaller, they are shown with more digits."""


def cost_so_far(folder: RunFolder, run: RunIds, lives: Mapping[int, Spent]) -> Cost:
    """Return what a run has cost, by what lies in its folder; blocks.

    Args:
        folder: The folder.
        run: The run's ids.
        lives: By life, what the journal says.

    Raises:
        LedgerError: A book is damaged.
    """
    shelf, total = Shelf(folder.budget, run), total_of(lives)
    doubt = shelf.doubt({life: spent.amount for life, spent in lives.items()})
    return Cost(total, shelf.held(), doubt, total.nano_usd > 0)


def budget_so_far(folder: RunFolder, cost: Cost) -> dict[str, Json]:
    """Return, by limit, what is spent of which cap, what is in doubt included; blocks.

    Raises:
        ConfigurationError: The settings' budget is none.
        LedgerError: The caps cannot be read.
    """
    config = BudgetConfig.model_validate(peek(folder.settings)[0].get("budget") or {})
    before = cost.spent.amount.plus(cost.held.amount).plus(cost.doubt)
    return Budget(BudgetTerms(caps_of(folder, config), FREE), before, None).report()


def in_words(cost: Cost, *, timed: bool) -> Iterator[str]:
    """Yield lines that say what a run has cost; none where nothing has a price.

    Args:
        cost: What it has cost.
        timed: Whether node-hours matter though they have no price.
    """
    priced, held = cost.nano_usd is not None, cost.held
    parts = [dollars(cost)] * priced + [nodes(cost)] * bool(timed or held.nano_usd)
    if parts:
        yield f"Cost: {'; '.join(parts)}"
    if more := doubts(cost):
        yield f"In doubt, and counted against the budget: up to {more}"


def dollars(cost: Cost) -> str:
    """Return dollars in words, e.g. ``3.21 USD, of which up to 0.12 wasted``."""
    total, wasted = cost.nano_usd or 0, cost.spent.wasted_nano_usd
    words = f"{figure(total, total)} USD"
    if not wasted:
        return words
    bound = "up to " if cost.spent.lost_tokens else ""
    return f"{words}, of which {bound}{figure(wasted, total)} wasted"


def figure(nano_usd: int, largest: int) -> str:
    """Return dollars with as many digits as the largest of several amounts needs."""
    return f"{nano_usd / NANO:,.2f}" if largest >= _FINE else f"{nano_usd / NANO:.6f}"


def nodes(cost: Cost) -> str:
    """Return node-hours in words, e.g. ``2.00 node-hours held, 0.10 idle, for 5.00 USD``."""
    held = cost.held
    idle = said("node_ms", held.idle_ms).removesuffix(" node-hours")
    price = f", for {said('nano_usd', held.nano_usd)}" if held.nano_usd else ""
    return f"{said('node_ms', held.node_ms)} held, {idle} idle{price}"


def doubts(cost: Cost) -> str:
    """Return what is in doubt, in words; empty if nothing is."""
    shown = cost.doubt.to_json()
    if cost.nano_usd is None:
        del shown["nano_usd"]
    return ", ".join(said(name, value) for name, value in shown.items() if value)
