"""What items of a run took: measured, by its journal."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from ...backends.core.errors import ConfigurationError
from ...backends.core.money import NANO
from ...backends.core.types import Usage
from ...backends.storage.journal_index import Ledger
from ...backends.storage.run_folder import open_folder, run_ids
from .spans import Span

_UNSEEN: Final = 3.0
"""A sample misses with a chance of 1 in 20 what happens to 3 in so many items as it has."""
_READ: Final = 5000
"""So many records say enough."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a number of items took.

    Attributes:
        items: How many.
        failed: How many of them failed, by error class.
        requests: Requests of an item.
        repairs: Answers of an item that were sent back.
        prompt: Prompt tokens of an item, over all its requests.
        completion: Completion tokens of an item.
        lost: Tokens of an item's requests that brought no answer and may have been paid.
        dollars: What an item cost, lost requests included, at the price that the run had.
        latency: Seconds that an item took.
        flight: Items that were in flight at a time, on average.
        latencies: (median, 95th percentile) of the same.
        usage: Tokens of all of them together.
        nano_usd: Nano-dollars of all of them together.
        unreported: Items whose tokens nobody reported.
        source: Where it was seen.
    """

    items: int
    failed: dict[str, int]
    requests: Span
    repairs: Span
    prompt: Span
    completion: Span
    lost: Span
    dollars: Span
    latency: Span
    flight: float
    latencies: tuple[float, float]
    usage: Usage
    nano_usd: int
    unreported: int
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "items": self.items,
            "failed": self.failed,
            "requests": self.requests.to_json(3),
            "repairs": self.repairs.to_json(3),
            "prompt_tokens": self.prompt.to_json(1),
            "completion_tokens": self.completion.to_json(1),
            "lost_tokens": self.lost.to_json(1),
            "usd": self.dollars.to_json(9),
            "latency_s": self.latency.to_json(4),
            "in_flight": round(self.flight, 1),
            "latency_median_s": self.latencies[0],
            "latency_p95_s": self.latencies[1],
            "unreported": self.unreported,
            "source": self.source,
        }

    @classmethod
    def of(
        cls, records: Iterable[dict[str, Any]], total: int, source: str, step: int = 1
    ) -> Seen | None:
        """Sum up journal records; None when none of them was asked.

        Args:
            records: The records; those of items that were never asked are left out.
            total: Items that they are a sample of.
            source: Where they are from, in words.
            step: So many items stand behind each record, if some were left out.
        """
        asked = [record for record in records if record["requests"]]
        if not asked:
            return None
        told = [record for record in asked if record["completion_tokens"] is not None]
        latencies = sorted(record["latency_s"] for record in asked)

        def mean(name: str, of: Sequence[dict[str, Any]]) -> Span:
            return Span.mean([record.get(name) or 0 for record in of], total)

        return cls(
            items=len(asked),
            failed=dict(Counter(r["error_class"] for r in asked if r["status"] == "failed")),
            requests=_rare(mean("requests", asked), len(asked), total),
            repairs=_rare(mean("repairs", asked), len(asked), total, 1.0),
            prompt=_rare(mean("prompt_tokens", told), len(told), total),
            completion=_rare(mean("completion_tokens", told), len(told), total),
            lost=mean("lost_tokens", asked),
            dollars=_rare(mean("nano_usd", asked).map(lambda n: n / NANO), len(asked), total),
            latency=Span.mean(latencies, total),
            flight=step * _flight(asked),
            latencies=(_quantile(latencies, 0.5), _quantile(latencies, 0.95)),
            usage=_sum(told),
            nano_usd=sum(record.get("nano_usd") or 0 for record in asked),
            unreported=len(asked) - len(told),
            source=source,
        )


def _rare(mean: Span, count: int, total: int, least: float = 0.0) -> Span:
    """Allow for what was too rare to be seen, such as repairs."""
    if not count or count >= total:
        return mean
    once = (mean.likely or least) * _UNSEEN / count
    return Span(mean.low, mean.likely, max(mean.high, mean.likely + once))


def _flight(records: Sequence[dict[str, Any]]) -> float:
    """Return how many items were in flight at a time while any was."""
    spans = list[tuple[float, float]]()
    for record in records:
        end = datetime.fromisoformat(record["finished_at"]).timestamp()
        spans.append((end - record["latency_s"], end))
    busy, until = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return max(1.0, math.fsum(end - begin for begin, end in spans) / max(busy, 1e-3))


def _sum(records: Sequence[dict[str, Any]]) -> Usage:
    return Usage(
        sum(record["prompt_tokens"] or 0 for record in records),
        sum(record["completion_tokens"] or 0 for record in records),
        sum(record.get("cached_tokens") or 0 for record in records),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def seen_in(path: Path, simulated: bool) -> Seen:
    """Return what the finished items of a run took; blocks.

    Args:
        path: The run's folder; the run may be finished, or not.
        simulated: Whether simulated answers are wanted; real and simulated ones never mix.

    Raises:
        ConfigurationError: No run, no finished item, or answers of the other kind.
    """
    folder = open_folder(path)
    about = folder.read_provenance()
    if bool(about["simulated"]) is not simulated:
        kinds = ("real", "simulated")
        msg = (
            f"--like {path}: its answers are {kinds[about['simulated']]}, and these endpoints are "
            f"{kinds[simulated]}; the ones say nothing about the others"
        )
        raise ConfigurationError(msg)
    total = about["input"]["items"]
    with Ledger(folder.journal, run_ids(about), total) as ledger:
        ended = [index for index in range(total) if ledger.finished(index)]
        step = max(1, len(ended) // _READ)
        records = [ledger.record(index) for index in ended[::step]]
    found = Seen.of(records, sys.maxsize, f"{len(ended):,} items of {path}", step)
    if found is None:
        msg = f"--like {path}: no item of this run has been asked yet"
        raise ConfigurationError(msg)
    return found
