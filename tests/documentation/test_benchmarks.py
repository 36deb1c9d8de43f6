"""The published figures: what is written, and that the committed pages agree with their data."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fanfold.tests.benchmarks.figures import (
    OtherPrograms,
    Page,
    Table,
    describe_machine,
    write_figures,
)
from fanfold.tests.benchmarks.suite import CASES, DOCS, Place, find_losses, measure_cases


def test_figures_are_written_with_median_range_and_machine(tmp_path: Path) -> None:
    table = Table("cost", "What does it cost?", "ms", "A note.")
    for value in (3.0, 1.0, 200.0):
        table.add("fanfold", value)
    table.add("other", 0.1234)
    machine = describe_machine(OtherPrograms()) | {"other_programs": 0.41}
    missing = {"faults": "RuntimeError: it ended with 1"}
    write_figures(tmp_path, Page([table], machine, "make bench", missing=missing))
    page = (tmp_path / "README.md").read_text()
    assert "| fanfold | 3 | 1 to 200 | 3 |" in page
    assert "| other | 0.123 | 0.123 to 0.123 | 1 |" in page
    assert "Other programs used this machine** (41 % of its CPU time" in page
    assert "**Not measured: faults.** `RuntimeError: it ended with 1`" in page
    assert machine["cpu"] in page
    data = json.loads((tmp_path / "figures.json").read_text())
    assert data["tables"][0]["rows"]["fanfold"] == [3.0, 1.0, 200.0]
    assert (tmp_path / "cost.svg").read_text().startswith("<svg")


def test_the_committed_page_shows_every_table_of_its_data() -> None:
    data = json.loads((DOCS / "figures.json").read_text())
    page = (DOCS / "README.md").read_text()
    assert data["machine"]["packages"]["fanfold"]
    for table in data["tables"]:
        assert f"## {table['title']}" in page
    shown = set(re.findall(r"\]\(([\w-]+\.svg)\)", page))
    assert len(shown) >= len(data["tables"]) // 2
    assert shown == {path.name for path in DOCS.glob("*.svg")}


def test_a_part_that_fails_is_named_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: bool) -> list[Table]:
        raise RuntimeError("no\nserver")

    def interrupt(_: bool) -> list[Table]:
        raise KeyboardInterrupt

    table = Table("start", "How long?", "s", "A note.")
    monkeypatch.setitem(CASES, "reduce", fail)
    monkeypatch.setitem(CASES, "start", lambda _: [table])
    monkeypatch.setitem(CASES, "budget", interrupt)
    tables, missing, _ = measure_cases(["reduce", "start", "budget", "faults"], quick=True)
    assert tables == [table]
    assert missing == {
        "reduce": "RuntimeError: no server",
        "budget": "interrupted",
        "faults": "interrupted",
    }


def test_a_program_that_fails_is_no_measurement(tmp_path: Path) -> None:
    place = Place(tmp_path, ())
    command = [sys.executable, "-c", "import sys; sys.exit('out of order')"]
    with pytest.raises(RuntimeError, match="ended with 1: out of order"):
        place.run(command)
    assert place.run(command, codes=(1,)).cpu_s > 0


def test_losses_follow_from_the_figures() -> None:
    cost = Table("cost", "", "", "", rows={"raw aiohttp": [0.2], "fanfold run": [0.5]})
    memory = Table("cost-memory", "", "", "", rows={"raw aiohttp": [44.0], "fanfold run": [256.0]})
    storm = Table("storm", "", "", "", rows={"before": [100.0], "during": [80.0], "later": [99.0]})
    parts = {
        "HTTP client (aiohttp)": [50.0],
        "fleet: retries": [30.0],
        "input": [9.0],
        "rest": [2.0],
    }
    profile = Table("profile", "", "", "", rows=parts)
    (text,) = find_losses([cost, memory, profile, storm])
    assert "0.5 ms of CPU time, 2.5 times that of a bare loop" in text
    assert "The three largest parts of it: HTTP client 50 %, fleet 30 %, input 9 %." in text
    assert "256 MB of memory; a bare loop takes 44 MB" in text
    assert "up to 20 % of the throughput (during)" in text
    assert find_losses([]) == []


def test_groups_of_rows_are_a_table_with_a_column_for_each(tmp_path: Path) -> None:
    rows = {"small, input": [35.0], "small, auto": [5.0], "large, input": [28.0]}
    table = Table("prefix", "How far?", "%", "A note.", rows=rows, grouped=True)
    write_figures(tmp_path, Page([table], describe_machine(OtherPrograms()), "make bench"))
    page = (tmp_path / "README.md").read_text()
    assert "| % | input | auto |" in page
    assert "| small | 35 | 5 |" in page
    assert "| large | 28 |  |" in page
