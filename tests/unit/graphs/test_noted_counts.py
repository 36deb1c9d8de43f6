"""Counts for lists of runs: noted while a run goes on, and at its end unless it is a level."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fanfold.backends.core.money import NodeTime, UsageTotals
from fanfold.backends.storage.run_folder import RunFolder, read_noted_counts
from fanfold.graphs.run import noted_counts

PROGRESS = SimpleNamespace(done=3, failed=1, usage=UsageTotals(), node_time=NodeTime())
TOOLS = cast("Any", SimpleNamespace(progress=PROGRESS))


async def test_a_level_that_lasts_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noted_counts, "_NOTE_S", 0.001)
    folder = RunFolder(tmp_path)
    async with noted_counts.note_counts(folder, TOOLS, at_end=False), asyncio.timeout(60):
        while (found := read_noted_counts(folder)) is None:  # noqa: ASYNC110 - a file
            await asyncio.sleep(0.001)
    assert (found["done"], found["failed"]) == (3, 1)


@pytest.mark.parametrize("at_end", [True, False])
async def test_the_end_of_a_level_is_in_its_provenance(tmp_path: Path, at_end: bool) -> None:
    folder = RunFolder(tmp_path)
    async with noted_counts.note_counts(folder, TOOLS, at_end=at_end):
        await asyncio.sleep(0)
    assert folder.noted_counts.exists() == at_end
