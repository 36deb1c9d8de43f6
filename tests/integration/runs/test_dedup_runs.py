"""``dedup`` by embeddings on a real fleet: killed, stopped by the budget, and resumed."""

from __future__ import annotations

import asyncio
import json
import signal
from functools import partial

import pyarrow.ipc
import pytest

from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.integration.runs.test_pipeline import (
    STREAMS,
    begin,
    command,
    has_lines,
    lines_of,
    outputs,
)
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

ITEMS = 200


@pytest.mark.long
async def test_killed_and_paused_it_asks_each_text_once(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0) as lab:
        for key in ("task", "reduce"):
            del lab.config[key]
        reduce = {"op": "dedup", "by": "embeddings", "text": "{x} and so on", "threshold": 1}
        lab.config |= {
            "limits": {"streams": STREAMS, "hedge": False},
            "stages": [{"name": "unique", "reduce": reduce}],
        }
        await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        lab.fleet.reset()
        level = lab.out / "stages/unique/levels/1"
        lab.config["budget"] = {"requests": ITEMS - 20}
        async with lab.process() as process:
            await lab.until(partial(has_lines, level))
            process.kill()
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
        await lab.until(lab.fleet_is_idle)
        cut_off = len(lab.fleet.stats(prompts=True)["prompts"]) - lines_of(level)
        assert 0 <= cut_off <= STREAMS  # calls in flight, whose answers nobody has recorded
        await command(lab, "resume", str(lab.out), code=4)
        said = await command(lab, "resume", str(lab.out), "--budget-requests", "1000")
        assert outputs(lab.out) == expected
        asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
        assert len(asked) == ITEMS
        assert sum(asked) == ITEMS + cut_off
        (stage,) = said["stages"]
        assert stage["tokens"]["completion"] == 0 < stage["tokens"]["prompt"]
        table = pyarrow.ipc.open_file(str(lab.out / "stages/unique/vectors.arrow")).read_all()
        assert table.num_rows == ITEMS
        for file in (level / "journal").glob("*.jsonl"):
            records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
            assert all(isinstance(one["output"], str) for one in records)
