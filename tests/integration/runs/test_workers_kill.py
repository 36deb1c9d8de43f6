"""kill -9 of workers, of Parsl's manager and of the coordinator: nothing lost or doubled."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.storage.endpoints_table import read_endpoints
from fanfold.backends.storage.run_folder import open_folder
from fanfold.backends.storage.timeline import read_timeline
from fanfold.graphs.run.run_result import RunResult
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

STREAMS = 16
SLOWER = 10.0
PROCESSES: dict[str, Any] = {"kind": "local", "processes": 2}
PARSL: dict[str, Any] = {"kind": "parsl", "workers": 2, "silence_s": 20}
LAUNCHED: dict[str, Any] = {"kind": "launched", "workers": 2}


def marked(token: str) -> list[int]:
    """Return the processes whose environment carries a token, however they are related."""
    return list(_marked(token))


def _marked(token: str) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and token.encode() in (folder / "environ").read_bytes():
                yield int(folder.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def begun(lab: Lab) -> list[int]:
    """Return the workers that have recorded an item, by the names of their journal files."""
    files = (lab.out / "journal").glob("*-*.jsonl")
    return [int(f.stem.split("-")[-2]) for f in files if f.read_bytes().count(b"\n") > 1]


async def lived(lab: Lab, *victims: Callable[[list[int]], Iterable[int]]) -> RunResult:
    """Run here; each time that two workers which live have recorded items, kill -9 the next.

    Until then answers are slow, so that items are left however long a worker takes to start.
    """
    lab.fleet.add_fault(FaultRule("slow", value=1 / SLOWER))
    life, dead = asyncio.create_task(lab.live(await lab.begin())), set[int]()

    def living() -> list[int]:
        # a launcher kills the others with one
        return [p for p in begun(lab) if p not in dead and Path(f"/proc/{p}").exists()]

    for victim in victims:
        await lab.until(lambda: life.done() or len(living()) == 2)
        assert not life.done()
        killed = set(victim(living()))
        dead |= killed
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
    lab.fleet.add_fault(FaultRule("slow", value=4 * SLOWER))
    result: RunResult = await asyncio.wait_for(life, DEADLINE_S)
    return result


def the_first(workers: list[int]) -> list[int]:
    return workers[:1]


def all_of_them(workers: list[int]) -> list[int]:
    return workers


def their_parent(workers: list[int]) -> set[int]:
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in workers)
    return {int(stat.rpartition(")")[2].split()[1]) for stat in stats}


def asked_again(lab: Lab) -> int:
    """Return how many questions the fleet got more than once, by its own counts."""
    book = lab.fleet.stats(prompts=True)["prompts"]
    return sum(int(question["asked"]) > 1 for question in book.values())


def leftovers(lab: Lab) -> list[str]:
    names = (file.name for file in open_folder(lab.out).journal.iterdir())
    kept = ("lock", "extents.json")
    return sorted(n.split("-")[0] for n in names if not n.endswith(".jsonl") and n not in kept)


async def test_worker_processes_are_killed(lab_of: LabMaker) -> None:
    """First one of two, then both that work on."""
    async with lab_of(items=400) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = PROCESSES
        result = await lived(lab, the_first, all_of_them)
        assert result.exit_code == 0
        assert len(begun(lab)) >= 4
        lab.assert_whole(aggregate, again=0)
        assert 0 < asked_again(lab) <= STREAMS // 2 + STREAMS
        assert leftovers(lab) == []
        # heartbeats of the killed workers have reported what their results could not
        rows = read_endpoints(lab.out / "endpoints.parquet")
        timeline = read_timeline(lab.out / "timeline.arrow").to_pylist()
        calls = sum(bin_["calls"] for bin_ in timeline)
        assert sum(row["calls"] for row in rows) <= calls
        assert calls <= lab.fleet.stats()["totals"]["requests"]


async def test_parsls_worker_and_manager_are_killed(lab_of: LabMaker) -> None:
    async with lab_of(items=400) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = PARSL
        result = await lived(lab, the_first, their_parent)
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)
        # Parsl's manager has no time to end its workers: they go on for half a second
        assert 0 < asked_again(lab) <= STREAMS // 2 + 2 * STREAMS


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(PROCESSES, id="processes"),
        pytest.param(PARSL, id="parsl", marks=pytest.mark.long),
        pytest.param(LAUNCHED, id="launched", marks=pytest.mark.long),
    ],
)
async def test_the_coordinator_is_interrupted_and_then_killed(
    lab_of: LabMaker, backend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, which reaches its whole process group, nothing is lost; kill -9 leaves nobody."""
    token = f"FANFOLD_TEST={os.urandom(6).hex()}"
    monkeypatch.setenv(*token.split("="))
    async with lab_of(items=300) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = backend
        async with lab.process(group=True) as process:
            await lab.until(lambda: lab.journal_lines() >= 40)
            os.killpg(process.pid, signal.SIGINT)
            said, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert json.loads(said)["done"] == lab.journal_lines() < 200
        assert not marked(token)
        await lab.killed_at(140, "resume", str(lab.out), "--quiet")
        await lab.until(lambda: not marked(token))
        assert asked_again(lab) == 0
        assert lab.journal_lines() < 300
        result = await lab.live(overrides=("backend={kind: local}",))
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=STREAMS)
        assert leftovers(lab) == ["stop", "stop"]  # an engine may still have tasks of both
