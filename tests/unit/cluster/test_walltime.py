"""The end of a session: arithmetic, sources, and what closes in time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from fanfold.backends.cluster.walltime import Walltime, walltime
from fanfold.backends.core.errors import ConfigurationError, RunStoppedError
from fanfold.configs.loader import load_config
from fanfold.configs.models import LimitsConfig
from fanfold.graphs.remote.heartbeat import StopSignal
from fanfold.graphs.run.shutdown import close_at_deadline, with_deadline
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.progress import ItemTimes

NOW = Walltime(0.0, 0.0, "walltime: over")
LATER = replace(NOW, stop_at=time.time() + 3600)


def limits(**settings: float) -> LimitsConfig:
    return LimitsConfig(**{"drain_s": 30, "margin_s": 20} | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["1764000000000", f"{2**64 - 2}", "1e300", "253402300800"])
def test_an_end_after_all_dates_is_no_end(value: str) -> None:
    assert walltime(limits(), {"SLURM_JOB_END_TIME": value}, began=1000) is None
    with pytest.raises(ConfigurationError, match="milliseconds"):
        walltime(limits(), {"FANFOLD_END_TIME": value}, began=1000)


@pytest.mark.parametrize(
    ("walltime_s", "environment", "stop_at", "source"),
    [
        (3600, {}, 4550, "limits.walltime_s"),
        (None, {"SLURM_JOB_END_TIME": "2000"}, 1950, "SLURM_JOB_END_TIME"),
        (None, {"FANFOLD_END_TIME": "1900.5", "SLURM_JOB_END_TIME": "2000"}, 1850.5, "FANFOLD_END"),
        (3600, {"SLURM_JOB_END_TIME": "9000"}, 4550, "limits.walltime_s"),
        (8500, {"SLURM_JOB_END_TIME": "9000"}, 8950, "SLURM_JOB_END_TIME"),
    ],
)
def test_the_earliest_end_counts_less_drain_and_margin(
    walltime_s: float | None, environment: dict[str, str], stop_at: float, source: str
) -> None:
    given = limits() if walltime_s is None else limits(walltime_s=walltime_s)
    end = walltime(given, environment, began=1000)
    assert end is not None
    assert (end.stop_at, end.workers_stop_at) == (stop_at, stop_at + 5)
    assert end.reason.startswith("walltime: this session ends at ")
    assert source in end.reason
    assert "50 s are kept" in end.reason
    longer = walltime(given, environment, began=1000, extra_s=10)
    assert longer is not None
    assert longer.stop_at == stop_at - 10


@pytest.mark.parametrize("value", ["", "UNLIMITED", "0", "-1", "nan"])
def test_without_an_end(value: str) -> None:
    assert walltime(limits(), {"SLURM_JOB_END_TIME": value}, began=1000) is None


@pytest.mark.parametrize("value", ["soon", "0", "inf"])
def test_an_end_of_ones_own_must_be_a_time(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"FANFOLD_END_TIME is .*date \+%s"):
        walltime(limits(), {"FANFOLD_END_TIME": value}, began=1000)


def test_a_walltime_that_leaves_no_time() -> None:
    settings = {"task": {"prompt": "x"}, "endpoints": "auto", "limits": {"walltime_s": 60}}
    with pytest.raises(ConfigurationError, match="leaves no time: drain_s and margin_s take 60 s"):
        load_config(settings)
    assert load_config(settings, ["limits.margin_s=1"]).config.limits.walltime_s == 60


async def test_the_gate_is_closed_in_time() -> None:
    gate = Gate(1, 1.0)
    with close_at_deadline(gate, NOW):
        assert await gate.wait_closed(60)
    assert gate.reason == "walltime: over"
    for end in (None, LATER):
        gate = Gate(1, 1.0)
        with close_at_deadline(gate, end):
            await asyncio.sleep(0)
        assert not gate.is_closed


def times_of(
    seconds: float, items: int, is_earlier: bool = False, after: ItemTimes | None = None
) -> ItemTimes:
    times = after or ItemTimes()
    record = {"status": "done", "requests": 1, "latency_s": seconds}
    for _ in range(items):
        times.add(record, is_earlier)
    return times


@pytest.mark.parametrize(
    ("times", "is_closed"),
    [
        (times_of(700.0, 20), True),
        (times_of(500.0, 20), False),  # they fit
        (times_of(700.0, 19), False),  # too few
        (times_of(700.0, 20, is_earlier=True), False),  # this session must try
        (times_of(30.0, 20, after=times_of(700.0, 256, is_earlier=True)), False),  # it is faster
        (None, False),
    ],
)
async def test_no_item_starts_that_would_hardly_end(
    times: ItemTimes | None, is_closed: bool
) -> None:
    gate = Gate(2, 60.0)
    assert await gate.acquire()
    end = Walltime(time.time() + 540.0, time.time() + 540.0, "walltime: over")
    with close_at_deadline(gate, end, times):
        await asyncio.sleep(0)
        assert gate.is_closed is is_closed
        assert await gate.acquire() is not is_closed
    if is_closed:
        assert gate.reason is not None
        assert gate.reason.startswith("walltime: over; most items take more than the 600 s left")
        drained = asyncio.create_task(gate.wait_drained())
        await asyncio.sleep(0.01)
        assert not drained.done()  # what is in flight has all the time that is left
        gate.release()
        assert await drained


async def test_items_that_become_slow_during_a_session_are_noticed() -> None:
    gate, times = Gate(1, 0.0), ItemTimes()
    end = Walltime(time.time() + 60.0, time.time() + 60.0, "walltime: over")
    with close_at_deadline(gate, end, times):
        for _ in range(30):
            times.add({"status": "done", "requests": 1, "latency_s": 100.0})
        assert await gate.wait_closed(30)


async def test_what_comes_before_the_first_item_is_broken_off() -> None:
    with pytest.raises(RunStoppedError, match="over; no item was sent"):
        await with_deadline(asyncio.Event().wait(), NOW)
    assert await with_deadline(asyncio.sleep(0, "done"), LATER) == "done"
    assert await with_deadline(asyncio.sleep(0, "done"), None) == "done"

    async def late() -> None:
        raise TimeoutError("of its own")

    for end in (LATER, None):
        with pytest.raises(TimeoutError, match="of its own"):
            await with_deadline(late(), end)


def test_workers_stop_with_the_run_or_with_their_own_job() -> None:
    now = time.time()
    assert StopSignal(3600, now + 3600).stop_reason() is None
    assert StopSignal(3600, now - 1).stop_reason() == "walltime: the run's time is over"
    assert StopSignal(-1, now + 3600).stop_reason() == "the task's deadline"
    sign = StopSignal(3600, now + 3600)
    sign.check_walltime(limits(walltime_s=100), {"SLURM_JOB_END_TIME": str(now + 3600)})
    assert sign.stop_reason() is None
    sign.check_walltime(limits(), {"SLURM_JOB_END_TIME": str(now + 40)})
    assert "SLURM_JOB_END_TIME" in str(sign.stop_reason())
