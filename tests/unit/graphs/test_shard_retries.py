"""Shards that are lost or come back unfinished: when the coordinator sends them again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    RunStoppedError,
    WorkerLostError,
)
from fanfold.backends.core.messages import DUPLICATE_REASON, WALLTIME_REASON
from fanfold.graphs.remote import coordinator as module
from fanfold.tests.unit.graphs.coordinator_lab import (
    POLICY,
    Lab,
    Site,
    record,
    summary,
    until,
)

ONE_EACH = replace(POLICY, tasks_per_worker=1)
SILENT = replace(ONE_EACH, silence_s=0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TAIL_S", 0.005)
    monkeypatch.setattr(module, "_BOUNCE_S", 0.005)


async def test_a_lost_shard_goes_elsewhere_before_the_others(tmp_path: Path) -> None:
    one, two = Site("one", 1), Site("two", 1)
    lab = Lab(tmp_path, one, two, policy=ONE_EACH)
    async with lab.opened():
        tasks = [lab.send(n, n + 1) for n in range(3)]
        await until(lambda: len(one.orders) + len(two.orders) == 2)
        one.room = 0
        one.fails = [BackendError("still down")]
        one.answers[0].set_exception(WorkerLostError("died"))
        await until(lambda: one.rebuilt == 2)
        await until(lambda: len(one.orders) == 2)
        assert one.orders[1]["shard"] == one.orders[0]["shard"]
        assert one.orders[1]["attempt"] == 1
        one.answer(1)
        two.answer(0)
        await until(lambda: len(one.orders) + len(two.orders) == 4)
        (last,) = [s for s in (one, two) if s.orders[-1]["shard"] == "2-3"]
        last.answer(-1)
        await asyncio.gather(*tasks)


async def test_silence_is_death_and_a_late_answer_is_not_used(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=2), policy=SILENT)
    async with lab.opened():
        task = lab.send(0, 1)
        await until(lambda: lab.site.orders)
        lab.begin("0-1", 0)
        await until(lambda: len(lab.site.orders) == 2)
        assert lab.pool.in_flight == 2  # the silent worker is still taken
        lab.site.answers[0].set_result(summary("late", range(1)))
        await until(lambda: lab.pool.in_flight == 1)
        assert not task.done()
        lab.site.answer(1)
        found = await task
        assert found is not None
        assert found[0] is not None
        assert (found[0].attempt, found[1].shard) == (1, "0-1")


async def test_a_shard_that_is_lost_again_and_again_stops_the_run(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=2), policy=replace(SILENT, attempts=2))
    async with lab.opened():
        task = lab.send(0, 1)
        for attempt in range(2):
            await until(lambda n=attempt: len(lab.site.orders) == n + 1)  # type: ignore[misc]
            lab.begin("0-1", attempt)
        with pytest.raises(RunStoppedError, match=r"lost 2 times.*no heartbeat"):
            await task


async def test_a_place_whose_workers_all_hang_is_rebuilt(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=1), policy=SILENT)
    async with lab.opened():
        task = lab.send(0, 1)
        await until(lambda: lab.site.orders)
        lab.begin("0-1", 0)
        await until(lambda: lab.site.rebuilt == 1)
        await until(lambda: len(lab.site.orders) == 2)
        lab.site.answer(1)
        assert await task is not None
        assert lab.site.answers[0].cancelled()


async def test_no_place_is_left(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=1), policy=replace(ONE_EACH, attempts=2))
    async with lab.opened():
        tasks = [lab.send(n, n + 1) for n in range(2)]
        await until(lambda: lab.site.orders)
        lab.site.room = 0
        lab.site.fails = [BackendError("down"), BackendError("down for good")]
        lab.site.answers[0].set_exception(BackendError("the place broke"))
        for task in tasks:
            with pytest.raises(RunStoppedError, match=r"no backend is left.*down for good"):
                await task


async def test_an_order_that_no_place_took_does_not_wear_its_shard_out(tmp_path: Path) -> None:
    """As of an endpoint that is being started anew: it is asked again for as long as it takes."""
    lab = Lab(tmp_path, Site(room=1), policy=replace(ONE_EACH, attempts=2), shared=False)
    async with lab.opened():
        task = lab.send(0, 1)
        for n in range(5):
            await until(lambda n=n: len(lab.site.orders) == n + 1)  # type: ignore[misc]
            lab.site.room = 0
            lab.site.answers[n].set_exception(BackendError("started anew in a while"))
        await until(lambda: len(lab.site.orders) == 6)
        lab.site.answer(5)
        assert await task is not None


async def test_no_worker_comes_at_all(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=2), policy=replace(ONE_EACH, queue_s=0.02))
    async with lab.opened():
        tasks = [lab.send(n, n + 1) for n in range(3)]
        for task in tasks:
            with pytest.raises(RunStoppedError, match=r"no worker has responded.*queue_s"):
                await task
        assert len(lab.site.orders) == 2  # a second time they would wait no shorter


async def test_a_worker_that_has_begun_is_enough(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=3), policy=replace(ONE_EACH, queue_s=1.0))
    async with lab.opened():
        begun, other = lab.send(0, 1), lab.send(1, 2)
        await until(lambda: len(lab.site.orders) == 2)
        lab.begin("0-1", 0)
        await until(lambda: len(lab.site.orders) == 3)  # the other is lost, and sent again
        assert lab.site.orders[2]["shard"] == "1-2"
        lab.site.answer([order["shard"] for order in lab.site.orders].index("0-1"))
        assert await begun is not None
        other.cancel()


async def test_what_no_attempt_mends_is_raised_at_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path, Site(room=1), policy=ONE_EACH)
    async with lab.opened():
        task = lab.send(0, 1)
        await until(lambda: lab.site.orders)
        lab.site.answers[0].set_result({"v": 99})
        with pytest.raises(ConfigurationError, match="different versions"):
            await task
        assert len(lab.site.orders) == 1


async def finish(lab: Lab, *results: dict[str, Any]) -> list[list[int]]:
    """Run the shard 0-4 with these results, one by one; return the items of each task."""

    async def run() -> None:
        async for _ in lab.answers(0, 4):
            pass

    task = asyncio.create_task(run())
    for n, result in enumerate(results):
        await until(lambda n=n: task.done() or len(lab.site.orders) == n + 1)  # type: ignore[misc]
        if not task.done():
            lab.site.answers[n].set_result(summary("0-4", range(0), **result))
    await task
    return [[item[0] for item in order["items"]] for order in lab.site.orders]


async def test_what_a_worker_returns_unfinished_is_sent_again(tmp_path: Path) -> None:
    """The reasons are as good as endless; each task omits what has ended."""
    lab = Lab(tmp_path, shared=False)
    async with lab.opened():
        sent = await finish(
            lab,
            {"stopped": DUPLICATE_REASON},
            {"stopped": f"{WALLTIME_REASON}: in 5 minutes", "records": [record(2)]},
            {"stopped": f"{WALLTIME_REASON}: in 5 minutes"},
            {"short": True},
            {"records": [record(n) for n in (0, 1, 3)]},
        )
        assert sent == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3], [0, 1, 3], [0, 1, 3]]
        assert (lab.progress.done, lab.ledger.count_items().done) == (4, 4)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"stopped": "the task's deadline"}, "without a finished item: the task's deadline"),
        ({"error": {"class": "RunStoppedError", "text": "all endpoints are gone"}}, "are gone"),
        ({"records": [record(100)]}, "index 100, and this run has 100 items"),
    ],
)
async def test_what_a_further_task_would_not_mend_stops_the_run(
    tmp_path: Path, result: dict[str, Any], said: str
) -> None:
    lab = Lab(tmp_path, shared=False)
    async with lab.opened():
        with pytest.raises(RunStoppedError, match=said):
            await finish(lab, result)
        assert len(lab.site.orders) == 1


async def test_another_node_may_do_what_the_endpoints_of_one_could_not(tmp_path: Path) -> None:
    gone = {"error": {"class": "RunStoppedError", "text": "all endpoints are gone"}}
    backend = {"kind": "local", "processes": 2, "node_endpoints": True}
    lab = Lab(tmp_path, shared=False, backend=backend)
    async with lab.opened():
        with pytest.raises(RunStoppedError, match="are gone"):
            await finish(lab, gone, gone, gone, gone)
        assert len(lab.site.orders) == 3


async def test_a_shard_that_waits_for_other_workers_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BOUNCE_S", 3600.0)
    lab = Lab(tmp_path, shared=False)
    async with lab.opened():
        task = asyncio.create_task(finish(lab, {"stopped": WALLTIME_REASON}))
        await until(lambda: lab.site.answers and lab.site.answers[0].done())
        await until(lambda: lab.pool.in_flight == 0)
        lab.coordinator.stop()
        assert len(await asyncio.wait_for(task, 10)) == 1
