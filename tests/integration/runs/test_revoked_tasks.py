"""A worker that was silent for too long resumes no item that another worker has."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.budget.leases import LeaseManager
from fanfold.backends.core.exit_with_parent import exit_with_parent
from fanfold.backends.core.types import Item, Shard
from fanfold.backends.storage.journal import Journal
from fanfold.backends.workers.executor import ExecutorBackend
from fanfold.backends.workers.member import PoolPolicy
from fanfold.backends.workers.pool import BackendPool
from fanfold.backends.workers.testing import make_task
from fanfold.graphs.remote.coordinator import Coordinator
from fanfold.graphs.worker import work_shard
from fanfold.nodes.shard.progress import Progress
from fanfold.tests.support.command_server import DEADLINE_S
from fanfold.tests.unit.graphs.coordinator_lab import template, until

pytestmark = pytest.mark.integration
ITEMS, STALLS_AT, MORE = 60, 20, 15
ONCE, WAKE = "once", "wake"


async def test_a_worker_that_wakes_stops(tmp_path: Path) -> None:
    """Its event loop hangs after 20 items, until the next worker has done some more."""
    ledger = Journal(tmp_path, "rehearsal", ITEMS)
    ledger.start_session("test", 1.0)
    pattern = make_task("x", [])
    run = dict(pattern.run) | {"token": "t"}
    terms = template(tmp_path, run=run, settings=pattern.settings)
    workers = ExecutorBackend(_two_workers, work_shard, 2, "two")
    pool = BackendPool([workers], PoolPolicy(silence_s=600.0))  # loaded machines are silent, too
    lender = LeaseManager(None, terms.config, "none", pool.capacity)
    coordinator = Coordinator(pool, terms, ledger, Progress(total=ITEMS), lender)

    async def remaining() -> list[Item]:
        return [Item(n, str(n), _row(n, tmp_path), None) for n in range(ITEMS) if open_(n)]

    def open_(index: int) -> bool:
        return not ledger.is_finished(index)

    async with coordinator.open_pool():
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(_lose_and_wake(pool, ledger, tmp_path))
            answers = [one async for one in coordinator.run_shard(Shard(0, ITEMS), remaining)]
        assert [task and task.attempt for task, _ in answers] == [1]
        await until(lambda: pool.in_flight == 0)  # the first copy has answered as well
        await coordinator.refresh()
        assert ledger.count_items().done == ITEMS
    await ledger.aclose()
    written = _written(tmp_path)
    assert set(written) == set(range(ITEMS))
    twice = sum(count > 1 for count in written.values())
    assert twice < (ITEMS - STALLS_AT) / 2  # the one in flight, and what it began as it woke


async def _lose_and_wake(pool: BackendPool, ledger: Journal, folder: Path) -> None:
    """Count the worker that hangs as silent, and wake it once the next one has its items."""
    try:
        while not (folder / ONCE).exists():  # noqa: ASYNC110 - a process makes the file
            await asyncio.sleep(0.01)
        pool._members[0].mark_lost("no heartbeat")
        while ledger.count_items().done <= STALLS_AT + MORE:  # noqa: ASYNC110 - as in until()
            await asyncio.sleep(0.01)
    finally:
        (folder / WAKE).touch()


def _two_workers() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, mp_context=spawn, initializer=exit_with_parent)


def _row(index: int, folder: Path) -> dict[str, Any]:
    if index != STALLS_AT:
        return {"text": str(index), "seconds": 0.1}
    files = {"once": str(folder / ONCE), "until": str(folder / WAKE)}
    return {"text": "stalls", "do": "hang", **files}


def _written(folder: Path) -> Counter[int]:
    lines = (line for file in folder.glob("*.jsonl") for line in file.read_bytes().splitlines()[1:])
    return Counter(orjson.loads(line)["index"] for line in lines)
