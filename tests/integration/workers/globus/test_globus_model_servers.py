"""Whole runs whose workers start the model servers of their node."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.servers.events import read_events
from fanfold.backends.servers.lock import is_served
from fanfold.backends.servers.plan import NodeFiles
from fanfold.backends.servers.watchdog import is_alive
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskLog
from fanfold.tests.integration.workers.globus.endpoint import HTEX, THREADS
from fanfold.tests.integration.workers.globus.fixtures import StartEndpoint
from fanfold.tests.integration.workers.globus.globus_run import recorded
from fanfold.tests.integration.workers.globus.plain_run import PlainRun, PlainRunOf

pytestmark = pytest.mark.integration

HOST = "node7"
ITEMS = 60
OF_A_SHARD = 10
PATIENCE_S = 90.0


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.02)


def serve(run: PlainRun, takes_s: float = 0.1) -> NodeFiles:
    """Have the workers serve the model themselves; the coordinator reaches no server."""
    servers = run.home / "servers"
    run.ask([f"answer {n}" for n in range(ITEMS)])
    run.config |= {
        "endpoints": {"file": str(servers)},
        "shard": {"items": OF_A_SHARD},
        "node": {
            "serve": shlex.join(run.command(takes_s)),
            "ports": run.port,
            "address": "127.0.0.1",
            "linger_s": 0.5,
        },
    }
    run.config["backend"]["node_endpoints"] = True
    return NodeFiles(servers, HOST)


def started(files: NodeFiles) -> list[int]:
    """Return the servers that were ever started, by their process groups."""
    log = Path(files.event_log)
    events = read_events(log) if log.exists() else []
    return [event["pid"] for event in events if event["event"] == "start"]


@pytest.mark.parametrize(
    "config", [THREADS, pytest.param(HTEX, marks=pytest.mark.long)], ids=["threads", "HTEX"]
)
async def test_workers_serve_the_model_on_their_node(
    endpoint_of: StartEndpoint, plain_run_on: PlainRunOf, config: str
) -> None:
    """All of them by one server, which ends after the endpoint."""
    env = {"FANFOLD_HOST": HOST}
    endpoint = await asyncio.to_thread(endpoint_of, config, env=env)
    run = plain_run_on(endpoint)
    files = serve(run)
    result = await run.live()
    assert result.exit_code == 0, f"{result.reason}\n{endpoint.logs()}"
    run.assert_each_once()
    (server,) = started(files)
    assert is_alive(server)
    await asyncio.to_thread(endpoint.stop)
    await until(lambda: not is_served(files))
    assert not is_alive(server)


async def test_a_killed_server_costs_what_it_was_asked(
    endpoint_of: StartEndpoint, plain_run_on: PlainRunOf
) -> None:
    """It is started again on its node, and the shards go on."""
    endpoint = await asyncio.to_thread(endpoint_of, env={"FANFOLD_HOST": HOST})
    run = plain_run_on(endpoint)
    files = serve(run)
    life = asyncio.create_task(run.live())
    await until(lambda: run.asked().total() >= OF_A_SHARD or life.done())
    os.killpg(started(files)[0], signal.SIGKILL)
    result = await life
    assert result.exit_code == 0, f"{result.reason}\n{endpoint.logs()}"
    run.assert_each_once(again=run.config["limits"]["streams"])
    assert len(started(files)) == 2


@pytest.mark.parametrize("graceful", [False, True], ids=["killed", "ended"])
async def test_an_endpoint_that_is_restarted_serves_again(
    endpoint_of: StartEndpoint, plain_run_on: PlainRunOf, graceful: bool
) -> None:
    """What came back is kept; servers of the first life end, or serve the second."""
    env = {"FANFOLD_HOST": HOST}
    endpoint = await asyncio.to_thread(endpoint_of, env=env)
    run = plain_run_on(endpoint)
    files = serve(run)
    run.config["backend"]["deadline_s"] = 4.0
    run.config["limits"]["request_timeout_s"] = 2.0
    life = asyncio.create_task(run.live())
    await until(lambda: recorded(run.out).total() >= OF_A_SHARD or life.done())
    assert not life.done()
    await asyncio.to_thread(endpoint.stop if graceful else endpoint.kill)
    lost = OF_A_SHARD * len(TaskLog(run.out / TASK_LOG_FILE).read_open())
    again = await asyncio.to_thread(endpoint_of, endpoint_id=endpoint.endpoint_id, env=env)
    result = await life
    assert result.exit_code == 0, f"{result.reason}\n{again.logs()}"
    run.assert_each_once(again=lost)
    await asyncio.to_thread(again.stop)
    await until(lambda: not is_served(files))
    assert not any(map(is_alive, started(files)))


async def test_servers_that_never_start_end_the_run(
    endpoint_of: StartEndpoint, plain_run_on: PlainRunOf
) -> None:
    """With what the server said; nothing was asked."""
    endpoint = await asyncio.to_thread(endpoint_of, env={"FANFOLD_HOST": HOST})
    run = plain_run_on(endpoint)
    serve(run)
    run.config["node"]["serve"] += " fail"
    result = await run.live()
    assert result.exit_code != 0
    assert "torch.OutOfMemoryError: no memory left" in str(result.reason)
    assert not run.asked()
