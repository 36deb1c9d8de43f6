"""The timeline of a run: bins, sums over them, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.timeline import BinCounts, TimelineDelta
from fanfold.backends.storage import timeline as module
from fanfold.backends.storage.timeline import MOST_BINS, SCHEMA, Timeline, read_timeline

BEGIN_MS = 1_700_000_000_000
DAY_MS = 86_400_000


def delta(*cells: tuple[int, str, BinCounts], width_ms: int = 250) -> TimelineDelta:
    made = TimelineDelta(width_ms, 100_000)
    for at_ms, endpoint, counts in cells:
        made.add(BEGIN_MS + at_ms, endpoint, counts)
    return made


def counts(calls: int = 1, failures: dict[str, int] | None = None) -> BinCounts:
    return BinCounts(calls, failures or {}, calls / 2, 10 * calls, 100 * calls, calls / 4)


def rows(path: Path) -> list[dict[str, Any]]:
    found = read_timeline(path).to_pylist()
    for row in found:
        row["start"] = round(1000 * row["start"].timestamp()) - BEGIN_MS
        row["failures"] = dict(row["failures"])
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "timeline.arrow"


def test_rows_have_the_columns_that_readers_rely_on(path: Path) -> None:
    timeline = Timeline(path)
    timeline.add([delta((510, "b", counts(3, {"Lost": 2})), (740, "b", counts(1, {"Late": 1})))])
    timeline.add([delta((0, "a", counts(2)), (600, "b", counts(1, {"Lost": 1})))])
    timeline.write()
    table = read_timeline(path)
    assert table.schema == SCHEMA
    assert table.schema.metadata == {b"fanfold.timeline.version": b"1"}
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("start", "timestamp[ms, tz=UTC]"),
        ("seconds", "double"),
        ("endpoint", "dictionary<values=string, indices=int32, ordered=0>"),
        ("calls", "int64"),
        ("failures", "map<string, int64>"),
        ("in_flight", "double"),
        ("input_tokens", "int64"),
        ("output_tokens", "int64"),
        ("latency_s", "double"),
    ]
    assert rows(path) == [
        {
            "start": 0,
            "seconds": 0.25,
            "endpoint": "a",
            "calls": 2,
            "failures": {},
            "in_flight": 4.0,
            "input_tokens": 20,
            "output_tokens": 200,
            "latency_s": 0.5,
        },
        {
            "start": 500,
            "seconds": 0.25,
            "endpoint": "b",
            "calls": 5,
            "failures": {"Lost": 3, "Late": 1},
            "in_flight": 10.0,
            "input_tokens": 50,
            "output_tokens": 500,
            "latency_s": 1.25,
        },
    ]


def test_a_later_session_continues_the_timeline_and_a_gap_takes_no_bins(path: Path) -> None:
    first = Timeline(path)
    first.add([delta((0, "a", counts(1, {"Lost": 1})), (250, "b", counts(2)))])
    first.write()
    second = Timeline(path)
    second.load()
    second.add([delta((3 * DAY_MS, "c", counts(5)), (250, "b", counts(1, {"Late": 1})))])
    second.write()
    found = [(row["start"], row["endpoint"], row["calls"], row["failures"]) for row in rows(path)]
    assert found == [
        (0, "a", 1, {"Lost": 1}),
        (250, "b", 3, {"Late": 1}),
        (3 * DAY_MS, "c", 5, {}),
    ]
    assert {row["seconds"] for row in rows(path)} == {0.25}


def test_bins_get_wider_when_there_are_too_many_and_no_call_is_lost(path: Path) -> None:
    timeline, total = Timeline(path), 10 * MOST_BINS
    for lo in range(0, total, 500):
        cells = [
            (250 * step, name, counts(1, {"Lost": 1} if step % 10 == 0 else {}))
            for step in range(lo, lo + 500)
            for name in ("a", "b")
        ]
        timeline.add([delta(*cells, width_ms=250)])
    timeline.write()
    found = rows(path)
    starts = [row["start"] for row in found if row["endpoint"] == "a"]
    assert MOST_BINS / 2 < len(starts) <= MOST_BINS
    assert {row["seconds"] for row in found} == {4.0}
    assert all((BEGIN_MS + start) % 4000 == 0 for start in starts)
    assert sorted((row["start"], row["endpoint"]) for row in found) == [
        (row["start"], row["endpoint"]) for row in found
    ]
    for name in ("a", "b"):
        mine = [row for row in found if row["endpoint"] == name]
        assert sum(row["calls"] for row in mine) == total
        assert sum(row["failures"].get("Lost", 0) for row in mine) == total / 10
        assert sum(row["output_tokens"] for row in mine) == 100 * total
        assert sum(row["in_flight"] * row["seconds"] for row in mine) == pytest.approx(total / 2)


def test_late_reports_join_old_bins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_RECENT", 64)  # settle the rows after few of them
    timeline = Timeline(path)
    for step in range(500):
        timeline.add([delta((250 * step, "a", counts()), (250 * step, "b", counts()))])
    timeline.add([delta((250 * 3, "b", counts(7, {"Lost": 7})), (250 * 499, "a", counts(2)))])
    timeline.write()
    found = {(row["start"] // 250, row["endpoint"]): row for row in rows(path)}
    assert len(found) == len(rows(path)) == 1000
    assert found[3, "b"]["calls"] == 8
    assert found[3, "b"]["failures"] == {"Lost": 7}
    assert found[499, "a"]["calls"] == 3
    assert sum(row["calls"] for row in found.values()) == 1009


def test_a_report_with_wider_bins_widens_the_timeline(path: Path) -> None:
    timeline = Timeline(path)
    timeline.add([delta((0, "a", counts()), (1900, "a", counts()))])
    timeline.add([delta((2000, "a", counts(4)), width_ms=2000)])
    timeline.write()
    found = [(row["start"], row["seconds"], row["calls"]) for row in rows(path)]
    assert found == [(0, 2.0, 2), (2000, 2.0, 4)]


def test_rows_are_bounded_for_thousands_of_endpoints(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 1_000)
    timeline = Timeline(path)
    for step in range(40):
        timeline.add([delta(*((250 * step, f"e{n}", counts()) for n in range(300)))])
    timeline.write()
    found = rows(path)
    assert len(found) <= 1_000
    assert sum(row["calls"] for row in found) == 12_000
    timeline.add([delta(*((0, f"more{n}", counts()) for n in range(1_500)))])
    timeline.write()
    assert sum(row["calls"] for row in rows(path)) == 13_500  # more endpoints than rows: one bin


def test_many_error_classes_are_counted_together(path: Path) -> None:
    timeline = Timeline(path)
    timeline.add([delta((0, "a", counts(200, {f"E{n}": 1 for n in range(200)})))])
    timeline.write()
    (row,) = rows(path)
    assert len(row["failures"]) == 64
    assert row["failures"]["other classes"] == 137
    again = Timeline(path)
    again.load()
    again.add([delta((0, "a", counts(1, {"E199": 1})))])
    again.write()
    (row,) = rows(path)
    assert row["failures"]["other classes"] == 138


@pytest.mark.parametrize("damage", ["cut", "text", "version", "columns"])
def test_a_damaged_file_is_named(path: Path, damage: str) -> None:
    timeline = Timeline(path)
    timeline.add([delta((0, "a", counts()))])
    timeline.write()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "text":
        path.write_text("no Arrow")
    else:
        table = read_timeline(path)
        changed = table.replace_schema_metadata({"fanfold.timeline.version": "2"})
        changed = table.drop_columns(["calls"]) if damage == "columns" else changed
        with ipc.new_file(pa.OSFile(str(path), "wb"), changed.schema) as writer:
            writer.write_table(changed)
    with pytest.raises(JournalError, match=r"timeline\.arrow"):
        Timeline(path).load()
