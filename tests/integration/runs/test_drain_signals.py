"""SIGINT and SIGTERM: nothing lost, nothing requested twice, exit 5, within bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fanfold.backends.core.errors import RunStoppedError
from fanfold.backends.core.types import Shard
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.storage.run_folder import open_folder
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import resume_run
from fanfold.graphs.run.run_result import RunResult
from fanfold.graphs.run.shutdown import Shutdown
from fanfold.nodes.shard.local import ShardPart, run_local_shard
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration


async def stopped(lab: Lab, lines: int, *signals: signal.Signals, **options: Any) -> RunResult:
    """Begin a run or go on with it here, and signal this process when so many items ended."""
    folder = None if (lab.out / "run.yaml").exists() else await lab.begin()
    heard, request = list[str](), Shutdown.request_stop

    def asked(stop: Shutdown, name: str) -> None:
        heard.append(name)
        request(stop, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Shutdown, "request_stop", asked)
        life = asyncio.create_task(lab.live(folder, **options))
        await lab.until(lambda: lab.journal_lines() >= lines)
        for number in signals:
            heard.clear()
            os.kill(os.getpid(), number)
            await lab.until(lambda: heard)
        result: RunResult = await asyncio.wait_for(life, DEADLINE_S)
    lab.life_ended()
    return result


async def test_the_command_line_ends_with_5_and_can_be_resumed(lab_of: LabMaker) -> None:
    async with lab_of() as lab:
        aggregate = await lab.undisturbed()
        async with lab.process() as process:
            await lab.until(lambda: lab.journal_lines() >= 50)
            process.terminate()
            said, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        told = json.loads(said)
        assert told["done"] == lab.journal_lines() < 200
        lab.life_ended()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


@pytest.mark.parametrize("shards", ["few", "many", "single", "traced"])
async def test_drained_and_resumed_over_and_over(lab_of: LabMaker, shards: str) -> None:
    """Also over many supersteps, with a Send per item, and by LangGraph's engine."""
    async with lab_of(items=120) as lab:
        sizes = {"few": None, "many": 3, "single": 1, "traced": 30}
        lab.config["shard"] = {"items": sizes[shards]}
        trace = shards == "traced"
        aggregate = await lab.undisturbed()
        for number, lines in ((signal.SIGTERM, 10), (signal.SIGINT, 50), (signal.SIGTERM, 90)):
            result = await stopped(lab, lines, number, trace=trace)
            assert (result.exit_code, result.reason) == (5, number.name)
            assert result.progress["done"] == lab.journal_lines()
            assert result.progress["failed"] == 0
            assert lab.fleet_is_idle()
        assert (await lab.live(trace=trace)).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_many_small_supersteps(lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab_of(items=120) as lab:
        lab.config["shard"] = {"items": 5}
        monkeypatch.setattr("fanfold.graphs.run.shard_plan.choose_window", lambda *_: 3)
        aggregate = await lab.undisturbed()
        for lines in (1, 20, 31, 75):
            result = await stopped(lab, lines, signal.SIGTERM)
            assert result.exit_code == 5
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_what_has_ended_is_folded_in_last(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session without a checkpoint asks about open items before it folds in all others."""
    async with lab_of(items=120) as lab:
        lab.config["shard"] = {"items": 5}
        monkeypatch.setattr("fanfold.graphs.run.shard_plan.choose_window", lambda *_: 3)
        aggregate = await lab.undisturbed()
        assert (await stopped(lab, 75, signal.SIGTERM)).exit_code == 5
        for file in lab.out.glob("checkpoints.sqlite*"):
            file.unlink()
        shards = list[tuple[int, int]]()

        async def run(range_: Shard, *more: Any) -> ShardPart | None:
            shards.append((range_.lo, range_.hi))
            return await run_local_shard(range_, *more)

        monkeypatch.setattr("fanfold.nodes.batch.shard.run_local_shard", run)
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)
    (at,) = (at for at, (lo, _) in enumerate(shards) if lo == 0)
    first, last = shards[0][0], shards[at][1]
    assert first >= last >= 45, "a superstep has 15 items, and 16 were in flight"
    assert at >= len(shards) - 3, "it is sent with the last superstep"
    assert sorted(shards)[1:] == sorted((lo, lo + 5) for lo in range(last, 120, 5))


async def test_a_hanging_fleet_cannot_hold_up_the_stop(lab_of: LabMaker) -> None:
    async with lab_of(items=40) as lab:
        lab.config["limits"] |= {"drain_s": 0.2}
        aggregate = await lab.undisturbed()
        lab.fleet.add_fault(FaultRule("hang", p=0.3, draw="item"))
        result = await stopped(lab, 8, signal.SIGTERM)
        assert result.exit_code == 5
        done = lab.journal_lines()
        assert result.progress["done"] == done < 40
        lab.fleet._faults.clear()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


async def test_a_second_signal_stops_at_once(lab_of: LabMaker) -> None:
    async with lab_of(items=40) as lab:
        aggregate = await lab.undisturbed()
        lab.fleet.add_fault(FaultRule("hang", p=0.3, draw="item"))
        result = await stopped(lab, 8, signal.SIGTERM, signal.SIGINT)
        assert (result.exit_code, result.reason) == (5, "SIGTERM")
        lab.fleet._faults.clear()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


async def test_a_signal_while_the_run_is_opened(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab_of(items=40) as lab:
        aggregate = await lab.undisturbed()
        folder, opening = await lab.begin(), asyncio.Event()

        @asynccontextmanager
        async def never(*_: object) -> AsyncIterator[None]:
            opening.set()
            await asyncio.Event().wait()
            yield

        with monkeypatch.context() as patched:
            patched.setattr("fanfold.graphs.run.open_run.ready_endpoints", never)
            life = asyncio.create_task(lab.live(folder))
            await asyncio.wait_for(opening.wait(), DEADLINE_S)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(RunStoppedError, match="SIGTERM before the first item"):
                await asyncio.wait_for(life, DEADLINE_S)
        assert not folder.is_in_use()
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_handlers_are_put_back(lab_of: LabMaker) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    before = [signal.getsignal(number) for number in numbers]
    async with lab_of(items=5) as lab:
        await lab.undisturbed()
    assert [signal.getsignal(number) for number in numbers] == before


async def test_a_fleet_that_is_lost_ends_the_run_resumably(lab_of: LabMaker) -> None:
    """No node comes back in time: what was answered is kept, exit 5."""
    async with lab_of(items=80) as lab:
        lab.config["limits"] |= {"fleet_wait_s": 0.1}
        aggregate = await lab.undisturbed()
        folder = await lab.begin()
        life = asyncio.create_task(lab.live(folder))
        await lab.until(lambda: lab.journal_lines() >= 20)
        for node in (0, 1):
            await lab.fleet.kill(node)
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert result.exit_code == 5
        assert "no endpoint recovered" in (result.reason or "")
        assert result.progress["failed"] == 0
        assert result.progress["done"] == lab.journal_lines() < 80
        lab.life_ended()
        for node in (0, 1):
            await lab.fleet.revive(node)
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


@pytest.mark.parametrize("how", ["local", "traced", "budget", "processes"])
async def test_a_stop_while_no_endpoint_is_alive_returns_at_once(
    lab_of: LabMaker, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """All items wait for an endpoint, and no request is in flight: nothing can be drained."""
    async with lab_of(items=80) as lab:
        lab.config["limits"] |= {"drain_s": 50, "fleet_wait_s": 50}
        if how == "budget":
            lab.config["budget"] = {"requests": 1000}
        aggregate = await lab.undisturbed()
        if how == "processes":
            lab.config["backend"] = {"kind": "local", "processes": 2}
        life = asyncio.create_task(lab.live(await lab.begin(), trace=how == "traced"))
        await lab.until(lambda: lab.journal_lines() >= 20)
        for node in (0, 1):
            await lab.fleet.kill(node)
        if how != "processes":  # the logs of workers are elsewhere
            await lab.until(lambda: "no endpoint is alive" in caplog.text)
        os.kill(os.getpid(), signal.SIGTERM)
        result = await asyncio.wait_for(life, 20)
        assert (result.exit_code, result.reason) == (5, "SIGTERM")
        assert result.progress["failed"] == 0
        assert result.progress["done"] == lab.journal_lines() < 80
        lab.life_ended()
        for node in (0, 1):
            await lab.fleet.revive(node)
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


async def test_a_stop_while_no_endpoint_is_alive_waits_for_requests_in_flight(
    lab_of: LabMaker,
) -> None:
    async with lab_of(items=40) as lab:
        lab.config["limits"] |= {"drain_s": 2, "fleet_wait_s": 50}
        lab.fleet.add_fault(FaultRule("hang", nodes=(0,), max_count=3))
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: lab.journal_lines() >= 8)
        await lab.fleet.kill(1)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        result = await asyncio.wait_for(life, 20)
        assert result.exit_code == 5
        assert time.monotonic() - began >= 2


@pytest.mark.parametrize("change", ["reduce", "retry", "none"])
async def test_by_checkpoint_or_anew_the_aggregate_is_the_same(
    lab_of: LabMaker, change: str
) -> None:
    async with lab_of(items=80) as lab:
        aggregate = await lab.undisturbed()
        assert (await stopped(lab, 30, signal.SIGTERM)).exit_code == 5
        if change == "reduce":
            less = await lab.live(overrides=("reduce=[{op: count}]",))
            assert [stage["op"] for stage in less.aggregate] == ["count"]
            full = json.dumps(lab.config["reduce"])
            result = await lab.live(overrides=(f"reduce={full}",))
        else:
            result = await lab.live(retry_failed=change == "retry")
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_failed_items_are_asked_again_only_on_demand(lab_of: LabMaker) -> None:
    async with lab_of(items=40) as lab:
        aggregate = await lab.undisturbed()
        lab.fleet.add_fault(FaultRule("refusal", p=0.3, draw="item"))
        first = await lab.live(await lab.begin())
        lab.life_ended()
        assert first.exit_code == 3
        failed = first.progress["failed"]
        lab.fleet._faults.clear()
        again = await lab.live()
        lab.life_ended()
        assert (again.exit_code, again.progress["failed"], lab.again) == (3, failed, 0)
        assert again.aggregate == first.aggregate
        assert (await lab.live(retry_failed=True)).exit_code == 0
        lab.assert_whole(aggregate, again=failed)
        assert lab.again == failed


async def test_a_checkpoint_older_than_the_journal_is_not_believed(lab_of: LabMaker) -> None:
    """Failed items run again with other checkpoints; then the old checkpoints return."""
    async with lab_of(items=80) as lab:
        lab.config["shard"] = {"items": 5}
        aggregate = await lab.undisturbed()
        lab.fleet.add_fault(FaultRule("refusal", p=0.3, draw="item"))
        assert (await stopped(lab, 40, signal.SIGTERM)).progress["failed"] > 0
        lab.fleet._faults.clear()
        file = lab.out / "checkpoints.sqlite"
        kept = file.read_bytes()
        assert (await lab.live(retry_failed=True)).exit_code == 0
        file.write_bytes(kept)
        result = await lab.live()
        assert (result.exit_code, result.aggregate) == (0, aggregate)
        lab.assert_whole(aggregate, again=80)


async def test_killed_between_new_settings_and_the_first_checkpoint(lab_of: LabMaker) -> None:
    """The settings have other aggregators than the checkpoint, without a notice."""
    async with lab_of(items=80) as lab:
        lab.config["shard"] = {"items": 5}
        assert (await stopped(lab, 40, signal.SIGTERM)).exit_code == 5
        folder = open_folder(lab.out)
        changed = load_config(str(folder.settings), ("reduce=[{op: count}]",))
        await resume_run(folder, changed)
        result = await lab.live()
        assert result.exit_code == 0
        assert [(stage["op"], stage["done"]) for stage in result.aggregate] == [("count", 80)]
