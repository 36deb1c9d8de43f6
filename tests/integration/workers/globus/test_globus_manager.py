"""Endpoints that a real manager starts from fanfold's template, as users do."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.messages import own_version
from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import make_task
from fanfold.configs.backend import BackendConfig
from fanfold.graphs.cli.setup import schema_text, template_text
from fanfold.graphs.worker import work_shard
from fanfold.tests.integration.workers.globus.client import URL_VARIABLE
from fanfold.tests.integration.workers.globus.globus_run import ITEMS, SHARDS, LabOf
from fanfold.tests.integration.workers.globus.logins import LOGIN
from fanfold.tests.integration.workers.globus.manager import Manager, configure, start_manager
from fanfold.tests.integration.workers.globus.processes import kill_process, offspring
from fanfold.tests.integration.workers.globus.service import GlobusService
from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("globus manager")]


@pytest.fixture(autouse=True)
def address(service: GlobusService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, service.url)


@pytest.fixture(scope="module")
def manager(
    session_service: GlobusService, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Manager]:
    home = tmp_path_factory.mktemp("manager")
    configure(home, template_text(own_version(), str(Path(sys.prefix) / "bin")), schema_text())
    manager = start_manager(session_service, home)
    yield manager
    manager.kill()


async def test_a_run_has_its_endpoint_started(
    service: GlobusService, manager: Manager, lab_over: LabOf
) -> None:
    """By values that travel with its shards; the block starts when the first shard is there."""
    values = {"local": True, "blocks": 1}
    before = len(service.submissions)
    async with lab_over(manager, ttft_s=0.02, user_endpoint_config=values) as lab:
        result = await lab.live(await lab.begin())
        assert result.exit_code == 0, f"{result.reason}\n{manager.logs()}"
        lab.assert_whole(lab.whole, again=0)  # type: ignore[attr-defined]
    posts = service.submissions[before:]
    assert [post.user_endpoint_config for post in posts] == [values] * len(posts)
    tasks = [service.task(task) for post in posts for task in post.task_ids]
    (child,) = {task.endpoint_id for task in tasks}
    assert len(tasks) == SHARDS
    assert [folder.name for folder in manager.user_endpoints()] == [
        f"uep.{manager.endpoint_id}.{child}"
    ]
    assert service.state(child)["engine_type"] == "GlobusComputeEngine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"local": True, "blocks": "many"}, "'many' is not of type 'integer'"),
        ({"acount": "mine"}, "'acount' was unexpected"),
        ({"account": "mine", "ifname": "nowhere0"}, "No such device"),
        ({"local": True, "queue": {"api_key": "s3cr3t"}}, r"\{'api_key': '\*+'\} is not of type"),
    ],
    ids=["of another kind", "misspelt", "not there", "secret"],
)
async def test_values_that_are_refused_are_told(
    manager: Manager, values: dict[str, Any], words: str
) -> None:
    """In the words of the endpoint, or of the one that it began to start; no secrets among them."""
    folder = BackendConfig(
        kind="globus_compute",
        endpoints=[manager.endpoint_id],
        client=LOGIN,
        user_endpoint_config=values,
    )
    (backend,) = make_backends(folder, work_shard)
    await backend.start()
    try:
        with pytest.raises(ConfigurationError, match=words) as caught:
            await backend.submit(make_task("0-1", [{}]).to_json())
    finally:
        await backend.close()
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.long
async def test_an_endpoint_that_is_killed_is_waited_for(
    service: GlobusService, tmp_path: Path, lab_over: LabOf
) -> None:
    """Its manager starts it anew after three heartbeats and refuses tasks until then."""
    template = template_text(own_version(), str(Path(sys.prefix) / "bin"))
    quick = template.replace("heartbeat_period: 30", "heartbeat_period: 10")
    configure(tmp_path / "manager", quick, schema_text())
    manager = start_manager(service, tmp_path / "manager")
    try:
        values = {"local": True}
        async with lab_over(manager, user_endpoint_config=values, deadline_s=3.0) as lab:
            lab.config["limits"]["request_timeout_s"] = 3.0
            life = asyncio.create_task(lab.live(await lab.begin()))
            await lab.until(lambda: lab.journal_lines() >= 20 or life.done())
            assert not life.done()
            for pid in offspring(manager.process.pid):
                kill_process(pid)
            lab.life_ended()
            result = await life
            assert result.exit_code == 0, f"{result.reason}\n{manager.logs()}"
            lab.assert_whole(lab.whole, again=ITEMS)  # type: ignore[attr-defined]
            print(f"globus endpoint behind a manager: {lab.again} items asked again")
    finally:
        manager.kill()


async def test_a_run_ends_when_its_values_are_refused(manager: Manager, lab_over: LabOf) -> None:
    async with lab_over(manager, user_endpoint_config={}) as lab:
        settings = lab.home / "c.yaml"
        settings.write_bytes(orjson.dumps(lab.config))
        command = Command(("run", str(settings), "--out", str(lab.out), "--json"))
        ended = await get_command_server().run(command)
    assert ended.returncode == 2, ended.stderr
    assert "'account' is undefined" in ended.stderr
    assert "correct backend.user_endpoint_config" in ended.stderr
