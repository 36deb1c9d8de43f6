"""Whole runs over Globus Compute in which agents or the coordinator end."""

from __future__ import annotations

import asyncio
import shutil
import signal

import pytest

from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.storage.run_folder import open_folder
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskLog
from fanfold.tests.integration.runs.conftest import Lab, assert_timeline
from fanfold.tests.integration.runs.test_budget_sessions import paid
from fanfold.tests.integration.workers.globus.endpoint import UserEndpoint
from fanfold.tests.integration.workers.globus.fixtures import StartEndpoint
from fanfold.tests.integration.workers.globus.globus_run import ITEMS, SHARDS, LabOf, posted
from fanfold.tests.integration.workers.globus.service import GlobusService

pytestmark = pytest.mark.integration


def in_hand(lab: Lab) -> int:
    """Return how many tasks are written down and not closed."""
    return len(TaskLog(lab.out / TASK_LOG_FILE).read_open())


def requests(lab: Lab) -> int:
    return int(lab.fleet.stats()["totals"]["requests"])


async def test_two_endpoints_share_a_run(
    service: GlobusService, endpoint: UserEndpoint, endpoint_of: StartEndpoint, lab_over: LabOf
) -> None:
    other, before = await asyncio.to_thread(endpoint_of), len(service.submissions)
    async with lab_over(endpoint, other, ttft_s=0.05) as lab:
        result = await lab.live(await lab.begin())
        assert result.exit_code == 0
        lab.assert_whole(lab.whole, again=0)  # type: ignore[attr-defined]
        counts = posted(service, before)
        assert counts.keys() == {endpoint.endpoint_id, other.endpoint_id}
        assert sum(counts.values()) == SHARDS
        assert in_hand(lab) == 0
        assert_timeline(lab.out)


async def test_shards_of_a_killed_agent_go_elsewhere(
    service: GlobusService, endpoint: UserEndpoint, endpoint_of: StartEndpoint, lab_over: LabOf
) -> None:
    """It counts as offline; what it had in hand is asked again, by the other endpoint."""
    doomed, before = await asyncio.to_thread(endpoint_of), len(service.submissions)
    async with lab_over(endpoint, doomed) as lab:
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: posted(service, before).get(doomed.endpoint_id, 0) >= 2)
        await asyncio.sleep(0.5)  # for the agent to take them
        doomed.kill()
        service.forget_heartbeat(doomed.endpoint_id)  # as after 15 s without one
        lost = posted(service, before)[doomed.endpoint_id]
        assert (await life).exit_code == 0
        lab.assert_whole(lab.whole, again=0)  # type: ignore[attr-defined]
        assert SHARDS < sum(posted(service, before).values()) <= SHARDS + lost


async def test_an_agent_that_is_killed_and_restarted_goes_on(
    service: GlobusService, endpoint_of: StartEndpoint, lab_over: LabOf
) -> None:
    """It never was silent for long; its tasks are overdue, and sent to it again."""
    doomed = await asyncio.to_thread(endpoint_of)
    before = len(service.submissions)
    async with lab_over(doomed, deadline_s=3.0) as lab:
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: posted(service, before).get(doomed.endpoint_id, 0) >= 2)
        await asyncio.sleep(0.5)  # for the agent to take them
        doomed.kill()
        await asyncio.to_thread(endpoint_of, endpoint_id=doomed.endpoint_id)
        assert (await life).exit_code == 0
        lab.assert_whole(lab.whole, again=ITEMS)  # type: ignore[attr-defined]
        assert sum(posted(service, before).values()) > SHARDS


@pytest.mark.parametrize(
    ("wait", "shared"),
    [(False, False), (True, False), (False, True)],
    ids=["they still run", "they have ended", "they share the folder"],
)
async def test_a_killed_coordinators_shards_are_found_again(
    service: GlobusService, endpoint: UserEndpoint, lab_over: LabOf, wait: bool, shared: bool
) -> None:
    """No item is asked twice, no shard posted twice: by the counts of the fleet and the service.

    Workers that share the folder are stopped, and what they still wrote is read; the rest of
    their shards is posted again.
    """
    before = len(service.submissions)
    async with lab_over(endpoint, shared_folder=shared) as lab:
        async with lab.process() as process:
            await lab.until(lambda: lab.journal_lines() >= 20 and in_hand(lab) >= 2)
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        if wait:
            await lab.until(lab.fleet_is_idle)
        lab.life_ended()
        left, done = in_hand(lab), lab.journal_lines()
        assert left >= 2
        assert done < ITEMS
        result = await lab.live()
        assert (result.exit_code, in_hand(lab)) == (0, 0)
        lab.assert_whole(lab.whole, again=0)  # type: ignore[attr-defined]
        assert lab.again == 0
        assert sum(posted(service, before).values()) == SHARDS or shared


async def test_a_copy_leaves_the_tasks_of_the_original_alone(
    service: GlobusService, endpoint: UserEndpoint, lab_over: LabOf
) -> None:
    """It posts what it has to, and the original finds its own tasks again afterwards."""
    before = len(service.submissions)
    async with lab_over(endpoint, shared_folder=False) as lab:
        async with lab.process() as process:
            await lab.until(lambda: lab.journal_lines() >= 20 and in_hand(lab) >= 2)
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        await lab.until(lab.fleet_is_idle)
        copy, book = lab.home / "copy", (lab.out / TASK_LOG_FILE).read_bytes()
        shutil.copytree(lab.out, copy)
        left, asked = ITEMS - lab.journal_lines(), requests(lab)
        first = sum(posted(service, before).values())
        assert left > 0
        assert (await lab.live(open_folder(copy))).exit_code == 0
        assert requests(lab) == asked + left
        assert (lab.out / TASK_LOG_FILE).read_bytes() == book
        between = sum(posted(service, before).values())
        assert (await lab.live()).exit_code == 0
        assert in_hand(lab) == 0
        assert requests(lab) == ITEMS + left
        assert sum(posted(service, before).values()) - between == SHARDS - first


async def test_a_budget_is_not_charged_twice_for_shards_that_are_found_again(
    endpoint: UserEndpoint, lab_over: LabOf
) -> None:
    """The coordinator is killed; the next session gets the unused part of its leases."""
    async with lab_over(endpoint) as lab:
        cap = 20_000
        lab.config |= {"budget": {"tokens": cap}, "model": {"max_tokens": 64}}
        async with lab.process() as process:
            await lab.until(lambda: in_hand(lab) >= 2 and paid(lab))
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        shelf = SpendLogs(lab.out / "budget", open_folder(lab.out).read_provenance()["run"])
        assert paid(lab) < shelf.total_spent({}).tokens <= cap
        assert len(shelf.unreturned_leases()) >= 2
        posted = (lab.out / TASK_LOG_FILE).read_text()
        # what was lent and not posted when the coordinator died counts as spent for good
        leases = shelf.read_sessions()[1].leases.items()
        unposted = [one.amount.tokens for name, one in leases if name.split(".")[1] not in posted]
        result = await lab.live()
        assert result.exit_code == 0
        lab.assert_whole(lab.whole, again=0)  # type: ignore[attr-defined]
        spent = shelf.total_spent({}).tokens
        assert paid(lab) <= spent <= paid(lab) + cap // 50 + sum(unposted)
