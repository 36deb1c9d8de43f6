"""Table of each endpoint's work in each session of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.arrow_columns import make_column
from ..core.errors import JournalError
from .results import replace_file

FILE_NAME: Final = "endpoints.parquet"

_FAILURE: Final = pa.struct([("class", pa.string()), ("count", pa.int64())])
_FIELDS: Final[list[tuple[str, pa.DataType]]] = [
    ("session", pa.int64()),
    ("endpoint", pa.string()),
    ("state", pa.string()),
    ("calls", pa.int64()),
    ("failed", pa.int64()),
    ("failures", pa.list_(_FAILURE)),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("cached_tokens", pa.int64()),
    ("useful_tokens", pa.int64()),
    ("wasted_tokens", pa.int64()),
    ("usd", pa.float64()),
    ("latency_p50_s", pa.float64()),
    ("latency_p90_s", pa.float64()),
    ("latency_p99_s", pa.float64()),
    ("opened", pa.int64()),
    ("hedges", pa.int64()),
]
_TABLE: Final = pa.schema(_FIELDS)
_SUMS: Final = (
    "calls",
    "failed",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "useful_tokens",
    "wasted_tokens",
    "opened",
    "hedges",
)
_LATENCIES: Final = ("latency_p50_s", "latency_p90_s", "latency_p99_s")


def append_endpoints(path: Path, reports: Sequence[Mapping[str, Any]], session: int) -> None:
    """Add one row per endpoint to the table, in one step.

    Args:
        path: The table; created if missing.
        reports: Report of each endpoint, with ``failures`` as counts by class.
        session: Session number, from 1; replaces existing rows of that session.

    Raises:
        JournalError: The table cannot be read or written.
    """
    before = [row for row in _rows(path) if row["session"] != session]
    rows = [*before, *(_row(report, session) for report in reports)]
    columns = [make_column([row.get(one.name) for row in rows], one.type) for one in _TABLE]
    with replace_file(path) as file:
        pq.write_table(pa.table(columns, schema=_TABLE), file)


def read_endpoints(path: Path) -> list[dict[str, Any]]:
    """Return the table's rows; none before the first session has ended.

    Raises:
        JournalError: The table cannot be read.
    """
    rows = _rows(path)
    named = ({f["class"]: f["count"] for f in row["failures"]} for row in rows)
    return [row | {"failures": counts} for row, counts in zip(rows, named, strict=True)]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    except FileNotFoundError:
        return []
    except (OSError, pa.ArrowException) as error:
        raise JournalError(
            f"{path}: cannot be read: {error}; remove it to start a new one"
        ) from None
    return rows


def _row(report: Mapping[str, Any], session: int) -> dict[str, Any]:
    counts = report["failures"]
    return {
        **report,
        "session": session,
        "failed": sum(counts.values()),
        "failures": [{"class": name, "count": counts[name]} for name in sorted(counts)],
    }


def sum_sessions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum the sessions of each endpoint; state and latencies are those of its last session."""
    totals: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["session"]):
        before = totals.get(row["endpoint"])
        total = dict(row)
        if before is not None:
            for name in _SUMS:
                total[name] = (row.get(name) or 0) + (before.get(name) or 0)
            if row.get("usd") is not None or before.get("usd") is not None:
                total["usd"] = (row.get("usd") or 0.0) + (before.get("usd") or 0.0)
            total["failures"] = _add_counts(before["failures"], row["failures"])
            for name in _LATENCIES:
                total[name] = row[name] if row[name] is not None else before[name]
        totals[row["endpoint"]] = total
    return list(totals.values())


def _add_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted(a.keys() | b.keys())}
