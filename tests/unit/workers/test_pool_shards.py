"""The pool of backends: which of them gets a task, and when it takes no more."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fanfold.backends.core.errors import BackendError, ConfigurationError, WorkerLostError
from fanfold.backends.core.messages import ShardResult, ShardTask
from fanfold.backends.core.types import Json
from fanfold.backends.workers.member import Heartbeat, PoolPolicy
from fanfold.backends.workers.pool import BackendPool
from fanfold.tests.unit.graphs.coordinator_lab import Site, summary, until

POLICY = PoolPolicy(tasks_per_worker=1, rebuild_pause_s=0.001, poll_s=0.005)


class Shards:
    """Shards on their way through a pool, one task each."""

    def __init__(self, pool: BackendPool) -> None:
        self.pool = pool

    def send(self, name: str, beat: Heartbeat | None = None) -> asyncio.Task[ShardResult | None]:
        async def run() -> ShardResult | None:
            member = await self.pool.acquire()
            return None if member is None else await self.pool.run(member, order, beat)

        order = ShardTask(name, 0, "0", {}, {}, [(0, "i", {}, None)], None, None, 1, 1.0)
        return asyncio.create_task(run())


async def opened(*sites: Site, policy: PoolPolicy = POLICY, stays_open: bool = False) -> Shards:
    pool = BackendPool(sites, policy, stays_open=stays_open)
    await pool.open_run()
    return Shards(pool)


async def test_first_come_first_served() -> None:
    site = Site("a", 1)
    shards = await opened(site)
    tasks = [shards.send(f"s{n}") for n in range(4)]
    for n in range(4):
        await until(lambda n=n: len(site.orders) == n + 1)  # type: ignore[misc]
        assert shards.pool.in_flight == 1
        site.answer(n)
    await asyncio.gather(*tasks)
    assert [o["shard"] for o in site.orders] == ["s0", "s1", "s2", "s3"]
    await shards.pool.close()
    assert site.closed == 1


async def test_idle_workers_come_before_queues() -> None:
    one, two = Site("one", 1), Site("two", 3)
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


async def test_a_slot_that_is_not_used_or_not_waited_for_goes_to_the_next() -> None:
    site = Site("a", 1)
    shards = await opened(site)
    member = await shards.pool.acquire()
    assert member is not None
    first, gone, last = (asyncio.create_task(shards.pool.acquire()) for _ in range(3))
    await asyncio.sleep(0)
    member.release()
    assert await first is member
    gone.cancel()
    member.release()
    assert await last is member
    member.release()
    assert shards.pool.in_flight == 0
    await shards.pool.close()


async def test_a_task_runs_once_and_the_error_says_where_it_was_lost() -> None:
    site = Site("a", 2)
    shards = await opened(site, policy=replace(POLICY, silence_s=0.02))
    silent, unbegun = shards.send("s", lambda: 1.0), shards.send("t", lambda: None)
    with pytest.raises(WorkerLostError, match="s, attempt 0: a: no heartbeat for 1 s"):
        await silent
    assert shards.pool.in_flight == 2  # the silent worker is still taken
    site.answers[1].set_exception(WorkerLostError("died"))
    with pytest.raises(BackendError, match="t, attempt 0: died") as lost:
        await unbegun
    assert not isinstance(lost.value, WorkerLostError)  # no worker had begun it
    assert len(site.orders) == 2
    await shards.pool.close()


async def test_a_stop_sends_away_who_waits() -> None:
    site = Site("a", 1)
    shards = await opened(site)
    out, waiting = shards.send("out"), shards.send("waiting")
    await until(lambda: site.orders)
    await shards.pool.stop()
    assert await waiting is None
    site.answer(0)
    assert await out is not None
    await shards.pool.close()


async def test_places_that_do_not_start() -> None:
    good, bad = Site("good"), Site("bad", 0)
    bad.fails = [BackendError("not now")]
    shards = await opened(good, bad)
    await until(lambda: bad.rebuilt)  # tried again beside the work
    await shards.pool.close()
    bad.fails = [BackendError("not now")]
    with pytest.raises(BackendError, match="not now"):
        await BackendPool([bad], POLICY).open_run()
    bad.fails = [ConfigurationError("never")]
    with pytest.raises(ConfigurationError, match="never"):
        await BackendPool([good, bad], POLICY).open_run()


async def test_what_an_earlier_life_left_is_taken_over() -> None:
    site = Site("a", 2)

    async def answer() -> dict[str, Json]:
        return summary("0-5", range(1))

    async def lost() -> dict[str, Json]:
        raise WorkerLostError("gone")

    site.left = {"0-5": answer(), "5-9": lost()}
    shards = await opened(site)
    assert shards.pool.orphaned == ["0-5", "5-9"]
    found = await shards.pool.adopt("0-5")
    assert found is not None
    assert found.shard == "0-5"
    assert await shards.pool.adopt("5-9") is None
    await shards.pool.close()


async def test_backends_that_stay_open_are_started_once_for_several_runs() -> None:
    site = Site("a", 1)
    shards = await opened(site, stays_open=True)
    for number in range(2):
        if number:
            await shards.pool.open_run()
        work = shards.send(f"s{number}")
        await until(lambda number=number: len(site.orders) == number + 1)  # type: ignore[misc]
        site.answer(number)
        assert await work is not None
        await until(lambda: shards.pool.in_flight == 0)
        await shards.pool.close_run()
    assert (site.started, site.closed, shards.pool.is_closed) == (1, 0, False)
    await shards.pool.close()
    assert (site.closed, shards.pool.is_closed) == (1, True)


async def test_a_backend_that_has_failed_is_not_kept_for_the_next_run() -> None:
    site = Site("a", 1)
    shards = await opened(site, stays_open=True)
    member = await shards.pool.acquire()
    assert member is not None
    member.release()
    member.failure = BackendError("it cannot be reached")
    await shards.pool.close_run()
    assert (site.closed, shards.pool.is_closed) == (1, True)


async def test_a_close_that_is_cancelled_goes_on_and_is_waited_for() -> None:
    class Slow(Site):
        async def close(self, grace_s: float = 10.0) -> None:
            await release.wait()
            await super().close(grace_s)

    release, site = asyncio.Event(), Slow("a", 1)
    pool = (await opened(site, stays_open=True)).pool
    closing = asyncio.create_task(pool.close())
    await until(lambda: pool.is_closed)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    again = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    assert (site.closed, again.done()) == (0, False)
    release.set()
    await again
    assert site.closed == 1


@pytest.mark.parametrize("ends", ["stopped", "in flight"])
async def test_backends_are_closed_with_a_run_that_leaves_work_behind(ends: str) -> None:
    """Their workers must not write to the journal of a run that has ended."""
    site = Site("a", 1)
    shards = await opened(site, stays_open=True)
    work = shards.send("s")
    await until(lambda: site.orders)
    if ends == "stopped":
        await shards.pool.stop()
        site.answer(0)
        await work
        await until(lambda: shards.pool.in_flight == 0)
    await shards.pool.close_run()
    assert (site.closed, shards.pool.is_closed) == (1, True)
    work.cancel()


async def test_shards_of_the_run_before_are_not_adopted() -> None:
    """Shards of two runs have the same names, and other items."""
    site = Site("a", 2)

    async def answer() -> dict[str, Json]:
        return summary("0-5", range(1))

    site.left = {"0-5": answer()}
    shards = await opened(site, stays_open=True)
    assert shards.pool.orphaned == ["0-5"]
    await until(lambda: shards.pool.in_flight == 0)
    site.left = {}
    await shards.pool.close_run()
    await shards.pool.open_run()
    assert not shards.pool.is_closed
    assert shards.pool.orphaned == []
    await shards.pool.close()


async def test_backends_that_did_not_start_are_closed() -> None:
    site = Site("a", 1)
    site.fails = [BackendError("not now")]
    pool = BackendPool([site], POLICY, stays_open=True)
    with pytest.raises(BackendError, match="not now"):
        await pool.open_run()
    await pool.close_run()
    assert (site.closed, pool.is_closed) == (1, True)
