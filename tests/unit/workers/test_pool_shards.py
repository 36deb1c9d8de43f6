"""The pool of backends: which of them gets a task, and what happens to lost ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    RunStoppedError,
    WorkerLostError,
)
from fanfold.backends.core.messages import ShardResult, ShardTask
from fanfold.backends.core.types import Json
from fanfold.backends.workers.member import PoolPolicy
from fanfold.backends.workers.pool import BackendPool

POLICY = PoolPolicy(tasks_per_worker=1, rebuild_pause_s=0.001, poll_s=0.005)


class Stage:
    """A backend whose answers the test gives."""

    def __init__(self, name: str, room: int = 1) -> None:
        self.name, self.room = name, room
        self.orders = list[dict[str, Json]]()
        self.answers = list[asyncio.Future[dict[str, Json]]]()
        self.left = dict[str, Awaitable[dict[str, Json]]]()
        self.fails = list[Exception]()
        self.rebuilt = self.closed = 0

    def capacity(self) -> int:
        return self.room

    async def start(self) -> None:
        if self.fails:
            raise self.fails.pop(0)

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        self.orders.append(order)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        return self.left

    async def rebuild(self) -> None:
        self.rebuilt += 1
        if self.fails:
            raise self.fails.pop(0)
        self.room = 1

    async def close(self, grace_s: float = 10.0) -> None:
        self.closed += grace_s > 0

    def answer(self, n: int) -> None:
        self.answers[n].set_result(summary(self.orders[n]["shard"]))


def summary(shard: str) -> dict[str, Json]:
    return ShardResult(shard=shard, attempt=0, fanfold="0", worker="w", tally={"done": 1}).to_json()


def order(shard: str) -> ShardTask:
    return ShardTask(shard, 0, "0", {}, {}, [(0, "i", {}, None)], None, None, 1, 1.0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


class Shards:
    """Shards on their way through a pool."""

    def __init__(self, pool: BackendPool) -> None:
        self.pool, self.beat = pool, None

    def send(
        self, name: str, beat: Callable[[], float | None] | None = None
    ) -> asyncio.Task[tuple[ShardTask, ShardResult] | None]:
        async def make(attempt: int) -> ShardTask:
            return replace(order(name), attempt=attempt)

        return asyncio.create_task(self.pool.run(make, lambda _: beat))


async def opened(*stages: Stage, policy: PoolPolicy = POLICY) -> Shards:
    pool = BackendPool(stages, policy)
    await pool.start()
    return Shards(pool)


async def test_first_come_first_served() -> None:
    stage = Stage("a")
    shards = await opened(stage)
    tasks = [shards.send(f"s{n}") for n in range(4)]
    for n in range(4):
        await until(lambda n=n: len(stage.orders) == n + 1)  # type: ignore[misc]
        assert shards.pool.in_flight == 1
        stage.answer(n)
    await asyncio.gather(*tasks)
    assert [o["shard"] for o in stage.orders] == ["s0", "s1", "s2", "s3"]
    await shards.pool.close()
    assert stage.closed == 1


async def test_idle_workers_come_before_queues() -> None:
    one, two = Stage("one", 1), Stage("two", 3)
    shards = await opened(one, two, policy=replace(POLICY, tasks_per_worker=2))
    tasks = [shards.send(f"s{n}") for n in range(4)]
    await until(lambda: len(one.orders) + len(two.orders) == 4)
    assert (len(one.orders), len(two.orders)) == (1, 3)
    more = [shards.send(f"m{n}") for n in range(9)]
    await until(lambda: len(one.orders) + len(two.orders) == 8)
    await asyncio.sleep(0.02)
    assert (len(one.orders), len(two.orders)) == (2, 6)  # two in hand per worker, no more
    for task in [*tasks, *more]:
        task.cancel()
    await shards.pool.close()


async def test_a_lost_shard_goes_elsewhere_before_the_others() -> None:
    one, two = Stage("one"), Stage("two")
    shards = await opened(one, two)
    tasks = [shards.send(f"s{n}") for n in range(3)]
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
    (last,) = [s for s in (one, two) if s.orders[-1]["shard"] == "s2"]
    last.answer(-1)
    await asyncio.gather(*tasks)
    await shards.pool.close()


async def test_silence_is_death_and_a_late_answer_is_not_used() -> None:
    stage = Stage("one", 2)
    shards = await opened(stage, policy=replace(POLICY, silence_s=0.02))
    task = shards.send("s", beat=lambda: 1.0 if len(stage.orders) == 1 else None)
    await until(lambda: len(stage.orders) == 2)
    assert shards.pool.in_flight == 2  # the silent worker is still taken
    stage.answers[0].set_result(summary("late"))
    await until(lambda: shards.pool.in_flight == 1)
    assert not task.done()
    stage.answer(1)
    found = await task
    assert found is not None
    assert (found[0].attempt, found[1].shard) == (1, "s")
    await shards.pool.close()


async def test_a_shard_that_is_lost_again_and_again_stops_the_run() -> None:
    stage = Stage("one", 2)
    shards = await opened(stage, policy=replace(POLICY, silence_s=0.02, attempts=2))
    with pytest.raises(RunStoppedError, match=r"lost 2 times.*no heartbeat"):
        await shards.send("s", beat=lambda: 1.0)  # one sign of life, long ago
    await shards.pool.close()


async def test_a_place_whose_workers_all_hang_is_rebuilt() -> None:
    stage = Stage("a")
    shards = await opened(stage, policy=replace(POLICY, silence_s=0.02))
    beats = iter([1.0] * 1000)
    task = shards.send("s", beat=lambda: next(beats) if stage.rebuilt == 0 else None)
    await until(lambda: stage.rebuilt == 1)
    await until(lambda: len(stage.orders) == 2)
    stage.answer(1)
    assert await task is not None
    assert stage.answers[0].cancelled()
    await shards.pool.close()


async def test_no_place_is_left() -> None:
    stage = Stage("a")
    shards = await opened(stage, policy=replace(POLICY, attempts=2))
    tasks = [shards.send(f"s{n}", beat=lambda: None) for n in range(2)]
    await until(lambda: stage.orders)
    stage.room, stage.fails = 0, [BackendError("down"), BackendError("down for good")]
    stage.answers[0].set_exception(BackendError("the place broke"))
    for task in tasks:
        with pytest.raises(RunStoppedError, match=r"no backend is left.*down for good"):
            await task
    await shards.pool.close()


async def test_an_order_that_no_place_took_does_not_wear_its_shard_out() -> None:
    """As of an endpoint that is being started anew: it is asked again for as long as it takes."""
    stage = Stage("a")
    shards = await opened(stage, policy=replace(POLICY, attempts=2))
    task = shards.send("s")
    for n in range(5):
        await until(lambda n=n: len(stage.orders) == n + 1)  # type: ignore[misc]
        stage.room = 0
        stage.answers[n].set_exception(BackendError("started anew in a while"))
    await until(lambda: len(stage.orders) == 6)
    stage.answer(5)
    assert await task is not None
    await shards.pool.close()


async def test_no_worker_comes_at_all() -> None:
    stage = Stage("a", 2)
    shards = await opened(stage, policy=replace(POLICY, queue_s=0.02))
    tasks = [shards.send(f"s{n}", beat=lambda: None) for n in range(3)]
    for task in tasks:
        with pytest.raises(RunStoppedError, match=r"no worker has responded.*queue_s"):
            await task
    assert len(stage.orders) == 2  # a second time they would wait no shorter
    await shards.pool.close()


async def test_a_worker_that_has_begun_is_enough() -> None:
    stage = Stage("a", 3)
    shards = await opened(stage, policy=replace(POLICY, queue_s=0.02))
    begun = shards.send("s0", beat=lambda: 0.0)
    other = shards.send("s1", beat=lambda: None)
    await until(lambda: len(stage.orders) == 3)  # the other is lost, and sent again
    stage.answer(0)
    assert await begun is not None
    other.cancel()
    await shards.pool.close()


async def test_what_no_attempt_mends_is_raised_at_once() -> None:
    stage = Stage("a")
    shards = await opened(stage)
    task = shards.send("s")
    await until(lambda: stage.orders)
    stage.answers[0].set_result({"v": 99})
    with pytest.raises(ConfigurationError, match="different versions"):
        await task
    assert len(stage.orders) == 1
    await shards.pool.close()


async def test_a_stop_sends_away_who_waits() -> None:
    stage = Stage("a")
    shards = await opened(stage)
    out, waiting = shards.send("out"), shards.send("waiting")
    await until(lambda: stage.orders)
    await shards.pool.stop()
    assert await waiting is None
    stage.answer(0)
    assert await out is not None
    await shards.pool.close()


async def test_places_that_do_not_start() -> None:
    good, bad = Stage("good"), Stage("bad", 0)
    bad.fails = [BackendError("not now")]
    shards = await opened(good, bad)
    await until(lambda: bad.rebuilt)  # tried again beside the work
    await shards.pool.close()
    bad.fails = [BackendError("not now")]
    with pytest.raises(BackendError, match="not now"):
        await BackendPool([bad], POLICY).start()
    bad.fails = [ConfigurationError("never")]
    with pytest.raises(ConfigurationError, match="never"):
        await BackendPool([good, bad], POLICY).start()


async def test_what_an_earlier_life_left_is_taken_over() -> None:
    stage = Stage("a", 2)

    async def answer() -> dict[str, Json]:
        return summary("0-5")

    async def lost() -> dict[str, Json]:
        raise WorkerLostError("gone")

    stage.left = {"0-5": answer(), "5-9": lost()}
    shards = await opened(stage)
    assert shards.pool.orphaned == ["0-5", "5-9"]
    found = await shards.pool.adopt("0-5")
    assert found is not None
    assert found.shard == "0-5"
    assert await shards.pool.adopt("5-9") is None
    await shards.pool.close()
