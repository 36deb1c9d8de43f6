"""Agents on a user's executors: Parsl's, and a pool of processes that breaks."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fanfold import RunContext, build_graph
from fanfold.backends.simulated.faults import FaultRule
from fanfold.tests.integration.workers.academy.academy_run import AcademyRun, alive
from fanfold.tests.integration.workers.academy.engines import FOLDER, PARSL, PROCESSES

pytestmark = [
    pytest.mark.integration,
    # Academy's own habits
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]

SLOWER = 10.0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "parsl"))


def run_of(academy_run: AcademyRun, executor: str) -> asyncio.Task[dict[str, Any]]:
    """Begin a run in this process."""
    backend = {"kind": "academy", "workers": 2, "executor": executor, "silence_s": 20.0}
    graph = build_graph(
        RunContext(config=academy_run.settings | {"backend": backend}, out=str(academy_run.out))
    )
    return asyncio.create_task(graph.ainvoke({"items": academy_run.items}))


@pytest.mark.parametrize(
    "executor", [PARSL, pytest.param(PROCESSES, marks=pytest.mark.long)], ids=["parsl", "processes"]
)
async def test_an_agents_process_is_killed(academy_run: AcademyRun, executor: str) -> None:
    """Its shard goes on with another agent, and what was recorded is not asked again."""
    academy_run.fleet.add_fault(
        FaultRule("slow", value=1 / SLOWER)
    )  # so that items are left for the second
    run = run_of(academy_run, executor)
    await academy_run.until(lambda: len(academy_run.workers()) == 2 or run.done())
    assert not run.done()
    os.kill(academy_run.workers()[0], signal.SIGKILL)
    academy_run.fleet.add_fault(FaultRule("slow", value=4 * SLOWER))
    end = await run
    assert end["progress"]["done"] == len(academy_run.items)
    academy_run.assert_whole(again=academy_run.settings["limits"]["streams"])
    assert len(academy_run.workers()) >= 2
    await academy_run.until(lambda: not any(map(alive, academy_run.workers())))
