"""``summarize`` over 10,000 items: kill -9 at every level, and a budget that ends in the second."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.integration.runs.test_pipeline import begin, command, lines_of, outputs

pytestmark = [pytest.mark.integration, pytest.mark.long]

ITEMS, STREAMS = 10_000, 16
SUMMARIZE = {
    "op": "summarize",
    "prompt": "Summarize.",
    "text": "{x} and whatever else is known about it, which is little",
    "group_tokens": 400,
    "statements": 3,
    "verify": 40,
}


def summarized(lab: Lab) -> None:
    for key in ("task", "reduce", "shard"):
        del lab.config[key]
    lab.config |= {
        "model": {"max_tokens": 1000},
        "limits": {"streams": STREAMS, "hedge": False},
        "stages": [{"name": "summary", "reduce": SUMMARIZE}],
    }


def is_at_work(folder: Path, questions: int) -> bool:
    """Return True if a level has begun, and has an answer unless it has few questions."""
    if questions > STREAMS:
        return lines_of(folder) >= 1
    return (folder / "provenance.json").exists()


def count_asked(lab: Lab) -> tuple[int, int]:
    """Return the questions that the fleet was asked, and how many of them again."""
    asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
    return len(asked), sum(asked) - len(asked)


async def test_kills_at_every_level_and_a_budget_change_nothing(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1, tpot_s=0.0) as lab:
        summarized(lab)
        said = await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        levels = [level["items"] for level in said["stages"][0]["levels"]]
        assert len(levels) >= 5
        total = sum(levels)
        (row,) = pq.read_table(
            lab.home / "undisturbed/stages/summary/results.parquet", columns=["output"]
        ).to_pylist()
        assert row["output"]["items"] == ITEMS
        for name, backend in (
            ("local", {}),
            ("processes", {"kind": "local", "processes": 2}),
        ):
            lab.config["backend"] = backend
            again = await kill_at_each_level(lab, lab.home / name, levels)
            assert outputs(lab.home / name) == expected, name
            assert again[0] == total, name
            assert again[1] <= len(levels) * STREAMS, name
        del lab.config["backend"]
        lab.fleet.reset()
        lab.config["budget"] = {"requests": levels[0] + 20}
        paused = await begin(lab, lab.home / "paused", code=4)
        begun = paused["stages"][0]["levels"]
        assert [level["level"] for level in begun] == ["leaves", "merge 2"]
        assert begun[1]["done"] <= 20 < begun[1]["items"]
        assert paused["budget"]["requests"]["spent"] <= levels[0] + 20
        raised = await command(
            lab, "resume", str(lab.home / "paused"), "--budget-requests", str(2 * total)
        )
        assert raised["stages"][0]["requests"] == total
        assert outputs(lab.home / "paused") == expected
        assert count_asked(lab) == (total, 0)


async def kill_at_each_level(lab: Lab, out: Path, levels: list[int]) -> tuple[int, int]:
    """Run a pipeline, killed in each of its levels; return the questions asked, and again."""
    lab.fleet.reset()
    settings = str(lab.home / "config.yaml")
    arguments: tuple[str, ...] = ("run", settings, "--out", str(out))
    for number, questions in enumerate(levels, start=1):
        folder = out / f"stages/summary/levels/{number}"
        async with lab.process(*arguments) as process:
            await lab.until(partial(is_at_work, folder, questions))
            process.kill()
            assert await asyncio.wait_for(process.wait(), 60) == -signal.SIGKILL
        await lab.until(lab.fleet_is_idle)
        arguments = ("resume", str(out))
    said: dict[str, Any] = await command(lab, "resume", str(out))
    assert said["stages"][0]["state"] == "finished"
    return count_asked(lab)
