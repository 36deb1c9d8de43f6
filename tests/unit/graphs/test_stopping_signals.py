from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from fanfold.backends.cluster.walltime import Walltime
from fanfold.backends.core.errors import RunStoppedError
from fanfold.graphs.run.shutdown import Shutdown
from fanfold.nodes.shard.gate import Gate


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def stop(said: io.StringIO) -> Shutdown:
    return Shutdown(Console(file=said))


async def test_first_waits_second_hurries_third_breaks_off(
    stop: Shutdown, said: io.StringIO
) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    assert await gate.acquire()
    with stop.watch_work(gate, work):
        stop.request_stop("SIGTERM")
        assert (gate.reason, stop.control.drain_reason) == ("SIGTERM", "SIGTERM")
        assert said.getvalue().startswith("SIGTERM: waiting for 1 item in flight")
        stop.request_stop("SIGINT")
        assert not await gate.wait_drained()  # at once
        assert not work.cancelled()
        stop.request_stop("SIGINT")
        assert work.cancelled()
    assert (stop.reason, stop.control.drain_reason) == ("SIGTERM", "SIGTERM")


async def test_a_wish_that_came_earlier_closes_the_gate(stop: Shutdown) -> None:
    stop.request_stop("SIGINT")
    gate = Gate(1, 60.0)
    with stop.watch_work(gate, asyncio.get_running_loop().create_future()):
        assert gate.reason == "SIGINT"
        assert not await gate.acquire()


async def test_opening_is_broken_off(stop: Shutdown) -> None:
    opening = asyncio.create_task(stop.open_unless_stopped(asyncio.Event().wait()))
    await asyncio.sleep(0)
    stop.request_stop("SIGTERM")
    with pytest.raises(RunStoppedError, match="SIGTERM before the first item"):
        await opening


async def test_what_else_ends_the_opening_goes_through(stop: Shutdown) -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await stop.open_unless_stopped(fail())
    opening = asyncio.create_task(stop.open_unless_stopped(asyncio.Event().wait()))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


async def test_a_warning_counts_only_as_the_first(stop: Shutdown, said: io.StringIO) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    assert await gate.acquire()
    with stop.watch_work(gate, work):
        for name in ("SIGUSR1", "walltime: over", "SIGUSR2"):
            stop.request_stop_once(name)
        assert (gate.reason, len(said.getvalue().splitlines())) == ("SIGUSR1", 1)
        drained = asyncio.create_task(gate.wait_drained())
        await asyncio.sleep(0)
        assert not drained.done()  # none of them hurries
        stop.request_stop("SIGTERM")
        assert not await drained
        assert stop.reason == "SIGUSR1"


async def test_the_end_of_the_time_is_such_a_warning(stop: Shutdown) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    with stop.watch_work(gate, work), stop.stop_at_deadline(Walltime(0.0, 0.0, "walltime: over")):
        assert await gate.wait_closed(60)
    assert gate.reason == stop.reason == "walltime: over"
    with stop.stop_at_deadline(None):
        assert stop.reason == "walltime: over"
