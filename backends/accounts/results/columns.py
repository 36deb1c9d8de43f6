"""The columns of the results, the same in every format, and JSON text in their cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

import orjson

from ...contract.types import Json

Record: TypeAlias = Mapping[str, Json]
"""A journal record. What it lacks is null in the results."""

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
    "lost_tokens",
    "useful_tokens",
    "nano_usd",
    "latency_s",
    "finished_at",
    "simulated",
    "fingerprint",
)
"""Columns in order."""

UNFIT: Final = "output_unfit"
"""Last column where a schema gives the output typed columns: the whole output as JSON text where
they cannot hold all of it (an undeclared property, an integer beyond 64 bits), else null."""


def json_text(value: Json) -> str:
    """Return a value as compact JSON."""
    return orjson.dumps(value).decode()
