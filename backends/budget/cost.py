"""What a run has cost: its journal's records added up, the time of nodes, and what is in doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from ..core.money import HOUR_MS, NANO, Amount, Held
from ..core.types import Json
from ..storage.journal import RunIds, Source, Spent, check_line, life_of, scan

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
