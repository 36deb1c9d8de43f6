"""Whole runs whose tasks and results come near the service's limit of 10 MB."""

from __future__ import annotations

import logging

import pytest

from fanfold.tests.integration.workers.globus.endpoint import UserEndpoint
from fanfold.tests.integration.workers.globus.globus_run import posted
from fanfold.tests.integration.workers.globus.plain_run import PlainRunOf
from fanfold.tests.integration.workers.globus.service import GlobusService

pytestmark = pytest.mark.integration

LIMIT = 10 * 1024 * 1024


def largest_result(service: GlobusService, since: int) -> int:
    """Return the bytes of the largest result of the tasks submitted since."""
    tasks = [task for post in service.submissions[since:] for task in post.task_ids]
    results = [service.task(task).result for task in tasks]
    assert all(result is not None for result in results), "a task failed"
    return max(len(result or "") for result in results)


@pytest.mark.parametrize("letter", ["x", "я", "語", "\U0001f9ec", '"'])
async def test_answers_larger_than_a_result_take_several(
    service: GlobusService, endpoint: UserEndpoint, plain_run_on: PlainRunOf, letter: str
) -> None:
    """In one shard, in any script: the service counts escapes, up to three bytes for one."""
    before, run = len(service.submissions), plain_run_on(endpoint)
    run.ask([letter * (600_000 // len(letter.encode()))] * 24)
    run.config["shard"], run.config["limits"]["streams"] = {"items": 24}, 2
    with run.serving():
        result = await run.live()
    assert result.exit_code == 0, result.reason
    run.assert_each_once()
    assert largest_result(service, before) < LIMIT
    assert len(service.submissions) > before + 2


async def test_a_result_of_answers_that_grow_is_sent_in_part(
    service: GlobusService,
    endpoint: UserEndpoint,
    plain_run_on: PlainRunOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was in flight when they grew is asked again, with fewer at a time."""
    before, run = len(service.submissions), plain_run_on(endpoint)
    run.ask(["small"] * 40 + ["x" * 1_500_000] * 20)
    run.config["shard"], run.config["limits"]["streams"] = {"items": 60}, 32
    with run.serving(takes_s=0.3), caplog.at_level(logging.WARNING):
        result = await run.live()
    assert result.exit_code == 0, result.reason
    run.assert_each_once(again=16 + 8)  # what one worker has in flight, then half of it
    assert run.asked().total() > 60
    assert largest_result(service, before) < LIMIT
    assert "did not fit in its result" in caplog.text
    assert "limits.streams" in caplog.text


@pytest.mark.parametrize("letter", ["x", "я", '"', "\\"])
async def test_items_larger_than_a_task_take_several(
    service: GlobusService, endpoint: UserEndpoint, plain_run_on: PlainRunOf, letter: str
) -> None:
    before, run = len(service.submissions), plain_run_on(endpoint)
    text = letter * (700_000 // len(letter.encode()))
    run.ask(["fine"] * 12, [text] * 12)
    run.config["shard"] = {"items": 12}
    with run.serving():
        result = await run.live()
    assert result.exit_code == 0, result.reason
    run.assert_each_once()
    assert max(post.size for post in service.submissions[before:]) < LIMIT
    assert sum(posted(service, before).values()) > 1


async def test_an_answer_larger_than_any_result_ends_its_item(
    endpoint: UserEndpoint, plain_run_on: PlainRunOf
) -> None:
    """It is a failure of the item, asked once; the others are not harmed."""
    run = plain_run_on(endpoint)
    run.ask(["fine", "я" * 2_500_000, "fine"])
    with run.serving():
        result = await run.live()
    assert (result.progress["done"], result.progress["failed"]) == (2, 1), result.reason
    run.assert_each_once()
