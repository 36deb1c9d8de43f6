"""The columns of the results, the same in every format, and JSON text in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias

import orjson

from ..core.money import NANO
from ..core.types import Json

Record: TypeAlias = Mapping[str, Json]
"""A row of the results. What it lacks is null in them."""

RESULT_COLUMNS: Final = (
    "id",
    "status",
    "output",
    "error_class",
    "error",
    "endpoint",
    "model",
    "attempts",
    "repairs",
    "reused",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "wasted_tokens",
    "usd",
    "latency_s",
    "finished_at",
    "simulated",
    "fingerprint",
)
"""Columns in order."""

UNFIT: Final = "output_unfit"
"""Last column where a schema gives the output typed columns: the whole output as JSON text where
they cannot hold all of it (an undeclared property, an integer beyond 64 bits), else null."""


def rows(records: Iterable[Record], *, priced: bool) -> Iterator[Record]:
    """Yield rows for journal records: what an item has cost in place of the parts it adds up from.

    Args:
        records: Journal records, in the order of the rows.
        priced: Whether tokens have a price; else nobody knows what an item has cost.
    """
    for record in records:
        yield {
            **record,
            "attempts": record.get("requests"),
            "wasted_tokens": _wasted(record),
            "usd": _usd(record) if priced else None,
        }


def _wasted(record: Record) -> int | None:
    """Return the tokens that may have been paid for nothing: failed, hedged, sent back."""
    useful = record.get("useful_tokens")
    return None if useful is None else _tokens(record) - int(useful)


def _tokens(record: Record) -> int:
    get = record.get
    return (get("prompt_tokens") or 0) + (get("completion_tokens") or 0) + (get("lost_tokens") or 0)


def _usd(record: Record) -> float | None:
    nano = record.get("nano_usd")
    asked_without_price = nano == 0 and _tokens(record) > 0
    return None if nano is None or asked_without_price else nano / NANO


def json_text(value: Json) -> str:
    """Return a value as compact JSON."""
    return orjson.dumps(value).decode()
