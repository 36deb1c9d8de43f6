"""Pipelines that take over the answers of another one: kills, cascades and their figures."""

from __future__ import annotations

import asyncio
import csv
import signal
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.run_folder import RunFolder, get_run_ids
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.integration.runs.test_cascade_runs import cascaded
from fanfold.tests.integration.runs.test_pipeline import (
    ITEMS,
    RUNS,
    STREAMS,
    begin,
    command,
    outputs,
    staged,
)
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration


def add_rows(lab: Lab, count: int) -> None:
    with lab.input.open("a", newline="") as file:
        csv.writer(file).writerows(
            [f"i{n}", f"thing {n}"] for n in range(lab.items, lab.items + count)
        )


def list_extend(lab: Lab, out: Path, source: Path) -> tuple[str, ...]:
    settings = lab.home / "pipeline.yaml"
    settings.write_bytes(orjson.dumps(lab.config))
    return ("run", str(settings), "--out", str(out), "--from", str(source), "--yes")


def read_records(folder: Path) -> list[dict[str, Any]]:
    about = RunFolder(folder).read_provenance()
    items = about["input"]["items"]
    with Journal(folder / "journal", get_run_ids(about), items) as journal:
        return [journal.read_record(index) for index in range(items)]


async def test_killed_in_each_stage_and_level(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1) as lab:
        first = lab.home / "first"
        await begin(staged(lab), first)
        add_rows(lab, 6)
        undisturbed = await command(lab, *list_extend(lab, lab.home / "undisturbed", first))
        expected = outputs(lab.home / "undisturbed")
        lab.fleet.reset()
        arguments = list_extend(lab, lab.out, first)
        for key in RUNS:
            async with lab.process(*arguments) as process:
                await lab.until(partial(was_asked, lab.out / key))
                process.kill()
                assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
            await lab.until(lab.fleet_is_idle)
            arguments = ("resume", str(lab.out))
        said = await command(lab, "resume", str(lab.out))
        assert outputs(lab.out) == expected
        for one, other in zip(said["stages"], undisturbed["stages"], strict=True):
            assert (one["kept"], one["requests"]) == (other["kept"], other["requests"])
        asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
        assert sum(asked) - len(asked) <= len(RUNS) * 2 * STREAMS


def was_asked(folder: Path) -> bool:
    return any(file.name != "0000.jsonl" for file in (folder / "journal").glob("*.jsonl"))


async def test_the_savings_of_a_cascade_are_unknown_if_answers_were_taken_over(
    lab_of: LabMaker,
) -> None:
    """Answers that were taken over cost nothing here, so they do not show what a call costs."""
    async with lab_of(items=40, ttft_s=0.0, responder="labels") as lab, cascaded(lab, 0.75):
        lab.config["model"]["price"] = {"prompt": 2.0, "completion": 6.0}
        lab.config["stages"][0]["cascade"]["target"] = 0.6
        (first,) = (await begin(lab, lab.home / "first"))["stages"]
        assert first["report"]["saved_usd"] is not None
        add_rows(lab, 4)
        (stage,) = (await command(lab, *list_extend(lab, lab.out, lab.home / "first")))["stages"]
        assert stage["kept"] > 40
        assert stage["report"]["saved_usd"] is None
        assert "USD" not in "".join(stage["report"]["lines"])


async def test_further_answers_of_a_small_model_are_not_its_first_ones(lab_of: LabMaker) -> None:
    """The questions are the same where the small model has a temperature anyway."""
    async with lab_of(items=20, ttft_s=0.0, responder="labels") as lab, cascaded(lab, 0.75):
        cascade = lab.config["stages"][0]["cascade"] | {"samples": 3}
        cascade["small"]["model"]["temperature"] = 0.9
        lab.config["stages"][0]["cascade"] = cascade
        first = lab.home / "first"
        await begin(lab, first)
        await command(lab, *list_extend(lab, lab.out, first))
        for level in ("stages/label/levels/1", "stages/label/levels/2"):
            old, new = read_records(first / level), read_records(lab.out / level)
            assert {one["id"]: one["finished_at"] for one in old} == {
                one["id"]: one["finished_at"] for one in new
            }
            assert all(one["origin"] for one in new)
