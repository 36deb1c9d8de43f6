"""Results of a run that goes on in another process: read without disturbing it."""

from __future__ import annotations

import asyncio
import json

import pytest

from fanfold import load_results
from fanfold.tests.support.command_server import DEADLINE_S

from .conftest import LabMaker

pytestmark = pytest.mark.integration


async def test_the_rows_so_far_while_the_run_goes_on(lab_of: LabMaker) -> None:
    async with lab_of(200, ttft_s=0.8) as lab, lab.process() as process:
        await lab.until(lambda: lab.journal_lines() >= 20)
        counts = list[int]()
        while process.returncode is None:
            results = await asyncio.to_thread(load_results, lab.out)
            table = results.to_arrow()
            assert table.num_rows == len(results) == results.done
            numbers = [
                text.removeprefix("thing ") for text in table.column("x").to_pylist() if text
            ]
            assert table.column("id").to_pylist() == [f"i{n}" for n in numbers]
            counts.append(len(results))
            if len(results) == 200:
                break
        assert counts == sorted(counts)
        assert counts[0] < 200
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await process.communicate()
        assert json.loads(out)["done"] == 200
    final = load_results(lab.out)
    assert len(final) == 200
    assert [one["op"] for one in final.aggregate] == ["top_k", "histogram", "stats"]
