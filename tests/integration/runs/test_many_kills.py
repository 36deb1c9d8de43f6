"""Fifty times kill -9 of one run whose folder moves after each: nothing lost, little paid twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fanfold.tests.integration.runs.conftest import Lab, LabMaker

from .test_workers_kill import LAUNCHED, PARSL, PROCESSES, STREAMS, begun, marked

pytestmark = [pytest.mark.integration, pytest.mark.long]

KILLS = 50
ITEMS = 3000
LOCAL: dict[str, Any] = {"kind": "local"}
WAIT_S = 120.0


class MovingLab:
    """A run that is killed, moved and resumed by the command line, again and again.

    Args:
        lab: The run's settings and fleet.
        seed: What decides when and whom a kill strikes.
    """

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.random = lab, random.Random(seed)
        self.folder = lab.out
        self.moves = 0

    def recorded(self) -> int:
        """Return the number of records in the run's journal."""
        files = (self.folder / "journal").glob("*.jsonl")
        return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files)

    def move(self) -> None:
        """Rename the run folder, every second time into another directory."""
        self.moves += 1
        target = self.lab.home / f"place-{self.moves % 2}" / f"run-{self.moves}"
        target.parent.mkdir(exist_ok=True)
        self.folder.rename(target)
        self.folder = target

    def arguments(self) -> tuple[str, ...]:
        return () if not self.moves else ("resume", str(self.folder), "--quiet")

    def lost(self) -> int:
        """Return the number of requests that the fleet got and the journal does not hold."""
        return int(self.lab.fleet.stats()["totals"]["requests"]) - self.recorded()

    async def kill(self, token: str) -> int:
        """Start or resume the run and kill it -9: in its start, at work, or after a worker.

        Returns:
            The number of requests that may be in flight when their process dies.
        """
        before, in_flight = self.recorded(), STREAMS
        async with self.lab.process(*self.arguments(), group=True) as process:
            # a start is the rarer place: it records nothing, and fifty of them end no run
            if self.moves and self.random.random() < 0.2:
                await asyncio.sleep(self.random.uniform(0.0, 3.0))
            else:
                more = self.random.randrange(1, 60)
                await self.until(
                    lambda: process.returncode is not None or self.recorded() >= before + more
                )
                if self.random.random() < 0.3:
                    in_flight += kill_all(self.workers()[:1]) * STREAMS
                    await asyncio.sleep(self.random.uniform(0.0, 0.3))
            assert process.returncode is None
            process.kill()
            assert await asyncio.wait_for(process.wait(), WAIT_S) == -signal.SIGKILL
        await self.until(lambda: not marked(token))
        await self.until(self.lab.fleet_is_idle)
        return in_flight

    def workers(self) -> list[int]:
        """Return the workers that have recorded an item and still run."""
        here, self.lab.home = self.lab.home, self.folder.parent
        try:
            return [pid for pid in begun(self.lab) if Path(f"/proc/{pid}").exists()]
        finally:
            self.lab.home = here

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - other processes set no events
                await asyncio.sleep(0.01)


def kill_all(pids: Sequence[int]) -> int:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)


@pytest.mark.parametrize(
    "backend", [LOCAL, PROCESSES, LAUNCHED, PARSL], ids=["local", "processes", "launched", "parsl"]
)
async def test_fifty_kills_with_a_move_after_each(
    lab_of: LabMaker, backend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each item has one row, and a kill costs no more than what was in flight."""
    token = f"FANFOLD_TEST={os.urandom(6).hex()}"
    async with lab_of(items=ITEMS) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = backend
        monkeypatch.setenv(*token.split("="))
        moving = MovingLab(lab, seed=13)
        lost = list[int]()
        for _ in range(KILLS):
            before = moving.lost()
            in_flight = await moving.kill(token)
            lost.append(moving.lost() - before)
            assert 0 <= lost[-1] <= in_flight, lost
            lab.life_ended()
            moving.move()
        assert moving.recorded() < ITEMS
        async with lab.process("resume", str(moving.folder), "--quiet") as process:
            code = await asyncio.wait_for(process.wait(), 10 * WAIT_S)
        assert code == 0, (moving.folder / "failures.jsonl").read_text()
        assert moving.lost() == sum(lost)
        moving.folder.rename(lab.out)
        lab.assert_whole(aggregate, again=sum(lost))
        print(f"requests lost by each kill: {lost}, in all {sum(lost)}")
