"""Whole runs whose endpoints are restarted, paused, or take tasks without running them."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from fanfold.backends.storage.run_folder import open_folder
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskEntry, TaskLog
from fanfold.tests.integration.runs.conftest import Lab
from fanfold.tests.integration.workers.globus.endpoint import HTEX, UserEndpoint
from fanfold.tests.integration.workers.globus.fixtures import StartEndpoint
from fanfold.tests.integration.workers.globus.globus_run import (
    ITEMS,
    SHARDS,
    LabOf,
    asked_again,
    assert_each_once,
    posted,
)
from fanfold.tests.integration.workers.globus.service import GlobusService

pytestmark = pytest.mark.integration

OF_A_SHARD = ITEMS // SHARDS
BUSY = """
engine:
  type: GlobusComputeEngine
  address: 127.0.0.1
  encrypted: false
  max_workers_per_node: 2
  provider: {type: LocalProvider, init_blocks: 0, min_blocks: 0, max_blocks: 0}
heartbeat_period: 5
"""
"""An endpoint whose batch system has no node for it."""


def entries_of(lab: Lab, endpoint: UserEndpoint) -> list[TaskEntry]:
    """Return the open tasks of an endpoint."""
    entries = TaskLog(lab.out / TASK_LOG_FILE).read_open()
    return [entry for entry in entries if entry.endpoint == endpoint.endpoint_id]


def held_by(lab: Lab, endpoint: UserEndpoint) -> int:
    """Return how many items the open tasks of an endpoint have."""
    return OF_A_SHARD * len(entries_of(lab, endpoint))


async def begun(lab: Lab, endpoint: UserEndpoint) -> None:
    """Wait until an endpoint has tasks and its workers ask the fleet."""
    await lab.until(lambda: held_by(lab, endpoint) and not lab.fleet_is_idle())


@pytest.mark.parametrize(
    ("graceful", "config"),
    [
        pytest.param(True, None, id="ended"),
        pytest.param(False, None, id="killed"),
        pytest.param(True, HTEX, id="HTEX ended", marks=pytest.mark.long),
        pytest.param(False, HTEX, id="HTEX killed", marks=pytest.mark.long),
    ],
)
async def test_a_restarted_endpoint_costs_what_it_had(
    endpoint_of: StartEndpoint, lab_over: LabOf, graceful: bool, config: str | None
) -> None:
    """Twice in one run; nothing that had come back is asked again."""
    given = () if config is None else (config,)
    one = await asyncio.to_thread(endpoint_of, *given)
    async with lab_over(one, deadline_s=5.0, attempts=9) as lab:
        lab.config["limits"] |= {"drain_s": 1.0, "request_timeout_s": 2.0}
        life, lost = asyncio.create_task(lab.live(await lab.begin())), 0
        for done in (0, 2 * OF_A_SHARD):
            await lab.until(partial(lambda n: lab.journal_lines() >= n or life.done(), done))
            await begun(lab, one)
            await asyncio.to_thread(one.stop if graceful else one.kill)
            lost += held_by(lab, one)
            one = await asyncio.to_thread(endpoint_of, *given, endpoint_id=one.endpoint_id)
        result = await life
        assert result.exit_code == 0, f"{result.reason}\n{one.logs()}"
        assert_each_once(lab, again=lost)
        print(f"restarted twice: {asked_again(lab)} of at most {lost} items asked again")


@pytest.mark.parametrize("when", ["before", "during"])
async def test_shards_of_a_paused_endpoint_go_elsewhere(
    service: GlobusService,
    endpoint: UserEndpoint,
    endpoint_of: StartEndpoint,
    lab_over: LabOf,
    when: str,
) -> None:
    """It takes tasks and runs none, goes silent, and goes on while the run does."""
    paused, before = await asyncio.to_thread(endpoint_of), len(service.submissions)
    async with lab_over(endpoint, paused) as lab:
        if when == "before":
            paused.pause()
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: held_by(lab, paused) == ITEMS // 2)
        if when == "during":
            await begun(lab, paused)
            paused.pause()
        service.forget_heartbeat(paused.endpoint_id)  # as after 15 s without one
        lost, taken = held_by(lab, paused), posted(service, before).get(endpoint.endpoint_id, 0)
        await lab.until(lambda: posted(service, before).get(endpoint.endpoint_id, 0) > taken)
        paused.unpause()
        result = await life
        assert result.exit_code == 0, result.reason
        await lab.until(lab.fleet_is_idle)
        assert_each_once(lab, again=lost)
        print(f"paused {when}: {asked_again(lab)} of at most {lost} items asked again")


@pytest.mark.parametrize("shared", [False, True], ids=["own journal", "shared folder"])
async def test_an_endpoint_that_goes_on_after_the_run_changes_nothing(
    service: GlobusService,
    endpoint: UserEndpoint,
    endpoint_of: StartEndpoint,
    lab_over: LabOf,
    shared: bool,
) -> None:
    """No record is added. What it still had is paid for twice, unless it can see the end."""
    paused = await asyncio.to_thread(endpoint_of)
    async with lab_over(endpoint, paused, ttft_s=0.05, shared_folder=shared) as lab:
        paused.pause()
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: held_by(lab, paused) == ITEMS // 2)
        service.forget_heartbeat(paused.endpoint_id)
        lost, tasks = held_by(lab, paused), {entry.task for entry in entries_of(lab, paused)}
        assert (await life).exit_code == 0
        assert_each_once(lab, again=0)
        paused.unpause()
        await lab.until(lambda: all(service.task(task).status == "success" for task in tasks))
        assert asked_again(lab) == (0 if shared else lost)
        assert (await lab.live(open_folder(lab.out))).exit_code == 0
        assert_each_once(lab, again=lost)


async def test_the_only_endpoint_is_paused_and_goes_on(
    service: GlobusService, endpoint_of: StartEndpoint, lab_over: LabOf
) -> None:
    one = await asyncio.to_thread(endpoint_of)
    async with lab_over(one) as lab:
        life = asyncio.create_task(lab.live(await lab.begin()))
        await begun(lab, one)
        one.pause()
        service.forget_heartbeat(one.endpoint_id)
        lost = held_by(lab, one)
        await asyncio.sleep(2.0)  # it is found to be offline
        assert not life.done()
        one.unpause()
        result = await life
        assert result.exit_code == 0, result.reason
        assert_each_once(lab, again=lost)
        print(f"only endpoint paused: {asked_again(lab)} of at most {lost} items asked again")


async def test_an_endpoint_that_never_begins_is_not_waited_for(
    endpoint: UserEndpoint, endpoint_of: StartEndpoint, lab_over: LabOf
) -> None:
    """It stays online and takes tasks; after ``queue_s`` they go to the one that works."""
    busy = await asyncio.to_thread(endpoint_of, BUSY)
    async with lab_over(busy, endpoint, ttft_s=0.05, queue_s=3.0, deadline_s=2.0) as lab:
        lab.config["limits"] |= {"drain_s": 1.0, "request_timeout_s": 2.0}
        result = await lab.live(await lab.begin())
        assert result.exit_code == 0, result.reason
        assert_each_once(lab, again=0)
