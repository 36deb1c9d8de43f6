"""The coordinator of remote shards: lost tasks, stops, damaged files, earlier sessions."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import BackendError, JournalError, WorkerLostError
from fanfold.backends.core.types import Json
from fanfold.backends.storage.journal_file import make_worker_path
from fanfold.graphs.remote import coordinator as module
from fanfold.tests.journals import write_journal
from fanfold.tests.unit.graphs.coordinator_lab import Lab, Site, record, summary, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TAIL_S", 0.005)


def written(folder: Path, life: int, worker: str, *lines: dict[str, Json]) -> Path:
    file = make_worker_path(folder, life, worker)
    return write_journal(file, lines)


async def test_an_order_that_is_lost_is_taken_back_before_the_next_one(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    async with lab.opened():
        task = lab.send(0, 3)
        await until(lambda: lab.site.answers)
        assert lab.names() == {"task-t", "heartbeat-t-0-3-0"}
        lab.site.answers[0].set_exception(WorkerLostError("gone"))
        await until(lambda: len(lab.site.answers) == 2)
        assert lab.names() == {"task-t", "heartbeat-t-0-3-1"}
        lab.site.answers[1].set_result(summary("0-3", range(3)))
        answered = await task
        assert answered is not None
        assert answered[0] is not None
        assert answered[0].attempt == 1
        assert lab.names() == {"task-t"}  # a copy that is delivered once more does nothing
    assert lab.names() == set()


class Keeper(Site):
    """A site that may keep a result of a lost task."""

    def __init__(self) -> None:
        super().__init__()
        self.late = list[dict[str, Json] | Exception | None]()

    async def collect(self, _: str) -> dict[str, Json] | None:
        found = self.late.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.mark.parametrize("failure", [None, BackendError("no answer")])
async def test_a_result_that_arrives_after_its_loss_replaces_the_next_task(
    tmp_path: Path, failure: BackendError | None
) -> None:
    """If it is not there when the shard is to be sent again, the shard is sent."""
    site = Keeper()
    lab = Lab(tmp_path, site, shared=False)
    site.late += [failure, summary("0-3", range(3), records=[record(n) for n in range(3)])]
    async with lab.opened():
        task = lab.send(0, 3)
        for attempt in range(2):
            await until(partial(lambda n: len(site.answers) == n + 1, attempt))
            site.answers[attempt].set_exception(WorkerLostError("gone"))
        answered = await task
        assert answered is not None
        assert answered[0] is None
        assert len(site.orders) == 2
        assert lab.progress.done == 3
        assert lab.pool.in_flight == 0


async def test_one_stop_is_enough_for_all_shards(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    async with lab.opened():
        for _ in range(50):
            lab.coordinator.stop()
        await until(lambda: lab.site.stops)
        assert await lab.send(0, 3) is None
        assert (lab.site.stops, lab.site.orders) == (1, [])
        assert lab.names() == {"stop-t"}


async def test_a_file_that_cannot_be_read_is_told_and_read_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a file system says for a moment ends no run; what lasts is raised at its end."""
    lab = Lab(tmp_path)

    async def life() -> None:
        async with lab.opened():
            bad = written(tmp_path, lab.ledger.session_number, "host:1", record(0))
            good = bad.read_bytes()
            write_journal(bad, [record(0)], "x")
            written(tmp_path, lab.ledger.session_number, "host:0", record(1))
            await until(lambda: str(bad) in caplog.text)
            assert lab.progress.done == 1  # what was read before is counted
            bad.write_bytes(good)
            await until(lambda: lab.progress.done == 2)
            write_journal(written(tmp_path, lab.ledger.session_number, "host:2"), [], "x")

    with pytest.raises(JournalError, match=r"host-2.*belongs to run 'x'"):
        await life()
    assert lab.site.closed
    assert lab.names() == set()  # all steps of the end were taken
    assert caplog.text.count("host-1-") == 1


async def test_a_refresh_that_is_cancelled_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path)
    written(tmp_path, lab.ledger.session_number, "host:1", *map(record, range(40)))
    real, reading, go_on = lab.ledger.refresh, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        reading.set()
        assert go_on.wait(10)
        real(*arguments)

    monkeypatch.setattr(lab.ledger, "refresh", slow)
    first = asyncio.create_task(lab.coordinator.refresh())
    await until(reading.is_set)
    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(lab.coordinator.refresh())
    go_on.set()
    await second
    assert (lab.progress.done, lab.ledger.count_items().done, lab.ledger.duplicates) == (40, 40, 0)
    assert lab.progress.usage.requests == lab.ledger.total_usage().requests == 40
    await lab.ledger.aclose()


async def test_what_was_in_flight_when_a_life_was_killed_is_read_before_the_first_order(
    tmp_path: Path,
) -> None:
    written(tmp_path, 1, "host:1", record(0))
    lab = Lab(tmp_path)
    written(tmp_path, 1, "host:1", record(0), record(1), record(2))
    async with lab.opened():
        task = lab.send(0, 4)
        await until(lambda: lab.site.answers)
        assert lab.ordered() == [3]
        lab.site.answers[0].set_result(summary("0-4", range(1)))
        await task


async def test_shards_that_are_cut_otherwise_wait_for_one_order_of_an_earlier_life(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path, shared=False)
    answer: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()
    lab.site.left = {"0-40": answer}
    async with lab.opened():
        tasks = [lab.send(lo, lo + 10) for lo in range(0, 40, 10)]
        await asyncio.sleep(0.02)
        records = [record(n) for n in range(38)]
        answer.set_result(summary("0-40", range(38), records=records))
        outcomes = await asyncio.gather(*tasks)
        assert [outcome and outcome[0] for outcome in outcomes] == [None] * 4
        assert all(outcomes)
        assert (lab.progress.done, lab.ledger.count_items().done) == (38, 38)
        last = lab.send(30, 40)
        await until(lambda: lab.site.answers)
        assert lab.ordered() == [38, 39]
        last.cancel()


async def test_earlier_orders_that_are_lost_are_sent_anew(tmp_path: Path) -> None:
    lab = Lab(tmp_path, shared=False)
    loop = asyncio.get_running_loop()
    lab.site.left = {name: loop.create_future() for name in ("0-10", "10-20")}
    for future in lab.site.left.values():
        future.set_exception(WorkerLostError("forgotten"))  # type: ignore[attr-defined]
    async with lab.opened():
        tasks = [lab.send(0, 15), lab.send(15, 30)]
        await until(lambda: len(lab.site.answers) == 2)
        assert lab.ordered() == list(range(30))
        for task in tasks:
            task.cancel()
