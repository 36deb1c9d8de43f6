from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.endpoints_table import append_endpoints, read_endpoints, sum_sessions


def report(
    endpoint: str, calls: int, p50: float | None = 1.0, usd: float | None = None, **failures: int
) -> dict[str, Any]:
    latencies = dict.fromkeys(("latency_p50_s", "latency_p90_s", "latency_p99_s"), p50)
    counts: dict[str, float | None] = {
        "calls": calls,
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "opened": 1,
        "hedges": 0,
    }
    counts |= {"cached_tokens": 1, "useful_tokens": 4, "wasted_tokens": 1, "usd": usd}
    return {"endpoint": endpoint, "state": "in use", "failures": failures, **counts, **latencies}


def test_one_row_per_endpoint_and_life(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.parquet"
    assert read_endpoints(path) == []
    append_endpoints(path, [report("a", 5, Lost=2, Busy=1), report("b", 1)], 1)
    append_endpoints(path, [report("a", 7, None, Lost=1)], 2)
    rows = read_endpoints(path)
    assert [(r["session"], r["endpoint"], r["calls"], r["failed"]) for r in rows] == [
        (1, "a", 5, 3),
        (1, "b", 1, 0),
        (2, "a", 7, 1),
    ]
    assert rows[0]["failures"] == {"Busy": 1, "Lost": 2}
    append_endpoints(path, [], 2)
    assert len(read_endpoints(path)) == 2


def test_lives_are_added_up(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.parquet"
    append_endpoints(path, [report("a", 5, 1.5, Lost=2), report("b", 1)], 1)
    append_endpoints(path, [report("a", 7, None, 0.25, Busy=1)], 2)
    a, b = sum_sessions(read_endpoints(path))
    assert (a["session"], a["calls"], a["failed"], a["prompt_tokens"]) == (2, 12, 3, 6)
    assert [a[f"{kind}_tokens"] for kind in ("cached", "useful", "wasted")] == [2, 8, 2]
    assert (a["usd"], b["usd"]) == (0.25, None)
    assert a["failures"] == {"Busy": 1, "Lost": 2}
    assert a["latency_p50_s"] == 1.5
    assert (b["session"], b["calls"]) == (1, 1)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(JournalError, match=r"endpoints\.parquet"):
        read_endpoints(path)
