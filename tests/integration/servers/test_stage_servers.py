"""Two models in one pipeline with ``node.serve``: the servers of one stage after the other."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import EXIT_INTERRUPTED
from fanfold.backends.servers.lock import is_served
from fanfold.tests.support.command_server import Command, CommandProcess, get_command_server

from .conftest import PLAIN, Node, until

pytestmark = pytest.mark.integration

SERVE = f"{sys.executable} -I -S {PLAIN} {{port}} takes:0.1 model:{{model}}"


def write_settings(node: Node, **changes: Any) -> Path:
    folder = node.folder.parent
    (folder / "in.csv").write_text("id,text\n" + "".join(f"{n},t\n" for n in range(40)))
    settings = {
        "name": "t",
        "input": {"path": str(folder / "in.csv"), "id": "id"},
        "model": {"name": "small"},
        "endpoints": {"file": str(node.folder), "refresh_s": 0.05},
        "backend": {"processes": 2, "node_endpoints": True},
        "limits": {"streams": 4},
        "node": {
            "serve": SERVE,
            "ports": node.ports[0],
            "address": "127.0.0.1",
            "linger_s": 0.3,
        },
        "stages": [
            {"name": "a", "map": {"prompt": "Say {text}"}},
            {"name": "b", "map": {"prompt": "Again {a}"}, "model": {"name": "large"}},
        ],
    }
    path = folder / "c.yaml"
    path.write_text(json.dumps(settings | changes))
    return path


async def fanfold(node: Node, *arguments: str) -> CommandProcess:
    command = Command((*arguments, "--json"), cwd=str(node.folder.parent))
    return await get_command_server().start(command)


def list_ends(node: Node) -> list[str]:
    return [line["event"] for line in node.events() if line["event"] in ("start", "end")]


async def finish(node: Node, process: CommandProcess) -> None:
    said, errors = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, errors.decode()
    assert [one["results"] for one in json.loads(said)["stages"]] == [40, 40]
    await until(lambda: not is_served(node.files))
    assert not node.alive()


@pytest.mark.parametrize("linger_s", [0.3, 20.0])
async def test_the_servers_of_a_stage_end_before_those_of_the_next(
    node: Node, monkeypatch: pytest.MonkeyPatch, linger_s: float
) -> None:
    """Also if they would stay for longer without a user: the same port serves the next model."""
    monkeypatch.setenv("FANFOLD_HOST", "node7")
    out = node.folder.parent / "r"
    settings = write_settings(node)
    changed = json.loads(settings.read_text())
    changed["node"]["linger_s"] = linger_s
    settings.write_text(json.dumps(changed))
    await finish(node, await fanfold(node, "run", str(settings), "--out", str(out)))
    assert list_ends(node) == ["start", "end"] * 2
    for name, model in (("a", "small"), ("b", "large")):
        lines = [
            json.loads(line)
            for file in (out / "stages" / name / "journal").glob("*.jsonl")
            for line in file.read_text().splitlines()[1:]
        ]
        assert {line["model"] for line in lines} == {model}


async def test_a_stop_in_the_second_stage_ends_its_servers_and_a_resume_starts_them_alone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walltime of a job drains a run as SIGTERM does."""
    monkeypatch.setenv("FANFOLD_HOST", "node7")
    out = node.folder.parent / "r"
    process = await fanfold(node, "run", str(write_settings(node)), "--out", str(out))
    async with asyncio.timeout(300):
        while len(node.events("ready")) < 2:  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == EXIT_INTERRUPTED
    await until(lambda: not is_served(node.files))
    assert not node.alive()
    assert list_ends(node) == ["start", "end"] * 2
    await finish(node, await fanfold(node, "resume", str(out)))
    assert list_ends(node) == ["start", "end"] * 3
