"""kill -9 of the coordinator: every item once; only items in flight are requested again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.simulated.faults import FaultRule
from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.support.command_server import DEADLINE_S, Command, get_command_server

pytestmark = pytest.mark.integration

STREAMS = 16


async def test_killed_three_times_in_a_row(lab_of: LabMaker) -> None:
    """At 5, 40 and 80 per cent: in the first session, in a resume, and in its resume."""
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        await lab.killed_at(10)
        await lab.killed_at(80, "resume", str(lab.out), "--quiet")
        await lab.killed_at(160, "resume", str(lab.out), "--quiet")
        async with lab.process("resume", str(lab.out), "--json") as process:
            said, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
            assert process.returncode == 0
        told = json.loads(said)
        assert (told["items"], told["done"], told["failed"]) == (200, 200, 0)
        lab.assert_whole(aggregate, again=3 * STREAMS)
        outcomes = [life["outcome"] for life in lives(lab.out)]
        assert outcomes == [None, None, None, "finished"]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
async def test_killed_at_a_random_moment(lab_of: LabMaker, seed: int) -> None:
    async with lab_of(seed=seed) as lab:
        aggregate = await lab.undisturbed()
        await lab.killed_at(random.Random(seed).randrange(1, 195))
        result = await lab.live()
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=STREAMS)


KILLED_BEFORE = """
import os, signal, sys
from pathlib import Path
from fanfold.graphs.cli.app import main
replace = Path.replace
def deadly(self, target):
    if Path(target).name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = deadly
main()
"""


@pytest.mark.parametrize(
    "name",
    [
        "results.parquet",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("failures.jsonl", "aggregate.json")),
    ],
)
async def test_killed_while_the_results_are_written(lab_of: LabMaker, name: str) -> None:
    async with lab_of(items=60, ttft_s=0.0, tpot_s=0.0) as lab:
        aggregate = await lab.undisturbed()
        async with lab.process(wrap=KILLED_BEFORE.format(name=name)) as process:
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
        assert not (lab.out / name).exists()
        assert lab.journal_lines() == 60
        result = await lab.live()
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_without_checkpoints_the_journal_is_enough(lab_of: LabMaker) -> None:
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        await lab.killed_at(100)
        for file in lab.out.glob("checkpoints.sqlite*"):
            file.unlink()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=STREAMS)


async def test_a_running_run_is_refused_to_others(lab_of: LabMaker) -> None:
    async with lab_of() as lab:
        lab.config["limits"]["drain_s"] = 0.5
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lab.journal_lines)
        lab.fleet.add_fault(FaultRule("hang"))  # it will not end by itself
        other = await get_command_server().run(Command(("resume", str(lab.out), "--quiet")))
        assert (other.returncode, life.done()) == (2, False)
        assert "another process or invocation is working on this run" in other.stderr
        life.cancel()
        with pytest.raises(asyncio.CancelledError):
            await life
        assert lives(lab.out)[-1]["outcome"] == "stopped by an error"


async def test_the_simulated_fleet_of_a_killed_run_dies_too(lab_of: LabMaker) -> None:
    async with lab_of() as lab:
        lab.config["endpoints"] = {"simulated": {"nodes": 1, "time_scale": 0.1}}
        async with lab.process() as process:
            await lab.until(lambda: len(lives(lab.out)) == 1)
            orphans = children(process.pid)
            assert len(orphans) == 1
            process.kill()
            await process.wait()
        await lab.until(lambda: not any(map(is_alive, orphans)))


def lives(folder: Path) -> list[dict[str, Any]]:
    file = folder / "provenance.json"
    return list(json.loads(file.read_bytes())["sessions"]) if file.exists() else []


def children(pid: int) -> list[int]:
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
