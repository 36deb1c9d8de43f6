"""The map-reduce as an agent that other agents call, here and in a process of its own."""

from __future__ import annotations

import runpy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from academy.exchange import LocalExchangeFactory
from academy.handle import Handle
from academy.manager import Manager
from academy.serialize import SerializationStrategy

from fanfold import ConfigurationError, MapReduceAgent
from fanfold.graphs.academy_agent import plain_exchange
from fanfold.tests.integration.academy.ward import Ward

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
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


async def served(manager: Manager[Any], ward: Ward, **more: Any) -> Handle[Any]:
    handle = await manager.launch(
        MapReduceAgent,
        args=(ward.settings, str(ward.out.parent)),
        kwargs=ALLOWED | more.pop("kwargs", {}),
        config=plain_exchange(),
        **more,
    )
    return in_json(handle)


async def test_cancelled_and_started_again_by_another_agent(ward: Ward) -> None:
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, ward)
        await agent.start({"items": ward.items}, run_id="run")
        await ward.until(ward.journal_lines)
        await agent.cancel("run")
        said = await agent.result("run", wait_s=60)
        assert said["state"] == "interrupted"
        assert said["reason"] == "cancel"
        assert 0 < said["progress"]["done"] < len(ward.items)
        await agent.shutdown()
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, ward)
        assert (await agent.status("run"))["state"] == "unknown"
        await agent.start({"items": ward.items}, run_id="run")
        said = await agent.result("run", wait_s=60)
        assert said["state"] == "done"
    ward.assert_whole(again=0)


async def test_what_is_wrong_comes_as_data(ward: Ward, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "secret.csv").write_text("x\n1\n")
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, ward, kwargs={"inputs": str(tmp_path / "inputs")})
        cases: list[tuple[Any, Any, str]] = [
            ({"items": [], "budget": 9}, "a", "unknown budget"),
            ({"items": [], "path": "x"}, "a", "not both"),
            ({"path": "../secret.csv"}, "a", "outside the folder"),
            ({"path": str(tmp_path / "secret.csv")}, "a", "outside the folder"),
            ({}, "../a", "run_id"),
            (["x"], "a", "give an object"),
        ]
        for request, run_id, words in cases:
            said = await agent.start(request, run_id=run_id)
            assert said["error"]["kind"] == "input", said
            assert words in said["error"]["message"]
        assert (await agent.status("a"))["state"] == "unknown"

        await agent.start({"items": [{"y": 1}]}, run_id="b")
        said = await agent.result("b", wait_s=60)
        assert (said["state"], said["error"]["type"]) == ("failed", "InputError")
        await agent.start({"items": ward.items[:2]}, run_id="b")  # nothing was begun under it
        assert (await agent.result("b", wait_s=60))["state"] == "done"
        said = await agent.start({"items": ward.items[:3]}, run_id="b")
        assert "another request" in said["error"]["message"]
        said = await agent.start({"items": ward.items[:2]}, listener="me")
        assert "listener" in said["error"]["message"]


async def test_a_file_below_the_services_folder(ward: Ward, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "some.csv").write_text("x\n1\n2\n")
    async with federation(LocalExchangeFactory()) as manager:
        agent = await served(manager, ward, kwargs={"inputs": str(tmp_path / "inputs")})
        said = await agent.start({"path": "some.csv"})
        said = await agent.result(said["run_id"], wait_s=60)
    assert pq.read_table(said["results"]["table"]).num_rows == 2


def test_a_simulated_fleet_must_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="allow_simulated=True"):
        MapReduceAgent("molecular_screening", str(tmp_path))


async def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(files("fanfold") / "examples" / "academy_agent.py"))
    assert len(await example["main"](40)) == 3
    assert "chemist-1: done, 40 done" in capsys.readouterr().out
