"""State after a coordinator, an agent or the service ended."""

# mypy: allow-untyped-calls
# (the SDK annotates only part of itself)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import pytest
from globus_compute_sdk import Client, Executor

from fanfold.tests.integration.workers.globus import coordinator
from fanfold.tests.integration.workers.globus.broker import Broker
from fanfold.tests.integration.workers.globus.client import URL_VARIABLE, make_executor
from fanfold.tests.integration.workers.globus.endpoint import HTEX, UserEndpoint
from fanfold.tests.integration.workers.globus.fixtures import MakeExecutor, StartEndpoint
from fanfold.tests.integration.workers.globus.service import GlobusService
from fanfold.tests.integration.workers.globus.work import slow, where

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0


@contextmanager
def coordinating(service: GlobusService, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the coordinator in a process that does not outlive the block."""
    command = [sys.executable, "-m", coordinator.__name__, *arguments]
    environment = os.environ | {URL_VARIABLE: service.url}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_tasks_outlive_their_coordinator(
    service: GlobusService, endpoint: UserEndpoint, client: Client
) -> None:
    """After a SIGKILL the task group gives every result to the next process, each once."""
    with coordinating(service, "wait", endpoint.endpoint_id, "12", "0.3") as process:
        assert process.stdout is not None
        group = process.stdout.readline().strip()
        assert process.stdout.readline().strip() == "0"
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    ends = [task.status for task in service.tasks(group)]
    assert len(ends) == 12
    assert "pending" in ends
    futures: list[Future[int]] = list(
        make_executor(client, endpoint.endpoint_id, group).reload_tasks()
    )
    assert sorted(future.result(DEADLINE_S) for future in futures) == list(range(12))


def test_reloading_leaves_out_what_is_watched(
    service: GlobusService, executor_of: MakeExecutor
) -> None:
    """A second executor of a group gets what has ended, and not what this process waits for."""
    first = executor_of()
    assert first.submit(slow, 1, 0).result(DEADLINE_S) == 1
    service.faults.hold_results = 1
    held = first.submit(slow, 2, 0)
    posted(held)
    again = list(executor_of(task_group_id=first.task_group_id).reload_tasks())
    assert [future.result(0) for future in again] == [1]
    until_held(service)
    service.release()
    assert held.result(DEADLINE_S) == 2


def test_a_forgotten_task_is_reloaded_as_a_future_without_end(
    service: GlobusService, executor_of: MakeExecutor
) -> None:
    """The group still names it, its state is gone: nothing will ever resolve the future."""
    executor = executor_of()
    future = executor.submit(slow, 1, 0)
    assert future.result(DEADLINE_S) == 1
    service.forget([future.task_id])
    (reloaded,) = executor.reload_tasks()
    assert not wait([reloaded], timeout=1.0).done


def test_a_process_with_a_lost_result_can_leave(
    service: GlobusService, endpoint: UserEndpoint
) -> None:
    """By telling the watcher to cancel; `Executor.shutdown` alone would wait for ever."""
    service.faults.drop_results = 1
    with coordinating(service, "leave", endpoint.endpoint_id, "1", "0") as process:
        said, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
    assert said.splitlines()[1:] == ["[True]"]


def test_what_a_killed_agent_held_is_lost(
    endpoint_of: StartEndpoint, executor_of: MakeExecutor
) -> None:
    """Running and queued tasks alike; the same endpoint, restarted, takes new ones at once."""
    endpoint = endpoint_of()
    executor = executor_of(endpoint.endpoint_id)
    assert executor.submit(slow, 0, 0).result(DEADLINE_S) == 0
    held = [executor.submit(slow, number, 1.5) for number in range(6)]
    for future in held:
        posted(future)
    time.sleep(0.5)  # for the agent to take them
    endpoint.kill()
    assert endpoint.processes() == []
    again = endpoint_of(endpoint_id=endpoint.endpoint_id)
    assert executor.submit(slow, 9, 0).result(DEADLINE_S) == 9
    assert wait(held, timeout=3.0).not_done == set(held)
    assert again.processes()


def test_an_agent_says_good_bye_when_it_is_stopped(
    service: GlobusService, client: Client, endpoint_of: StartEndpoint
) -> None:
    endpoint = endpoint_of()
    assert service.online(endpoint.endpoint_id)
    endpoint.stop()
    assert client.get_endpoint_status(endpoint.endpoint_id)["status"] == "offline"
    assert endpoint.processes() == []


def test_parsl_workers_run_tasks_in_processes_of_their_own(
    endpoint_of: StartEndpoint, executor_of: MakeExecutor
) -> None:
    """The agent with a high-throughput executor; its workers end with it."""
    endpoint = endpoint_of(HTEX)
    executor: Executor = executor_of(endpoint.endpoint_id)
    place = executor.submit(where).result(2 * DEADLINE_S)
    assert place["rank"] in {"0", "1"}
    assert place["cwd"] == str(endpoint.directory / "tasks_working_dir")
    assert place["pid"] in endpoint.processes()
    endpoint.stop()
    assert endpoint.processes() == []


def test_the_service_leaves_nothing_in_the_broker(amqp_url: str) -> None:
    with GlobusService(amqp_url) as service:
        queues = service.credentials(str(uuid.uuid4()))
        names = [queues[f"{kind}_queue_info"]["queue"] for kind in ("task", "result", "heartbeat")]
        assert all(Broker(amqp_url).has_queue(name) for name in names)
    assert not any(Broker(amqp_url).has_queue(name) for name in names)


def posted(future: Future[int]) -> None:
    """Wait until the service has answered the submission."""
    deadline = time.monotonic() + DEADLINE_S
    while getattr(future, "task_id", None) is None:
        assert time.monotonic() < deadline, "not posted"
        time.sleep(0.02)


def until_held(service: GlobusService) -> None:
    """Wait until the one result that is to be held is there."""
    deadline = time.monotonic() + DEADLINE_S
    while service.faults.hold_results:
        assert time.monotonic() < deadline, "no result came"
        time.sleep(0.02)
