"""Runs in an order by shared prefixes: kills, workers, samples, results in the input's order."""

from __future__ import annotations

import csv
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run
from fanfold.tests.integration.runs.conftest import Lab, LabMaker

pytestmark = pytest.mark.integration

ITEMS, DOCUMENTS = 400, 20


@pytest.fixture
async def lab(lab_of: LabMaker) -> AsyncIterator[Lab]:
    """Return a run of shuffled questions about documents, whose fleet keeps counts."""
    async with lab_of(items=ITEMS) as lab:
        write_questions(lab)
        yield lab


def write_questions(lab: Lab) -> None:
    with lab.input.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "document", "x"])
        for n in range(ITEMS):
            name = n * 7 % DOCUMENTS
            writer.writerow([f"i{n}", f"Document {name:02}. " * 60, f"thing {n}"])
    lab.config["task"]["prompt"] = "{document} What is {x}?"
    lab.config["limits"] |= {"hedge": False, "order": "auto"}


def read_journal(folder: Path) -> list[int]:
    records = []
    for file in sorted((folder / "journal").glob("*.jsonl")):
        for line in file.read_bytes().splitlines()[1:]:
            record = orjson.loads(line)
            if "index" in record:
                records.append(record["index"])
    return records


def assert_whole(lab: Lab, result: Any) -> None:
    assert result.exit_code == 0
    ids = pq.read_table(lab.out / "results.parquet").column("id").to_pylist()
    assert ids == [f"i{n}" for n in range(ITEMS)]
    assert sorted(read_journal(lab.out)) == list(range(ITEMS))


async def test_groups_follow_each_other_and_a_killed_run_goes_on(lab: Lab) -> None:
    undisturbed = await lab.undisturbed()
    order = orjson.loads((lab.home / "undisturbed" / "provenance.json").read_bytes())["order"]
    assert (order["by"], order["groups"], order["grouped"]) == ("prefix", DOCUMENTS, ITEMS)
    await lab.killed_at(60)
    started = read_journal(lab.out)[:60]
    assert len({index * 7 % DOCUMENTS for index in started}) <= 6
    result = await lab.live()
    assert_whole(lab, result)
    assert result.aggregate == undisturbed


@pytest.mark.parametrize("shared", [True, False])
async def test_workers_keep_the_order(lab: Lab, shared: bool) -> None:
    lab.config["backend"] = {"kind": "local", "processes": 2, "shared_folder": shared}
    assert_whole(lab, await lab.live(await lab.begin()))


async def test_groups_are_found_by_default_and_input_keeps_the_order(lab: Lab) -> None:
    del lab.config["limits"]["order"]
    folder = await lab.begin()
    assert folder.order.exists()
    lab.config["limits"]["order"] = "input"
    run = await prepare_run(load_config(lab.config), lab.home / "other")
    assert not run.folder.order.exists()
    assert orjson.loads((run.folder.path / "provenance.json").read_bytes())["order"] == {
        "by": "input"
    }
