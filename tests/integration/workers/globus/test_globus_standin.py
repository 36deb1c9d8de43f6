"""Behaviour of the real SDK, agent and RabbitMQ on which fanfold's backend relies."""

# mypy: allow-untyped-calls
# (the SDK annotates only part of itself)

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import yaml
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.errors import TaskExecutionFailed
from globus_compute_sdk.serialize import ComputeSerializer, JSONData

from fanfold.backends.inputs.base import did_you_mean
from fanfold.tests.integration.workers.globus.endpoint import THREADS, UserEndpoint
from fanfold.tests.integration.workers.globus.fixtures import MakeExecutor, StartEndpoint
from fanfold.tests.integration.workers.globus.service import GlobusService
from fanfold.tests.integration.workers.globus.template import render_config
from fanfold.tests.integration.workers.globus.work import echo, fail, large, slow

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0
SUBMIT = "POST /v3/endpoints/{id}/submit"


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_json_goes_both_ways(service: GlobusService, executor: Executor) -> None:
    """Data as JSON has them, thus tuples as lists; the agent was asked for JSON too."""
    payload: Any = {"text": "µ", "many": (1, 2.5, None, True), "deep": [{"a": {}}]}
    future = executor.submit(echo, payload)
    arrived: Any = {"text": "µ", "many": [1, 2.5, None, True], "deep": [{"a": {}}]}
    assert future.result(DEADLINE_S) == {"payload": arrived, "type": "dict"}
    (asked,) = service.submissions[-1].result_serializers
    assert asked.endswith(".JSONData")
    packed = service.task(future.task_id).result
    assert packed is not None
    identifier, text = packed.split("\n", 1)
    assert identifier == JSONData().identifier.strip() == "11"
    assert json.loads(text)["payload"] == arrived


def test_functions_of_the_package_go_by_reference(executor: Executor) -> None:
    """A registration names module and function, and carries no code."""
    serialised = ComputeSerializer().serialize(did_you_mean)
    assert len(serialised) < 120
    answer = executor.submit(did_you_mean, "kount", ["count", "stats"]).result(DEADLINE_S)
    assert answer == did_you_mean("kount", ["count", "stats"])


def test_many_tasks_travel_in_few_posts(service: GlobusService, executor_of: MakeExecutor) -> None:
    before = len(service.submissions)
    executor = executor_of(batch_size=25)
    futures = [executor.submit(slow, number, 0) for number in range(100)]
    assert [future.result(DEADLINE_S) for future in futures] == list(range(100))
    posts = service.submissions[before:]
    assert max(len(post.task_ids) for post in posts) <= 25
    assert sum(len(post.task_ids) for post in posts) == 100


def test_a_remote_error_loses_its_type(executor: Executor) -> None:
    error = executor.submit(fail, "of the item").exception(DEADLINE_S)
    assert type(error) is TaskExecutionFailed
    assert "KeyError: 'of the item'" in str(error)
    assert error.__cause__ is None


def test_cancel_lies(service: GlobusService, executor: Executor) -> None:
    """The future is cancelled at once, the task runs to its end."""
    future = executor.submit(slow, 7, 1.0)
    until(lambda: future.task_id)
    assert future.cancel()
    assert future.cancelled()
    until(lambda: service.task(future.task_id).status == "success")


def test_a_result_too_large_is_lost_at_the_worker(executor: Executor) -> None:
    """10 MiB is the most; the error is text, as any remote one."""
    fits = executor.submit(large, 10_000_000)
    too_large = executor.submit(large, 11_000_000)
    assert len(fits.result(DEADLINE_S)) == 10_000_000
    error = too_large.exception(DEADLINE_S)
    assert type(error) is TaskExecutionFailed
    assert "MaxResultSizeExceeded" in str(error)


def test_a_post_too_large_is_refused_whole(
    service: GlobusService, executor_of: MakeExecutor
) -> None:
    """413 counts the POST, not the task: the same tasks pass in smaller batches."""
    service.faults.submit_limit = 20_000
    texts = [str(number) * 6_000 for number in range(6)]
    greedy = executor_of()
    service.faults.latency_s = 0.5  # while the first is posted, the others gather
    posts = service.stats.get(SUBMIT, 0)
    first = greedy.submit(echo, "")
    until(lambda: service.stats.get(SUBMIT, 0) > posts)
    refused = [greedy.submit(echo, text) for text in texts]
    errors = [future.exception(DEADLINE_S) for future in refused]
    assert {getattr(error, "http_status", None) for error in errors} == {413}
    assert first.result(DEADLINE_S)
    service.faults.latency_s = 0.0
    modest = executor_of(batch_size=2)
    passed = [modest.submit(echo, text) for text in texts]
    assert [future.result(DEADLINE_S)["payload"] for future in passed] == texts


def test_a_failed_post_kills_the_executor(
    service: GlobusService, executor_of: MakeExecutor
) -> None:
    """Its open futures get the error, later submissions are refused; the client lives on."""
    first = executor_of()
    service.faults.fail_submits, service.faults.fail_status = 1, 403
    error = first.submit(slow, 1, 0).exception(DEADLINE_S)
    assert type(error).__name__ == "ComputeAPIError"
    assert getattr(error, "http_status", None) == 403
    until(lambda: first._stopped)
    with pytest.raises(RuntimeError, match="is shutdown; no new functions may be executed"):
        first.submit(slow, 2, 0)
    second = executor_of(task_group_id=first.task_group_id)
    assert second.submit(slow, 3, 0).result(DEADLINE_S) == 3


def test_a_short_outage_is_absorbed_by_the_sdk(service: GlobusService, executor: Executor) -> None:
    service.faults.fail_submits = 1
    assert executor.submit(slow, 1, 0).result(DEADLINE_S) == 1
    assert service.faults.fail_submits == 0


def test_a_lost_result_leaves_its_future_open(service: GlobusService, executor: Executor) -> None:
    """No error ever tells; the neighbours are not affected."""
    service.faults.drop_results = 1
    lost = executor.submit(slow, 1, 0)
    until(lambda: service.faults.drop_results == 0)
    assert executor.submit(slow, 2, 0).result(DEADLINE_S) == 2
    assert wait([lost], timeout=1.0).not_done == {lost}
    assert service.task(lost.task_id).status == "pending"


def test_a_late_result_arrives_all_the_same(service: GlobusService, executor: Executor) -> None:
    service.faults.hold_results = 1
    late = executor.submit(slow, 1, 0)
    until(lambda: service.faults.hold_results == 0)
    assert executor.submit(slow, 2, 0).result(DEADLINE_S) == 2
    assert not late.done()
    assert service.release() == 1
    assert late.result(DEADLINE_S) == 1


def test_options_travel_with_a_post_and_fill_the_template(
    service: GlobusService, executor_of: MakeExecutor, tmp_path: Path
) -> None:
    """What a manager would get to render the configuration of an endpoint from."""
    options = {"threads": 3}
    executor = executor_of(user_endpoint_config=options)
    assert executor.submit(slow, 1, 0).result(DEADLINE_S) == 1
    assert service.submissions[-1].user_endpoint_config == options
    template = "engine: {type: ThreadPoolEngine, max_workers: {{ threads|default(1) }} }"
    rendered = yaml.safe_load(render_config(template, options, tmp_path))
    assert rendered["engine"] == {"type": "ThreadPoolEngine", "max_workers": 3}
    with pytest.raises(RuntimeError, match="does not render"):
        render_config("engine: {{ threads", options, tmp_path)


def test_status_tells_which_endpoints_live(client: Client, endpoint: UserEndpoint) -> None:
    assert client.get_endpoint_status(endpoint.endpoint_id)["status"] == "online"


# A refusal comes from the agent, which tells no versions: the SDK warns of a difference, in the
# thread that waits for results; there an error would leave the future open.
@pytest.mark.filterwarnings(r"ignore:\s*Environment differences detected:UserWarning")
def test_an_endpoint_may_allow_certain_functions_only(
    client: Client, endpoint_of: StartEndpoint, executor_of: MakeExecutor
) -> None:
    """Then a function is registered once and submitted by its id; a new registration is refused."""
    known = client.register_function(slow)
    executor = executor_of(endpoint_of(f"{THREADS}allowed_functions: [{known}]").endpoint_id)
    allowed = executor.submit_to_registered_function(known, args=(5, 0))
    refused = executor.submit(slow, 6, 0)
    assert allowed.result(DEADLINE_S) == 5
    error = refused.exception(DEADLINE_S)
    assert type(error) is TaskExecutionFailed
    assert "not permitted on endpoint" in str(error)


def test_executors_join_the_last_task_group_unless_told(client: Client) -> None:
    """The default is an attribute of the class: name the group always."""
    first = Executor(client=client, task_group_id="11111111-2222-4333-8444-555555555555")
    assert Executor(client=client).task_group_id == first.task_group_id
