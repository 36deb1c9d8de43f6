"""Runs with several samples of each row and an image in each, on any backend."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from fanfold.tests.integration.runs.conftest import Lab
from fanfold.tests.integration.runs.test_images_runs import COUNT, contents, records, with_images

SAMPLES = 2
_KEPT = ("id", "sample", "question", "output", "images", "error")
_COLUMNS = ("id", "status", "output", "agreement", "samples")


async def assert_same_on(lab: Lab, backend: dict[str, Any]) -> None:
    """Assert that a run has the same records and results on a backend as in this process.

    The image of the last row is missing; each sample has a seed, so that answers repeat.
    """
    with_images(lab)
    lab.config["task"]["samples"] = SAMPLES
    lab.config["model"] = {"temperature": 0.8, "seed": 100}
    lab.config["shard"] = {"items": 8}
    seen, tables = list[Any](), list[Any]()
    for name, settings in (("here", {}), ("there", {"backend": backend})):
        lab.config.pop("backend", None)
        lab.config |= settings
        folder = await lab.begin(lab.home / name)
        result = await lab.live(folder)
        assert (result.exit_code, result.progress["items"]) == (3, COUNT * SAMPLES)
        assert result.progress["failed"] == SAMPLES
        found = records(folder.path)
        assert all(record["prompt_tokens"] > 256 for record in found[:-SAMPLES])
        assert not any(b"base64" in data or b"3" * 99 in data for data in contents(folder.path))
        seen.append([{key: record.get(key) for key in _KEPT} for record in found])
        table = pq.read_table(folder.path / "results.parquet")
        tables.append([table.column(key).to_pylist() for key in _COLUMNS])
    assert seen[0] == seen[1]
    assert tables[0] == tables[1]
    asked = [record["question"] for record in seen[0][:-SAMPLES]]
    assert len(set(asked)) == (COUNT - 1) * SAMPLES
    assert len(tables[0][0]) == COUNT
