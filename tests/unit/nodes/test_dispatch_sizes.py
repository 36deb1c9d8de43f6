"""Sizes of shards, local and remote."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.configs.loader import load_config
from fanfold.graphs.run.shard_plan import plan_shards
from fanfold.nodes.batch.dispatch import dispatch, fan_out
from fanfold.nodes.state import RunState, join_ranges


def planned(total: int, **sections: Any) -> RunState:
    given = {"task": {"prompt": "x"}, "endpoints": {"urls": ["http://h:1"]}} | sections
    run = plan_shards({"id": "r", "name": "f"}, load_config(given).config, total)
    return {
        "run": run.key,
        "total": total,
        "shard_items": run.shard_items,
        "window": run.window,
        "sizing": run.sizing,
        "cursor": 0,
    }


async def steps(state: RunState, seconds_per_item: float = 0.0) -> list[list[int]]:
    """Return the sizes of each superstep's shards."""
    found, at = [], 0
    while state["cursor"] < state["total"]:
        state |= await dispatch(state, None)  # type: ignore[arg-type]
        sends = [send.arg for send in fan_out(state)]
        for send in sends:
            assert send["lo"] == at
            at = send["hi"]
        found.append([send["hi"] - send["lo"] for send in sends])
        if seconds_per_item:
            state["pace"] = {"items": at, "seconds": at * seconds_per_item}
    assert at == state["total"]
    return found


PARSL = {"kind": "parsl", "workers": 10}


async def test_elsewhere_the_first_superstep_measures() -> None:
    state = planned(1_000_000, backend=PARSL)
    sizes = await steps(state, seconds_per_item=0.05)
    assert sizes[0] == [256] * 20
    assert set(sizes[1][:-1]) == {5366}  # so many take the geometric mean of 2 and 10 minutes
    assert 120 <= 5366 * 0.05 <= 600


async def test_slow_items_keep_the_least_size_and_fast_ones_leave_work_for_all() -> None:
    slow = await steps(planned(100_000, backend=PARSL), seconds_per_item=100.0)
    assert {size for step in slow[:-1] for size in step} == {256}
    fast = await steps(planned(100_000, backend=PARSL), seconds_per_item=1e-6)
    assert len(fast[1]) == 40  # four per worker


async def test_few_items_go_at_once() -> None:
    assert len(await steps(planned(4_991, backend={"processes": 2}))) == 1
    (sizes,) = await steps(planned(100, backend=PARSL))
    assert sizes == [16] * 6 + [4]


async def test_a_size_that_is_set_stays() -> None:
    state = planned(100_000, backend=PARSL, shard={"items": 300})
    sizes = await steps(state, seconds_per_item=1e-6)
    assert {size for step in sizes for size in step} == {300, 100}


@pytest.mark.parametrize(("total", "size"), [(4_991, 256), (40_000, 625), (1_000_000, 4096)])
async def test_here_nothing_is_measured(total: int, size: int) -> None:
    sizes = await steps(planned(total), seconds_per_item=1.0)
    assert {s for step in sizes for s in step[:-1]} <= {size}
    assert all(len(step) <= 256 for step in sizes)


@given(st.integers(1, 300_000), st.integers(1, 50), st.floats(1e-5, 1e4))
async def test_every_item_is_in_one_shard(total: int, workers: int, seconds: float) -> None:
    await steps(planned(total, backend={"kind": "parsl", "workers": workers}), seconds)


async def test_ranges_that_had_ended_come_with_the_last_superstep() -> None:
    state, sent = planned(30_000, shard={"items": 4}), list[list[tuple[int, int, bool]]]()
    while state["cursor"] < state["total"]:
        state |= await dispatch(state, None)  # type: ignore[arg-type]
        sent.append([(s.arg["lo"], s.arg["hi"], s.arg["may_wait"]) for s in fan_out(state)])
        if len(sent) == 1:
            state["ended"] = join_ranges([[512, 520]], [[8, 12], [0, 8]])
    assert state["ended"] == [[0, 12], [512, 520]]
    *first, last = sent
    assert all(may_wait for step in first for *_, may_wait in step)
    assert last[-3:] == [(29_996, 30_000, False), (0, 12, False), (512, 520, False)]
    state |= {"left": [[4, 8]]}
    state |= await dispatch(state, None)  # type: ignore[arg-type]
    assert [send.arg for send in fan_out(state)] == [
        {"run": state["run"], "lo": 4, "hi": 8, "may_wait": False}
    ]
