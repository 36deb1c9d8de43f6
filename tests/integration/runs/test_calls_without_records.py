"""Calls whose items have no record are in doubt, with and without a budget."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from fanfold.backends.simulated.faults import FaultRule
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

BUDGETS: list[Any] = [
    pytest.param({}, id="without a budget"),
    pytest.param({"tokens": 10**7}, id="tokens", marks=pytest.mark.long),
    pytest.param({"requests": 10**5}, id="requests", marks=pytest.mark.long),
]


def prepare(lab: Lab, budget: dict[str, Any]) -> None:
    lab.config["limits"] |= {"hedge": False}
    lab.config["model"] = {"max_tokens": 48}
    lab.config |= {"budget": budget} if budget else {}


async def told(lab: Lab, command: str) -> dict[str, Any]:
    async with lab.process(command, str(lab.out), "--json") as process:
        text, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    found: dict[str, Any] = json.loads(text)
    return found


def sent(lab: Lab) -> int:
    """Return the requests that the fleet has read, by its own counts."""
    return int(lab.fleet.stats()["totals"]["requests"])


async def check_bound(lab: Lab, exact: bool) -> int:
    """Check what is in doubt against the fleet's counts; return its requests."""
    status, cost = await told(lab, "status"), await told(lab, "cost")
    assert status["in_doubt"] == cost["in_doubt"]
    doubt = status["in_doubt"]
    requests, tokens = status["requests"] + doubt["requests"], status["tokens"]
    assert requests == sent(lab) if exact else requests >= sent(lab)
    totals = lab.fleet.stats()["totals"]
    names = ("prompt_tokens", "completion_tokens", "abandoned_tokens")
    known = tokens["prompt"] + tokens["completion"] + tokens["lost"]
    assert known + doubt["tokens"] >= sum(int(totals[name]) for name in names)
    return int(doubt["requests"])


@pytest.mark.parametrize("budget", BUDGETS)
async def test_a_second_signal_leaves_calls_in_doubt(
    lab_of: LabMaker, budget: dict[str, Any]
) -> None:
    """They were sent and perhaps paid: reported, to the request, and counted until the end."""
    async with lab_of(items=120, ttft_s=0.1) as lab:
        prepare(lab, budget)
        lab.fleet.add_fault(FaultRule("hang", p=0.1, draw="item"))
        async with lab.process("run", str(write(lab)), "--out", str(lab.out)) as process:
            await lab.until(lambda: lab.journal_lines() >= 30)
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        doubt = await check_bound(lab, exact=True)
        assert 1 <= doubt <= 16
        lab.fleet._faults.clear()
        result = await lab.live()
        assert result.exit_code == 0
        assert result.cost is not None
        assert result.cost.unaccounted.requests == doubt
        await check_bound(lab, exact=True)


def write(lab: Lab) -> Any:
    file = lab.home / "c.json"
    file.write_text(json.dumps(lab.config))
    return file


@pytest.mark.parametrize("budget", BUDGETS)
async def test_after_a_kill_calls_in_flight_are_in_doubt(
    lab_of: LabMaker, budget: dict[str, Any]
) -> None:
    async with lab_of(items=200, ttft_s=0.2) as lab:
        prepare(lab, budget)
        await lab.killed_at(20)
        doubt = await check_bound(lab, exact=False)
        assert 16 <= doubt <= 2 * 16 + (1000 if "requests" in budget else 0)  # a block of the level
        result = await lab.live()
        assert result.exit_code == 0
        assert result.cost is not None
        assert result.cost.unaccounted.requests == doubt
        await check_bound(lab, exact=False)


@pytest.mark.parametrize("budget", BUDGETS)
async def test_calls_of_a_session_that_fails_are_counted(
    lab_of: LabMaker, budget: dict[str, Any]
) -> None:
    """The fleet is lost: the calls of items without a record count, in ``status`` as well."""
    async with lab_of(items=80, ttft_s=0.2) as lab:
        prepare(lab, budget)
        lab.config["limits"] |= {"fleet_wait_s": 0.1}
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: lab.journal_lines() >= 20)
        for node in (0, 1):
            await lab.fleet.kill(node)
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert result.exit_code == 5
        assert await check_bound(lab, exact=False) >= 1


async def test_nothing_is_in_doubt_after_an_end(lab_of: LabMaker) -> None:
    """Also not while repairs are sent, and not after a drain."""
    async with lab_of(items=60, ttft_s=0.1) as lab:
        prepare(lab, {})
        lab.fleet.add_fault(FaultRule("bad_schema", p=0.5, first_round=True))
        async with lab.process() as process:
            await lab.until(lambda: lab.journal_lines() >= 20)
            process.send_signal(signal.SIGINT)
            text, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert json.loads(text)["in_doubt"] == {
            "requests": 0,
            "tokens": 0,
            "usd": None,
            "node_hours": 0.0,
        }
        assert await check_bound(lab, exact=True) == 0
        assert (await lab.live()).exit_code == 0
        assert await check_bound(lab, exact=True) == 0


WORKERS: list[Any] = [
    pytest.param({"kind": "local", "processes": 2}, id="processes"),
    pytest.param(
        {"kind": "parsl", "workers": 2, "silence_s": 20}, id="parsl", marks=pytest.mark.long
    ),
    pytest.param({"kind": "launched", "workers": 2}, id="launched", marks=pytest.mark.long),
]


@pytest.mark.parametrize("budget", [BUDGETS[0], BUDGETS[1]])
@pytest.mark.parametrize("backend", WORKERS)
async def test_calls_of_a_killed_worker_are_in_doubt(
    lab_of: LabMaker, backend: dict[str, Any], budget: dict[str, Any]
) -> None:
    """The run goes on and ends; what the worker had in flight stays in doubt."""
    async with lab_of(items=300, ttft_s=0.3) as lab:
        prepare(lab, budget)
        lab.config["backend"] = backend
        lab.fleet.add_fault(FaultRule("slow", nodes=(1,), value=0.1))  # some are always in flight
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: life.done() or (busy(lab) and lab.journal_lines() > 40))
        assert not life.done()
        os.kill(busy(lab)[0], signal.SIGKILL)
        lab.fleet._faults.clear()
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert result.exit_code == 0
        assert await check_bound(lab, exact=False) >= 1


@pytest.mark.parametrize("backend", WORKERS)
async def test_calls_of_workers_are_in_doubt_after_a_kill_of_the_coordinator(
    lab_of: LabMaker, backend: dict[str, Any]
) -> None:
    async with lab_of(items=300, ttft_s=0.3) as lab:
        prepare(lab, {})
        lab.config["backend"] = backend
        lab.fleet.add_fault(FaultRule("slow", nodes=(1,), value=0.1))  # some are always in flight
        async with lab.process() as process:
            await lab.until(lambda: busy(lab) and lab.journal_lines() >= 40)
            process.kill()
            await asyncio.wait_for(process.wait(), DEADLINE_S)
        await lab.until(lab.fleet_is_idle)
        lab.life_ended()
        assert await check_bound(lab, exact=False) >= 1
        lab.fleet._faults.clear()
        result = await lab.live()
        assert result.exit_code == 0
        assert await check_bound(lab, exact=False) >= 1


@pytest.mark.parametrize("backend", WORKERS)
async def test_a_second_signal_leaves_calls_of_workers_in_doubt(
    lab_of: LabMaker, backend: dict[str, Any]
) -> None:
    async with lab_of(items=300, ttft_s=0.3) as lab:
        prepare(lab, {})
        lab.config["backend"] = backend
        lab.fleet.add_fault(FaultRule("hang", p=0.1, draw="item"))
        async with lab.process("run", str(write(lab)), "--out", str(lab.out)) as process:
            await lab.until(lambda: lab.journal_lines() >= 10)
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        await lab.until(lab.fleet_is_idle)
        assert await check_bound(lab, exact=False) >= 1


@pytest.mark.parametrize("backend", WORKERS)
async def test_nothing_of_workers_is_in_doubt_after_an_end(
    lab_of: LabMaker, backend: dict[str, Any]
) -> None:
    async with lab_of(items=120, ttft_s=0.1) as lab:
        prepare(lab, {})
        lab.config["backend"] = backend
        lab.fleet.add_fault(FaultRule("bad_schema", p=0.5, first_round=True))
        assert (await lab.live(await lab.begin())).exit_code == 0
        assert await check_bound(lab, exact=True) == 0


def busy(lab: Lab) -> list[int]:
    """Return the workers that have noted calls in flight last, by the names of their spend logs."""
    found = list[int]()
    for file in (lab.out / "budget").glob("*-*.jsonl"):
        lines = [json.loads(line) for line in file.read_bytes().splitlines() if line.endswith(b"}")]
        noted = [line["open"]["requests"] for line in lines if "open" in line]
        if noted and noted[-1]:
            found.append(int(file.stem.split("-")[-2]))
    return found
