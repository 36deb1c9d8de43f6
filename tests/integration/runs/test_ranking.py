"""``rank`` on a real fleet with a noisy judge whose true order is known."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold.backends.simulated.judging import measure_text
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.integration.runs.test_pipeline import STREAMS, begin, command, has_lines, outputs
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

ITEMS, K = 120, 5
RANK = {"op": "rank", "prompt": "The best.", "text": "{x}", "k": K, "group": 6}


def ranked(lab: Lab) -> None:
    for key in ("task", "reduce"):
        del lab.config[key]
    lab.config |= {
        "model": {"max_tokens": 300},
        "limits": {"streams": STREAMS, "hedge": False},
        "stages": [{"name": "best", "reduce": RANK}],
    }


def read_best(lab: Lab) -> list[dict[str, Any]]:
    return list(pq.read_table(lab.out / "stages/best/results.parquet").to_pylist())


async def test_the_true_best_are_found(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        ranked(lab)
        said = await begin(lab, lab.out)
        rows = read_best(lab)
        ranks = [row["output"]["rank"] for row in rows]
        assert ranks == sorted(ranks)
        values = {row["id"]: measure_text(orjson.dumps(row["x"]).decode()) for row in rows}
        assert min(values.values()) > 1.0  # of 120 normal values, the fifth best is near 1.7
        assert all(row["output"]["reason"] for row in rows)
        (stage,) = said["stages"]
        assert stage["report"]["settled"]
        assert stage["report"]["calls"] + K == stage["requests"]


async def test_killed_in_rounds_it_asks_the_same_questions(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1) as lab:
        ranked(lab)
        await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        lab.fleet.reset()
        arguments: tuple[str, ...] = ()
        kills = ("1", "3")
        for level in kills:
            folder = lab.out / "stages/best/levels" / level
            async with lab.process(*arguments) as process:
                await lab.until(partial(has_lines, folder))
                process.kill()
                assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
            await lab.until(lab.fleet_is_idle)
            arguments = ("resume", str(lab.out))
        await command(lab, "resume", str(lab.out))
        assert outputs(lab.out) == expected
        asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
        assert sum(asked) - len(asked) <= len(kills) * STREAMS
