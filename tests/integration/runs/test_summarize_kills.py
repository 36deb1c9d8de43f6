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
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = [pytest.mark.integration, pytest.mark.long]

ITEMS, STREAMS = 10_000, 16
_LONG_S = 600.0
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


BACKENDS: dict[str, dict[str, Any]] = {
    "local": {},
    "processes": {"kind": "local", "processes": 2},
    "parsl": {"kind": "parsl", "workers": 2},
}


async def run_undisturbed(lab: Lab) -> tuple[bytes, list[int]]:
    """Run the pipeline in one process; return its results, and the questions of each level."""
    summarized(lab)
    said = await begin(lab, lab.home / "undisturbed")
    levels = [level["items"] for level in said["stages"][0]["levels"]]
    assert len(levels) >= 5
    (row,) = pq.read_table(
        lab.home / "undisturbed/stages/summary/results.parquet", columns=["output"]
    ).to_pylist()
    assert row["output"]["items"] == ITEMS
    lab.fleet.reset()
    return outputs(lab.home / "undisturbed"), levels


@pytest.mark.parametrize("name", BACKENDS)
async def test_kills_at_every_level_change_nothing(lab_of: LabMaker, name: str) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1, tpot_s=0.0) as lab:
        expected, levels = await run_undisturbed(lab)
        lab.config["backend"] = BACKENDS[name]
        again = await kill_at_each_level(lab, lab.home / name, levels)
        assert outputs(lab.home / name) == expected
        assert again[0] == sum(levels)
        assert again[1] <= len(levels) * STREAMS


@pytest.mark.parametrize("name", ["local", "processes"])
async def test_the_budget_ends_in_the_second_level_and_is_raised(
    lab_of: LabMaker, name: str
) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1, tpot_s=0.0) as lab:
        expected, levels = await run_undisturbed(lab)
        total, limit = sum(levels), levels[0] + 20
        lab.config |= {"backend": BACKENDS[name], "budget": {"requests": limit}}
        paused = await begin(lab, lab.home / "paused", code=4)
        begun = paused["stages"][0]["levels"]
        assert [level["level"] for level in begun] == ["leaves", "merge 2"]
        assert begun[1]["done"] <= 20 < begun[1]["items"]
        assert paused["budget"]["requests"]["spent"] <= limit
        assert count_asked(lab)[0] <= limit
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
            await lab.until(partial(is_at_work, folder, questions), within_s=_LONG_S)
            process.kill()
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
        await lab.until(lab.fleet_is_idle, within_s=_LONG_S)
        arguments = ("resume", str(out))
    said: dict[str, Any] = await command(lab, "resume", str(out))
    assert said["stages"][0]["state"] == "finished"
    return count_asked(lab)
