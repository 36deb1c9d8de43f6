"""Runs whose shards run on workers, here in threads: the same results as in one process."""

from __future__ import annotations

import asyncio
import json
import signal
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.endpoints_table import FILE_NAME, read_endpoints
from fanfold.backends.storage.run_folder import open_folder
from fanfold.configs.backend import BackendConfig
from fanfold.configs.loader import load_config
from fanfold.graphs import worker
from fanfold.graphs.remote.heartbeat import heartbeat_file
from fanfold.tests.integration.runs.conftest import LabMaker, assert_timeline
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration


def threads() -> Executor:
    return ThreadPoolExecutor(2)


THREADS: dict[str, Any] = {"kind": "executor", "factory": f"{__name__}:threads", "workers": 2}


@pytest.fixture(autouse=True)
def _own_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test has a worker of its own, closed at its end."""
    own = worker.Worker()
    monkeypatch.setattr(worker, "get_worker", lambda: own)
    yield
    own.close()


@pytest.mark.parametrize("shared", [True, False], ids=["journal", "sent"])
async def test_results_are_those_of_a_local_run(lab_of: LabMaker, shared: bool) -> None:
    async with lab_of(items=150, ttft_s=0.0) as lab:
        lab.config["limits"]["hedge"] = False  # a request that is called back is no call
        aggregate = await lab.undisturbed()
        lab.config["backend"] = THREADS | {"shared_folder": shared}
        result = await lab.live(await lab.begin())
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)
        files = sorted(f.name.partition("-")[1] for f in (lab.out / "journal").glob("*.jsonl"))
        assert files == (["-"] if shared else [""])
        nodes = lab.fleet.stats()["nodes"]
        rows = read_endpoints(open_folder(lab.out).path / FILE_NAME)
        assert len(rows) == len(nodes)
        assert sum(row["calls"] for row in rows) == sum(node["requests"] for node in nodes)
        tokens = sum(node["completion_tokens"] for node in nodes)
        assert sum(row["completion_tokens"] for row in rows) == tokens
        assert all(row["latency_p50_s"] and row["failures"] == {} for row in rows)
        assert_timeline(lab.out)


async def test_launched_workers_report_their_timeline(lab_of: LabMaker) -> None:
    async with lab_of(items=150, ttft_s=0.0) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = {"kind": "launched", "workers": 2}
        assert (await lab.live(await lab.begin())).exit_code == 0
        lab.assert_whole(aggregate, again=0)
        assert_timeline(lab.out)


async def test_orders_and_summaries_of_bounded_size(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a task nor a result may exceed the bound: the shards are sent in pieces."""
    monkeypatch.setattr(BackendConfig, "message_bytes", 4_000)
    sizes, real = list[int](), worker.work_shard

    def weighed(order: dict[str, Any]) -> dict[str, Any]:
        summary = real(order)
        sizes.append(len(orjson.dumps(order["items"])))
        sizes.append(len(orjson.dumps(summary["records"])))
        return summary

    monkeypatch.setattr("fanfold.graphs.context.work_shard", weighed)
    async with lab_of(items=150, ttft_s=0.0) as lab:
        lab.config["shard"] = {"items": 150}
        lab.config["limits"]["streams"] = 4
        aggregate = await lab.undisturbed()
        lab.config["backend"] = THREADS | {"shared_folder": False}
        assert (await lab.live(await lab.begin())).exit_code == 0
        lab.assert_whole(aggregate, again=0)
    assert len(sizes) > 20
    assert max(sizes) < 5_000


async def test_lives_on_different_backends(lab_of: LabMaker) -> None:
    """Worker files of earlier sessions count; a stop ends tasks; nothing is requested twice."""
    async with lab_of(items=200) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = THREADS
        for lines in (30, 90):
            folder = None if (lab.out / "run.yaml").exists() else await lab.begin()
            life = asyncio.create_task(lab.live(folder))
            await lab.until(partial(lambda n: lab.journal_lines() >= n, lines))
            asyncio.get_running_loop().call_soon(_interrupt)
            result = await asyncio.wait_for(life, DEADLINE_S)
            assert (result.exit_code, result.reason) == (5, "SIGINT")
            assert result.progress["done"] == lab.journal_lines() < 200
            lab.life_ended()
        assert (await lab.live(overrides=("backend={kind: local}",))).exit_code == 0
        lab.assert_whole(aggregate, again=0)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


async def test_two_copies_that_answer(lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of a shard run: each item counts once, aggregate and results agree."""
    real = worker.work_shard

    def twice(order: dict[str, Any]) -> dict[str, Any]:
        other = order | {"attempt": order["attempt"] + 100}
        token = order["run"]["token"]
        heartbeat_file(Path(order["journal"]), token, order["shard"], other["attempt"]).touch()
        real(other)
        return real(order)

    monkeypatch.setattr("fanfold.graphs.context.work_shard", twice)
    async with lab_of(items=60, ttft_s=0.0, seed=1) as lab:
        lab.config["backend"] = THREADS
        result = await lab.live(await lab.begin())
        assert (result.exit_code, result.progress["done"]) == (0, 60)
        assert lab.journal_lines() > 60
        found = result.aggregate
        again = await lab.live()
        assert (again.progress["done"], again.aggregate) == (60, found)
        refolded = await lab.live(overrides=(f"reduce={json.dumps(lab.config['reduce'][:2])}",))
        assert refolded.aggregate == found[:2]


async def test_what_an_engine_repeats_asks_nothing_again(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task is delivered twice, half of them by an engine that uses the later answer."""
    real, orders = worker.work_shard, list[str]()

    def repeated(order: dict[str, Any]) -> dict[str, Any]:
        answers = [real(order), real(order)]
        orders.append(order["shard"])
        return answers[len(orders) % 2]

    monkeypatch.setattr("fanfold.graphs.context.work_shard", repeated)
    async with lab_of(items=60, ttft_s=0.0, seed=1) as lab:
        lab.config["limits"]["hedge"] = False
        aggregate = await lab.undisturbed()
        lab.config["backend"] = THREADS
        assert (await lab.live(await lab.begin())).exit_code == 0
        lab.assert_whole(aggregate, again=0)
        assert lab.journal_lines() == 60


async def test_another_version_stops_the_run_unpaid(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "own_version", lambda: "0.0.1")
    async with lab_of(items=20) as lab:
        lab.config["backend"] = THREADS
        with pytest.raises(ConfigurationError, match=r"this worker runs fanfold 0\.0\.1"):
            await lab.live(await lab.begin())
        assert lab.fleet.stats()["totals"]["requests"] == 0


async def test_a_shard_that_no_worker_survives(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: dict[str, Any]) -> dict[str, Any]:
        raise MemoryError("no room")

    monkeypatch.setattr("fanfold.graphs.context.work_shard", broken)
    async with lab_of(items=20) as lab:
        lab.config["backend"] = THREADS | {"shared_folder": False}
        result = await lab.live(await lab.begin())
        assert result.exit_code == 5
        assert "lost 3 times" in str(result.reason)
        assert "no room" in str(result.reason)


async def test_each_worker_asks_its_own_node(lab_of: LabMaker) -> None:
    """The simulated fleet of the settings is then started by the worker."""
    async with lab_of(items=30) as lab:
        lab.config["endpoints"] = {"simulated": {"nodes": 1, "time_scale": 100}}
        lab.config["backend"] = THREADS | {"node_endpoints": True}
        result = await lab.live(await lab.begin())
        assert (result.exit_code, result.simulated, result.progress["done"]) == (0, True, 30)
        assert lab.fleet.stats()["totals"]["requests"] == 0


async def test_tracing_each_item_needs_this_process(lab_of: LabMaker) -> None:
    async with lab_of(items=20) as lab:
        lab.config["backend"] = THREADS
        with pytest.raises(ConfigurationError, match="--trace"):
            await lab.live(await lab.begin(), trace=True)
        lab.config["shard"] = {"items": 1}
        with pytest.raises(ConfigurationError, match=r"shard\.items: 1"):
            load_config(lab.config)


@pytest.mark.parametrize("backend", [THREADS, {"kind": "local"}], ids=["elsewhere", "here"])
async def test_leftovers_of_a_killed_life_are_swept_up(
    lab_of: LabMaker, backend: dict[str, Any]
) -> None:
    """And its workers are stopped, wherever this session runs."""
    async with lab_of(items=20, ttft_s=0.0) as lab:
        lab.config["backend"] = backend
        folder = await lab.begin()
        for name in ("task-aaaa", "heartbeat-aaaa-0-20-0", "stop-bbbb"):
            (folder.journal / name).touch()
        assert (await lab.live(folder)).exit_code == 0
        names = {file.name for file in folder.journal.iterdir() if file.suffix != ".jsonl"}
        assert names == {"extents.json", "lock", "stop-aaaa", "stop-bbbb"}
