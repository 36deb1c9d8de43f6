"""Shards on endpoints of Globus Compute: the backend, and whole runs over it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from jinja2 import Environment, meta

from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    RunStoppedError,
    WorkerLostError,
)
from fanfold.backends.core.messages import ShardResult, own_version
from fanfold.backends.core.protocols import Backend
from fanfold.backends.workers.globus.backend import TaskSubmitter, make_globus_backends
from fanfold.backends.workers.globus.poller import PollPolicy
from fanfold.backends.workers.globus.service import TaskService, connect_service
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskLog, TaskRegistry
from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import CHECKS, BackendCase, Check, make_task
from fanfold.configs.backend import BackendConfig
from fanfold.graphs.cli import setup
from fanfold.graphs.worker import work_shard
from fanfold.tests.integration.workers.globus.client import URL_VARIABLE
from fanfold.tests.integration.workers.globus.endpoint import THREADS, UserEndpoint
from fanfold.tests.integration.workers.globus.fixtures import StartEndpoint
from fanfold.tests.integration.workers.globus.logins import LOGIN, login
from fanfold.tests.integration.workers.globus.service import GlobusService
from fanfold.tests.integration.workers.globus.template import render_config
from fanfold.tests.integration.workers.globus.work import too_large

pytestmark = pytest.mark.integration

SUBMIT = "POST /v3/endpoints/{id}/submit"
QUICK = PollPolicy(
    burst=20,
    rate_per_s=20.0,
    min_pause_s=0.1,
    max_pause_s=0.5,
    health_check_s=0.5,
    missing_timeout_s=0.5,
)


@pytest.fixture(autouse=True)
def address(service: GlobusService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, service.url)


Place = Callable[..., Backend]


@pytest.fixture
def place(endpoint: UserEndpoint, tmp_path: Path) -> Place:
    """Make backends that ask more often than the hosted service allows."""

    def make(work: Any = work_shard, at: str = endpoint.endpoint_id, **options: Any) -> Backend:
        def connected() -> TaskService:
            return connect_service(login, options.get("config"))

        tasks = TaskRegistry(TaskLog(tmp_path / TASK_LOG_FILE))
        submitter = TaskSubmitter(connected, work, options.get("function"), tasks, QUICK)
        return make_globus_backends([at], 2, submitter)[0]

    return make


@asynccontextmanager
async def started(backend: Backend) -> AsyncIterator[Backend]:
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_backend_keeps_the_contract(check: Check, place: Place, tmp_path: Path) -> None:
    """Over an endpoint of threads, whose workers cannot die by themselves."""
    await check(BackendCase(place, tmp_path, isolated=False))


async def test_orders_and_summaries_are_json_and_go_by_reference(
    service: GlobusService, place: Place
) -> None:
    async with started(place(config={"account": "mine"})) as backend:
        summary = await backend.submit(make_task("0-2", [{}, {}]).to_json())
    assert ShardResult.from_json(summary).tally == {"done": 2, "failed": 0}
    post = service.submissions[-1]
    assert post.result_serializers == ("globus_compute_sdk.serialize.JSONData",)
    assert post.user_endpoint_config == {"account": "mine"}
    packed = service.task(post.task_ids[0]).result
    assert packed is not None
    assert json.loads(packed.removeprefix("11\n")) == summary


async def test_a_page_of_a_proxy_is_no_answer(service: GlobusService, place: Place) -> None:
    """A refused task may be sent again; an accepted task is polled again."""
    async with asyncio.timeout(60), started(place()) as backend:
        service.faults.pages = 1
        with pytest.raises(BackendError, match="not from the service"):
            await backend.submit(make_task("0-1", [{}]).to_json())
        posts = service.stats.get(SUBMIT, 0)
        sent = asyncio.ensure_future(backend.submit(make_task("0-1", [{"seconds": 1}]).to_json()))
        await until(lambda: service.stats.get(SUBMIT, 0) > posts)
        service.faults.pages = 3
        summary = await sent
    assert service.faults.pages == 0
    assert ShardResult.from_json(summary).tally == {"done": 1, "failed": 0}


async def test_many_orders_travel_in_few_requests(service: GlobusService, place: Place) -> None:
    """Those that gather while one is posted go together, as many as one request may carry."""
    text = "ü" * 300_000  # six bytes each within the JSON of a request
    async with started(place()) as backend:
        before = service.stats.get(SUBMIT, 0)
        orders = [make_task(f"{n}-{n + 1}", [{"text": text if n < 12 else ""}]) for n in range(40)]
        answers = await asyncio.gather(*(backend.submit(one.to_json()) for one in orders))
    assert [answer["shard"] for answer in answers] == [one.shard for one in orders]
    posts = service.submissions[-(service.stats[SUBMIT] - before) :]
    assert len(posts) <= 6
    assert max(post.size for post in posts) < 10_000_000


async def test_an_order_that_no_request_carries_is_refused(place: Place) -> None:
    async with started(place()) as backend:
        with pytest.raises(ConfigurationError, match=r"lower shard\.items"):
            await backend.submit(make_task("0-1", [{"text": "x" * 9_600_000}]).to_json())
        assert backend.capacity() > 0


async def test_a_failed_post_costs_its_own_orders_only(
    service: GlobusService, place: Place
) -> None:
    """What was posted before comes home; the place is down until the service answers again."""
    async with started(place()) as backend:
        slow = asyncio.create_task(backend.submit(make_task("0-1", [{"seconds": 1.0}]).to_json()))
        await asyncio.sleep(0.3)
        service.faults.fail_submits, service.faults.fail_status = 1, 507
        with pytest.raises(ConfigurationError, match="507"):
            await backend.submit(make_task("1-2", [{}]).to_json())
        service.faults.fail_submits, service.faults.fail_status = 9, 503
        capacity: list[int] = []  # seen at the moment of failure: the next look finds it online
        down = asyncio.create_task(backend.submit(make_task("2-3", [{}]).to_json()))
        down.add_done_callback(lambda _: capacity.append(backend.capacity()))
        assert (await slow)["tally"] == {"done": 1, "failed": 0}
        with pytest.raises(BackendError, match="answered 503") as caught:
            await down
        assert not isinstance(caught.value, WorkerLostError)
        assert capacity == [0]
        service.faults.clear()
        await backend.rebuild()
        assert backend.capacity() > 0
        assert (await backend.submit(make_task("3-4", [{}]).to_json()))["shard"] == "3-4"


async def test_a_result_that_is_lost_is_found_by_asking(
    service: GlobusService, place: Place
) -> None:
    """The one way to lose it is for the service to forget the task, and that shows."""
    async with started(place()) as backend:
        service.faults.hold_results = 1
        task = asyncio.create_task(backend.submit(make_task("0-1", [{}]).to_json()))
        await until(lambda: not service.faults.hold_results)
        service.forget(list(service.submissions[-1].task_ids))
        with pytest.raises(WorkerLostError, match="no longer knows the task"):
            await task


async def test_a_task_whose_result_is_lost_is_overdue(service: GlobusService, place: Place) -> None:
    async with started(place()) as backend:
        service.faults.drop_results = 1
        asked = make_task("0-1", [{}], deadline_s=0.5)
        with pytest.raises(WorkerLostError, match="deadline_s"):
            await backend.submit(asked.to_json())


async def test_a_result_that_is_too_large_stops_the_run(place: Place) -> None:
    async with started(place(too_large)) as backend:
        with pytest.raises(RunStoppedError, match=r"MaxResultSizeExceeded.*lower shard\.items"):
            await backend.submit(make_task("0-1", [{}]).to_json())


async def test_an_endpoint_that_is_offline_is_told(
    endpoint_of: StartEndpoint, place: Place
) -> None:
    """And found again once it is back."""
    other = endpoint_of()
    other.stop()
    backend = place(at=other.endpoint_id)
    with pytest.raises(BackendError, match="globus-compute-endpoint start"):
        await backend.start()
    assert backend.capacity() == 0
    await asyncio.to_thread(endpoint_of, endpoint_id=other.endpoint_id)
    await backend.rebuild()
    assert backend.capacity() == 2
    await backend.close()


async def test_an_endpoint_that_nobody_knows_is_a_mistake(place: Place) -> None:
    backend = place(at="11111111-2222-4333-8444-555555555555")
    with pytest.raises(ConfigurationError, match=r"check the ids in backend\.endpoints"):
        await backend.start()
    await backend.close()


async def test_an_endpoint_may_allow_certain_functions_only(
    endpoint_of: StartEndpoint, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The id comes from ``fanfold globus register``, and goes into ``backend.function``."""
    await asyncio.to_thread(setup.globus, ["register", "--client", LOGIN], standalone_mode=False)
    known = capsys.readouterr().out.strip()
    config = f"{THREADS}allowed_functions: [{known}]"
    strict = await asyncio.to_thread(endpoint_of, config)
    async with started(place(at=strict.endpoint_id, function=known)) as backend:
        summary = await backend.submit(make_task("0-1", [{}]).to_json())
        assert summary["tally"] == {"done": 1, "failed": 0}
    async with started(place(at=strict.endpoint_id)) as backend:
        with pytest.raises(ConfigurationError, match="fanfold globus register"):
            await backend.submit(make_task("0-1", [{}]).to_json())


async def test_workers_are_divided_among_endpoints() -> None:
    endpoints = [f"11111111-2222-4333-8444-55555555555{n}" for n in range(3)]
    config = BackendConfig(kind="globus_compute", endpoints=endpoints, client=LOGIN, workers=8)
    backends = make_backends(config, work_shard)
    assert [backend._workers for backend in backends] == [3, 3, 2]  # type: ignore[attr-defined]


async def test_a_later_coordinator_finds_what_is_left(
    service: GlobusService, place: Place, tmp_path: Path
) -> None:
    """Of shards that were not brought home: those that run, have ended, and are forgotten."""
    first = place()
    await first.start()
    home = await first.submit(make_task("0-1", [{}]).to_json())
    rows = {"1-2": 0.0, "2-3": 2.0, "3-4": 0.0}
    tasks = [
        asyncio.create_task(first.submit(make_task(name, [{"seconds": seconds}]).to_json()))
        for name, seconds in rows.items()
    ]
    before = service.stats["tasks"]
    await until(lambda: len(TaskLog(tmp_path / TASK_LOG_FILE).read_open()) == 4)
    await first.close()
    assert {type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)} == {
        BackendError
    }
    left = {entry.shard: entry for entry in TaskLog(tmp_path / TASK_LOG_FILE).read_open()}
    assert left.keys() == rows.keys()
    assert home["shard"] == "0-1"
    service.forget([left["3-4"].task])
    second = place()
    await second.start()
    found = await second.reattach()
    assert found.keys() == rows.keys()
    assert (await found["1-2"])["records"][0]["index"] == 0
    assert (await found["2-3"])["tally"] == {"done": 1, "failed": 0}
    with pytest.raises(WorkerLostError, match="no longer knows"):
        await found["3-4"]
    await second.close()
    assert service.stats["tasks"] == before + 3
    assert [entry.shard for entry in TaskLog(tmp_path / TASK_LOG_FILE).read_open()] == ["3-4"]


def test_the_template_renders_and_pins_the_version(tmp_path: Path) -> None:
    target = tmp_path / "mine.j2"
    setup.globus(["template", "-o", str(target)], standalone_mode=False)
    text = target.read_text()
    cluster = {"account": "it's: mine", "walltime": "00:30:00", "blocks": 3}
    rendered = yaml.safe_load(render_config(text, cluster, tmp_path))
    provider = rendered["engine"]["provider"]
    assert (provider["account"], provider["max_blocks"]) == ("it's: mine", 3)
    assert f'!= "{own_version()}"' in provider["worker_init"]
    local = yaml.safe_load(render_config(text, {"local": True}, tmp_path))
    assert local["engine"]["provider"]["type"] == "LocalProvider"
    with pytest.raises(RuntimeError, match="'account' is undefined"):
        render_config(text, {}, tmp_path)


def test_the_schema_knows_what_the_template_takes(tmp_path: Path) -> None:
    target = tmp_path / "mine.json"
    setup.globus(["template", "--schema", "-o", str(target)], standalone_mode=False)
    schema = json.loads(target.read_text())
    text = setup.template_text("1", "/bin")
    names = meta.find_undeclared_variables(Environment(autoescape=True).parse(text))
    assert schema["properties"].keys() == names
    jsonschema_rs.validate(schema, {"account": "mine", "walltime": "12:00:00", "nodes": 4})
    with pytest.raises(jsonschema_rs.ValidationError, match="walltime"):
        jsonschema_rs.validate(schema, {"walltime": "2h"})


def test_a_client_that_nobody_logged_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the SDK asks for a login at the terminal, in the middle of a run."""
    from globus_sdk import UserApp  # noqa: PLC0415 - next to what it stands in for

    app = UserApp("test", client_id="11111111-2222-4333-8444-555555555555")
    client = login()
    client.app = app
    monkeypatch.setattr(app, "login_required", lambda: True)
    with pytest.raises(ConfigurationError, match="fanfold globus register"):
        connect_service(lambda: client)
