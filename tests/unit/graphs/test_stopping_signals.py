from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from fanfold.backends.cluster.walltime import Walltime
from fanfold.backends.core.errors import RunStoppedError
from fanfold.graphs.run.shutdown import Stop
from fanfold.nodes.shard.gate import Gate


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def stop(said: io.StringIO) -> Stop:
    return Stop(Console(file=said))


async def test_first_waits_second_hurries_third_breaks_off(stop: Stop, said: io.StringIO) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    assert await gate.enter()
    with stop.working(gate, work):
        stop.asked("SIGTERM")
        assert (gate.reason, stop.control.drain_reason) == ("SIGTERM", "SIGTERM")
        assert said.getvalue().startswith("SIGTERM: waiting for 1 items in flight")
        stop.asked("SIGINT")
        assert not await gate.drained()  # at once
        assert not work.cancelled()
        stop.asked("SIGINT")
        assert work.cancelled()
    assert (stop.reason, stop.control.drain_reason) == ("SIGTERM", "SIGTERM")


async def test_a_wish_that_came_earlier_closes_the_gate(stop: Stop) -> None:
    stop.asked("SIGINT")
    gate = Gate(1, 60.0)
    with stop.working(gate, asyncio.get_running_loop().create_future()):
        assert gate.reason == "SIGINT"
        assert not await gate.enter()


async def test_opening_is_broken_off(stop: Stop) -> None:
    opening = asyncio.create_task(stop.opening(asyncio.Event().wait()))
    await asyncio.sleep(0)
    stop.asked("SIGTERM")
    with pytest.raises(RunStoppedError, match="SIGTERM before the first item"):
        await opening


async def test_what_else_ends_the_opening_goes_through(stop: Stop) -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await stop.opening(fail())
    opening = asyncio.create_task(stop.opening(asyncio.Event().wait()))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


async def test_a_warning_counts_only_as_the_first(stop: Stop, said: io.StringIO) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    assert await gate.enter()
    with stop.working(gate, work):
        for name in ("SIGUSR1", "walltime: over", "SIGUSR2"):
            stop.warned(name)
        assert (gate.reason, len(said.getvalue().splitlines())) == ("SIGUSR1", 1)
        drained = asyncio.create_task(gate.drained())
        await asyncio.sleep(0)
        assert not drained.done()  # none of them hurries
        stop.asked("SIGTERM")
        assert not await drained
        assert stop.reason == "SIGUSR1"


async def test_the_end_of_the_time_is_such_a_warning(stop: Stop) -> None:
    gate, work = Gate(2, 60.0), asyncio.get_running_loop().create_future()
    with stop.working(gate, work), stop.ending(Walltime(0.0, 0.0, "walltime: over")):
        assert await gate.wait_closed(60)
    assert gate.reason == stop.reason == "walltime: over"
    with stop.ending(None):
        assert stop.reason == "walltime: over"
