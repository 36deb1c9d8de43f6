"""Whole runs whose tasks or task groups the service forgets, as after its retention time."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Literal

import pytest

from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskLog
from fanfold.tests.integration.runs.conftest import Lab
from fanfold.tests.integration.workers.globus.endpoint import UserEndpoint
from fanfold.tests.integration.workers.globus.globus_run import (
    ITEMS,
    SHARDS,
    LabOf,
    asked_again,
    assert_each_once,
    posted,
    recorded,
)
from fanfold.tests.integration.workers.globus.service import GlobusService

pytestmark = pytest.mark.integration

OF_A_SHARD = ITEMS // SHARDS
Answer = Literal["omitted", "failed", "refused"]


def unread_tasks(out: Path) -> list[str]:
    """Return the tasks that have items without a record."""
    found, unread = recorded(out), list[str]()
    for entry in TaskLog(out / TASK_LOG_FILE).read_open():
        lo, _, hi = entry.shard.partition("-")
        if any(f"i{n}" not in found for n in range(int(lo), int(hi))):
            unread.append(entry.task)
    return unread


async def kill_coordinator(lab: Lab) -> None:
    """Begin the run in another process, and kill it while two tasks at least are unread."""
    async with lab.process() as process:
        await lab.until(lambda: lab.journal_lines() >= OF_A_SHARD)
        await lab.until(lambda: len(unread_tasks(lab.out)) >= 2)
        process.kill()
        assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("answer", ["omitted", "failed", "refused"])
async def test_a_run_is_resumed_after_its_group_has_expired(
    service: GlobusService,
    endpoint: UserEndpoint,
    lab_over: LabOf,
    caplog: pytest.LogCaptureFixture,
    answer: Answer,
) -> None:
    """However the service says so, what was in flight is asked again and the reason is shown."""
    before = len(service.submissions)
    async with lab_over(endpoint) as lab:
        await kill_coordinator(lab)
        if answer == "omitted":  # else the tasks still run, and their results are lost as well
            await lab.until(lab.fleet_is_idle)
        left = unread_tasks(lab.out)
        assert left
        lab.life_ended()
        service.faults.unknown = answer
        assert service.forget_groups(before) >= len(left)
        with caplog.at_level(logging.WARNING):
            result = await lab.live()
        assert result.exit_code == 0, result.reason
        await lab.until(lab.fleet_is_idle)  # tasks that still ran have ended
        assert_each_once(lab, again=OF_A_SHARD * len(left))
    assert "keeps a result for half an hour" in caplog.text


@pytest.mark.parametrize("answer", ["omitted", "failed", "refused"])
async def test_one_expired_task_harms_no_other(
    service: GlobusService, endpoint: UserEndpoint, lab_over: LabOf, answer: Answer
) -> None:
    """The others' results are taken over, although all are asked for together."""
    async with lab_over(endpoint) as lab:
        await kill_coordinator(lab)
        await lab.until(lab.fleet_is_idle)
        left = unread_tasks(lab.out)
        service.faults.unknown = answer
        service.forget(left[:1])
        result = await lab.live()
        assert result.exit_code == 0, result.reason
        assert_each_once(lab, again=OF_A_SHARD)
        print(f"{answer}: {asked_again(lab)} items asked again")


@pytest.mark.parametrize("tasks_too", [False, True], ids=["the group", "its tasks too"])
async def test_a_group_that_expires_during_the_run_is_left(
    service: GlobusService, endpoint: UserEndpoint, lab_over: LabOf, tasks_too: bool
) -> None:
    """Later shards get a new group; only shards whose tasks are forgotten are posted again."""
    before = len(service.submissions)
    async with lab_over(endpoint, workers=1) as lab:
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: lab.journal_lines() >= OF_A_SHARD and unread_tasks(lab.out))
        lost = service.forget_groups(before) if tasks_too else 0
        service.expire_groups(before)
        result = await life
        assert result.exit_code == 0, result.reason
        await lab.until(lab.fleet_is_idle)
        assert_each_once(lab, again=OF_A_SHARD * lost)
        assert SHARDS <= sum(posted(service, before).values()) <= SHARDS + lost
        assert len({post.group for post in service.submissions[before:]}) == 2
