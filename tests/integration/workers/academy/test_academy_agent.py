"""The map-reduce as an agent that other agents call, in this process and in another one."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from academy.exchange import LocalExchangeFactory, RedisExchangeFactory
from academy.handle import Handle
from academy.identifier import AgentId
from academy.manager import Manager
from academy.serialize import SerializationStrategy

from fanfold import ConfigurationError, MapReduceAgent
from fanfold.backends.workers.academy.exchange import ExchangeSettings, delete_mailboxes
from fanfold.configs.backend import ExchangeConfig
from fanfold.graphs.integrations.academy import plain_exchange
from fanfold.tests.integration.workers.academy.academy_run import AcademyRun

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),  # Academy's
]
ALLOWED = {"allow_simulated": True, "event_s": 0.05}


@asynccontextmanager
async def federation(factory: Any) -> AsyncIterator[Manager[Any]]:
    async with await Manager.from_exchange_factory(factory) as manager:
        yield manager


def in_json(handle: Handle[Any]) -> Handle[Any]:
    """Let a caller send JSON, for the agent takes nothing else."""
    handle.request_serializer = SerializationStrategy.JSON
    return handle


async def served(manager: Manager[Any], academy_run: AcademyRun, **more: Any) -> Handle[Any]:
    handle = await manager.launch(
        MapReduceAgent,
        args=(academy_run.settings, str(academy_run.out.parent)),
        kwargs=ALLOWED | more.pop("kwargs", {}),
        config=plain_exchange(),
        **more,
    )
    return in_json(handle)


@asynccontextmanager
async def apart(
    exchange: dict[str, Any], academy_run: AcademyRun
) -> AsyncIterator[list[AgentId[Any]]]:
    """Have a process of its own serve runs; yield its agent, its listener and its own mailbox."""
    told = json.dumps([exchange, academy_run.settings, str(academy_run.out.parent)])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("serving.py")),
        told,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            line = await process.stdout.readline()
        yield [
            AgentId(uid=uuid.UUID(text), name=None, role="agent") for text in line.decode().split()
        ]
    finally:
        process.kill()
        await process.communicate()


async def test_two_processes_over_redis(
    redis_exchange: dict[str, Any], academy_run: AcademyRun
) -> None:
    at = ExchangeSettings(ExchangeConfig(**redis_exchange))
    options: dict[str, Any] = {"password": at.password} if at.password else {}
    client = await RedisExchangeFactory(
        at.config.host, at.config.port, **options
    ).create_user_client()
    async with apart(redis_exchange, academy_run) as boxes:
        agent, listener = (
            in_json(Handle(box, exchange=client, ignore_context=True)) for box in boxes[:2]
        )
        request, ear = {"items": academy_run.items}, str(boxes[1].uid)
        async with asyncio.timeout(90):
            said = await agent.start(request, run_id="run", listener=ear)
            assert said["state"] == "starting"
            assert (await agent.start(request, run_id="run"))["run_id"] == "run"
            while said["state"] != "done":
                said = await agent.result("run", wait_s=10)
            events: list[dict[str, Any]] = await listener.heard()
            while events[-1]["state"] != "done":
                events = await listener.heard()
        await client.terminate(client.client_id)  # wakes what listens there
        await client.close()
    await delete_mailboxes(at, [*boxes, client.client_id])
    assert said["progress"]["done"] == len(academy_run.items)
    assert said["aggregate"] == [
        {"op": "count", "done": len(academy_run.items), "failed": 0, "failed_by_class": {}}
    ]
    done = [event["progress"].get("done", 0) for event in events]
    assert done == sorted(done)
    assert len(events) > 2
    assert events[-1]["results"] == said["results"]
    academy_run.assert_whole(again=0)


async def test_cancelled_and_started_again_by_another_agent(academy_run: AcademyRun) -> None:
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, academy_run)
        await agent.start({"items": academy_run.items}, run_id="run")
        await academy_run.until(academy_run.journal_lines)
        await agent.cancel("run")
        said = await agent.result("run", wait_s=60)
        assert said["state"] == "interrupted"
        assert said["reason"] == "cancel"
        assert 0 < said["progress"]["done"] < len(academy_run.items)
        await agent.shutdown()
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, academy_run)
        assert (await agent.status("run"))["state"] == "unknown"
        await agent.start({"items": academy_run.items}, run_id="run")
        said = await agent.result("run", wait_s=60)
        assert said["state"] == "done"
    academy_run.assert_whole(again=0)


async def test_what_is_wrong_comes_as_data(academy_run: AcademyRun, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "secret.csv").write_text("x\n1\n")
    (tmp_path / "inputs" / "link.csv").symlink_to(tmp_path / "secret.csv")
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, academy_run, kwargs={"inputs": str(tmp_path / "inputs")})
        cases: list[tuple[Any, Any, str]] = [
            ({"items": academy_run.items, "budget": 9}, "a", "unknown key 'budget'"),
            ({"itemss": academy_run.items}, "a", "did you mean 'items'"),
            ({"preset": "quickstart"}, "a", "unknown key 'preset'"),
            ({"items": academy_run.items, "path": "x"}, "a", "not both"),
            ({"items": []}, "a", "is empty"),
            ({"path": ""}, "a", "is empty"),
            ({"path": None}, "a", "is null"),
            ({"items": None}, "a", "is null"),
            ({"path": "link.csv"}, "a", "outside the folder"),
            ({"path": "../secret.csv"}, "a", "outside the folder"),
            ({"path": str(tmp_path / "secret.csv")}, "a", "outside the folder"),
            ({}, "../a", "run_id"),
            (["x"], "a", "give "),
        ]
        for request, run_id, words in cases:
            said = await agent.start(request, run_id=run_id)
            assert said["error"]["kind"] == "input", said
            assert words in said["error"]["message"]
        assert (await agent.status("a"))["state"] == "unknown"

        said = await agent.start({"path": "${HOME}/.ssh"})  # no variable is looked up
        said = await agent.result(said["run_id"], wait_s=60)
        assert "/inputs/${HOME}/.ssh does not exist" in said["error"]["message"]
        await agent.start({"items": [{"y": 1}]}, run_id="b")
        said = await agent.result("b", wait_s=60)
        assert (said["state"], said["error"]["type"]) == ("failed", "InputError")
        await agent.start(
            {"items": academy_run.items[:2]}, run_id="b"
        )  # nothing was begun under it
        assert (await agent.result("b", wait_s=60))["state"] == "done"
        said = await agent.start({"items": academy_run.items[:3]}, run_id="b")
        assert "another request" in said["error"]["message"]
        said = await agent.start({"items": academy_run.items[:2]}, listener="me")
        assert "listener" in said["error"]["message"]


async def test_a_file_below_the_services_folder(academy_run: AcademyRun, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "some.csv").write_text("x\n1\n2\n")
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, academy_run, kwargs={"inputs": str(tmp_path / "inputs")})
        said = await agent.start({"path": "some.csv"})
        said = await agent.result(said["run_id"], wait_s=60)
    assert pq.read_table(said["results"]["table"]).num_rows == 2


def test_a_simulated_fleet_must_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="allow_simulated=True"):
        MapReduceAgent("quickstart", str(tmp_path))


async def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(files("fanfold") / "examples" / "academy_agent.py"))
    assert len(await example["main"](40)) == 3
    assert "chemist-1: done, 40 done" in capsys.readouterr().out
