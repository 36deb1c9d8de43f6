"""Sessions with a time limit: each exits with 5 in time, the last finishes the run."""

from __future__ import annotations

import asyncio
import signal
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

from fanfold.backends.cluster.walltime import Walltime
from fanfold.backends.core.errors import RunStoppedError
from fanfold.backends.storage.run_folder import open_folder
from fanfold.configs.loader import load_config
from fanfold.graphs import worker
from fanfold.graphs.context import RunContext
from fanfold.graphs.map_reduce import build_bound_graph
from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration


def threads() -> Executor:
    return ThreadPoolExecutor(2)


THREADS: dict[str, Any] = {"kind": "executor", "factory": f"{__name__}:threads", "workers": 2}


def in_time(seconds: float) -> Walltime:
    at = time.time() + seconds
    return Walltime(at, at + 0.2, "walltime: of the test")


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_lives_end_in_time_and_the_run_is_whole(
    lab_of: LabMaker, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = worker.Worker()
    monkeypatch.setattr(worker, "get_worker", lambda: own)
    async with lab_of(items=240) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        if where == "elsewhere":
            lab.config["backend"] = THREADS
        folder, seconds = await lab.begin(), 0.6
        while not lab.journal_lines():  # a machine that is busy may need longer to begin
            try:
                result = await lab.live(folder, deadline=in_time(seconds))
            except RunStoppedError as error:
                if "walltime: of the test before the first item" not in error.message:
                    raise
            seconds += 0.3
        assert result.exit_code == 5
        assert str(result.reason).startswith("walltime: ")
        assert result.progress["done"] == lab.journal_lines() < 240
        assert lab.fleet_is_idle()
        lab.life_ended()
        lives = open_folder(lab.out).read_provenance()["sessions"]
        assert lives[-1]["outcome"].startswith("walltime")
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)
    own.close()


async def test_no_time_is_left_at_all(lab_of: LabMaker) -> None:
    async with lab_of(items=20) as lab:
        folder = await lab.begin()
        with pytest.raises(RunStoppedError, match="before the first item was sent"):
            await lab.live(folder, deadline=in_time(-60))
        assert lab.fleet.stats()["totals"]["requests"] == 0


async def test_an_embedded_run_heeds_the_jobs_end(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a command line, the graph itself stops before the batch job does."""
    async with lab_of(items=20) as lab:
        aggregate = await lab.undisturbed()
        folder = await lab.begin()
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))  # 60 s are kept
        out = str(folder.path)
        context = RunContext.from_loaded(load_config(str(folder.settings)), embedded=True, out=out)
        graph = build_bound_graph(context).compile()
        with pytest.raises(Exception, match="SLURM_JOB_END_TIME"):
            await graph.ainvoke({}, context=context)
        assert lab.journal_lines() == 0
        monkeypatch.delenv("SLURM_JOB_END_TIME")
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_a_schedulers_warning_drains(lab_of: LabMaker) -> None:
    async with lab_of(items=200) as lab:
        aggregate = await lab.undisturbed()
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: lab.journal_lines() >= 8)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):  # none is a hurry
            signal.raise_signal(number)
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert (result.exit_code, result.reason) == (5, "SIGUSR1")
        assert result.progress["done"] == lab.journal_lines() < 200
        lab.life_ended()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_a_worker_whose_job_ends_sends_its_shards_back(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other workers take them, and the run goes on."""
    own, orders = worker.Worker(), list[None]()
    monkeypatch.setattr(worker, "get_worker", lambda: own)
    monkeypatch.setattr("fanfold.graphs.remote.coordinator._BOUNCE_S", 0.01)

    def over_at_first(*_: object) -> Walltime | None:
        orders.append(None)
        return in_time(-60) if len(orders) <= 3 else None

    monkeypatch.setattr("fanfold.graphs.remote.heartbeat.walltime", over_at_first)
    async with lab_of(items=40) as lab:
        aggregate = await lab.undisturbed()
        lab.config["backend"] = THREADS
        assert (await lab.live(await lab.begin())).exit_code == 0
        assert len(orders) > 3
        lab.assert_whole(aggregate, again=0)
    own.close()
