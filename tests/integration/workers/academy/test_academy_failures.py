"""Agents and coordinators die, hang and lose connections; nothing is lost or counts twice."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis

from fanfold import RunContext, build_graph
from fanfold.tests.integration.runs.conftest import assert_timeline
from fanfold.tests.integration.workers.academy.academy_run import AcademyRun, alive
from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = [
    pytest.mark.integration,
    # Academy's own habits
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]


def run_of(academy_run: AcademyRun, **backend: Any) -> asyncio.Task[dict[str, Any]]:
    """Begin a run in this process."""
    settings = academy_run.settings | {"backend": {"kind": "academy", "workers": 2} | backend}
    graph = build_graph(RunContext(config=settings, out=str(academy_run.out)))
    return asyncio.create_task(graph.ainvoke({"items": academy_run.items}))


def agents() -> list[int]:
    """Return the processes of this process's agents."""
    found = multiprocessing.active_children()
    return [child.pid for child in found if child.name == "agent" and child.pid]


def keys_of(exchange: dict[str, Any]) -> set[bytes]:
    at = {key: exchange[key] for key in ("host", "port", "password") if key in exchange}
    with redis.Redis(**at) as client:
        return set(client.keys("*"))


async def test_a_run_over_the_local_exchange(academy_run: AcademyRun) -> None:
    end = await run_of(academy_run, exchange={"kind": "local"})
    assert end["progress"]["done"] == len(academy_run.items)
    academy_run.assert_whole(again=0)
    assert_timeline(academy_run.out)


@pytest.mark.xdist_group("redis")  # it looks at all keys
async def test_an_agent_is_killed_over_redis(
    academy_run: AcademyRun, redis_exchange: dict[str, Any]
) -> None:
    """Its shard continues on another worker, a new agent replaces it, and no key is left."""
    before = keys_of(redis_exchange)
    run = run_of(academy_run, exchange=redis_exchange)
    await academy_run.until(lambda: academy_run.journal_lines() >= 40)
    victim, other = agents()
    os.kill(victim, signal.SIGKILL)
    await academy_run.until(lambda: len(set(agents()) - {victim}) > 1 or run.done())
    end = await run
    assert end["progress"]["done"] == len(academy_run.items)
    academy_run.assert_whole(again=academy_run.settings["limits"]["streams"])
    assert not alive(victim)
    assert not alive(other)
    assert agents() == []
    assert keys_of(redis_exchange) <= before


async def test_an_agent_hangs(academy_run: AcademyRun) -> None:
    """Stopped in its tracks, it answers nothing; it counts as dead, and is killed."""
    run = run_of(academy_run, silence_s=2.0)
    await academy_run.until(lambda: academy_run.journal_lines() >= 40)
    victim = agents()[0]
    os.kill(victim, signal.SIGSTOP)
    end = await run
    assert end["progress"]["done"] == len(academy_run.items)
    academy_run.assert_whole(again=academy_run.settings["limits"]["streams"])
    assert not alive(victim)


async def test_the_coordinator_is_killed(academy_run: AcademyRun, tmp_path: Path) -> None:
    """Its agents end with it, and another session continues from the journal."""
    with (tmp_path / "in.jsonl").open("wb") as file:
        file.writelines(orjson.dumps(item) + b"\n" for item in academy_run.items)
    settings = academy_run.settings | {"input": {"path": "in.jsonl", "id": "id"}}
    settings["backend"] = {"kind": "academy", "workers": 1}
    (tmp_path / "c.yaml").write_bytes(orjson.dumps(settings))
    server, out = get_command_server(), str(academy_run.out)
    first = await server.start(Command(("run", "c.yaml", "--out", out), cwd=str(tmp_path)))
    await academy_run.until(lambda: academy_run.journal_lines() >= 40)
    children = [int(pid) for pid in _children(first.pid)]
    assert children
    first.kill()
    await first.communicate()
    await academy_run.until(lambda: not any(map(alive, children)))
    safe = academy_run.journal_lines()
    assert 40 <= safe < len(academy_run.items)
    again = ("resume", out, "--json", "--set", "backend={kind: local}")
    second = await server.run(Command(again, cwd=str(tmp_path)))
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["done"] == len(academy_run.items)
    academy_run.assert_whole(again=academy_run.settings["limits"]["streams"])


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
