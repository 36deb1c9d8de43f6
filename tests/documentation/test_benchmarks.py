"""The published figures: what is written, and that the committed pages agree with their data."""

from __future__ import annotations

import json
from pathlib import Path

from fanfold.tests.benchmarks.figures import (
    OtherPrograms,
    Page,
    Table,
    describe_machine,
    write_figures,
)
from fanfold.tests.benchmarks.suite import DOCS


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
        assert (DOCS / f"{table['name']}.svg").exists()
