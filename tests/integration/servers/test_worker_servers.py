"""Workers on an unserved node: the first has the servers started, all use them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fanfold.backends.core.errors import ConfigurationError, RunStoppedError
from fanfold.backends.discovery.node_local import node_endpoints
from fanfold.backends.servers.client import use_servers
from fanfold.backends.servers.lock import is_served, local_lock_folder, read_owner
from fanfold.backends.servers.plan import NodePlan
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.graphs import worker
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.session import RunOptions, execute_run

from .conftest import PLAIN, Node, free_port, until

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANFOLD_HOST", "node7")


def settings(node: Node, serve: str = "", **sections: Any) -> LoadedConfig:
    source = node.folder.parent / "in.csv"
    source.write_text("id,text\n" + "".join(f"{n},t\n" for n in range(60)))
    data: dict[str, Any] = {
        "name": "t",
        "input": {"path": str(source), "id": "id"},
        "task": {"prompt": "Say {text}"},
        "model": {"name": "plain"},
        "endpoints": {"file": str(node.folder), "refresh_s": 0.05},
        "backend": {"processes": 2, "node_endpoints": True},
        "limits": {"streams": 8},
        "node": {
            "serve": serve or f"{sys.executable} -I -S {PLAIN} {{port}} {' '.join(node.modes)}",
            "ports": node.ports[0],
            "address": "127.0.0.1",
            "linger_s": 0.3,
        },
    }
    return load_config(data | sections)


def never() -> None:
    return None


def threads() -> Executor:
    return ThreadPoolExecutor(2)


async def test_a_run_starts_its_nodes_servers(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end when the workers have."""
    own = worker.Worker()
    monkeypatch.setattr(worker, "get_worker", lambda: own)
    backend = {"kind": "executor", "factory": f"{__name__}:threads", "node_endpoints": True}
    loaded = settings(node, backend=backend)
    run = await prepare_run(loaded, tmp_path / "r")
    result = await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
    assert (result.exit_code, result.progress["done"], result.simulated) == (0, 60, False)
    assert len(node.events("start")) == len(node.events("ready")) == 1
    await asyncio.to_thread(own.close)
    await until(lambda: not is_served(node.files))
    assert not node.alive()
    assert not node.listed()
    assert node.events("end")[-1]["why"] == "stopped"
    assert "the servers were not used for" in node.files.supervisor_log.read_text()


async def test_many_workers_one_set_of_servers(node: Node) -> None:
    node.ports = [free_port(), free_port()]
    plan = node.plan(linger_s=0.1)

    async def one() -> None:
        async with use_servers(plan):
            assert node.listed()

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(one())
    await until(lambda: not is_served(node.files))
    assert len(node.events("begin")) == 1
    assert len(node.events("start")) == 2
    assert not node.alive()


async def test_workers_find_what_a_job_script_has_started(node: Node) -> None:
    loaded = settings(node)
    async with node.served():
        await until(node.listed)
        async with node_endpoints(
            loaded.config, loaded.plain["endpoints"], "plain", False, never
        ) as up:
            assert [spec.url for spec in up.specs] == [f"http://127.0.0.1:{node.ports[0]}"]
        assert len(node.events("start")) == 1


async def test_servers_outlive_a_worker_for_the_next_one(node: Node) -> None:
    plan = node.plan(linger_s=60.0)
    async with use_servers(plan):
        pass
    async with use_servers(plan):
        (begun,) = node.events("begin")
        os.kill(node.pids()[0], signal.SIGKILL)
        await until(lambda: len(node.events("ready")) == 2)
    os.kill(begun["pid"], signal.SIGTERM)
    await until(lambda: not is_served(node.files))
    assert not node.alive()
    assert len(node.events("begin")) == 1


def rename(plan: NodePlan, model: str) -> NodePlan:
    """Return the plan for another model, whose name is in the commands of its servers."""
    servers = (replace(one, command=(*one.command, f"model={model}")) for one in plan.servers)
    return replace(plan, model=model, servers=tuple(servers))


async def test_servers_of_another_model_are_replaced_at_once(node: Node) -> None:
    """However long they linger, once no worker uses them."""
    small = node.plan(linger_s=3600.0, model="small")
    large = rename(small, "large")
    last: list[str] = []

    async def use_large() -> None:
        async with use_servers(large):
            last.append("large")

    async with use_servers(small):
        waiting = [asyncio.create_task(use_large()) for _ in range(3)]
        await until(lambda: any(local_lock_folder().glob("*.over")))
        async with use_servers(small):  # they are still those of its model
            last.append("small")
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
        async with use_servers(small):
            last.append("small")
    assert last == ["small", *["large"] * 3, "small"]
    assert [line["event"] for line in node.events() if line["event"] in ("start", "end")] == [
        *["start", "end"] * 2,
        "start",
    ]
    os.kill(node.events("begin")[-1]["pid"], signal.SIGTERM)
    await until(lambda: not is_served(node.files))


async def test_servers_of_another_model_that_the_job_runs_are_refused(node: Node) -> None:
    async with node.served(model="small"):
        await until(node.listed)
        async with use_servers(node.plan(model="small")), use_servers(node.plan()):
            pass
        with pytest.raises(RunStoppedError, match=r"serve 'small', and the run needs 'large'"):
            async with use_servers(rename(node.plan(), "large")):
                raise AssertionError
        async with use_servers(node.plan(model="adapter")):  # the same servers have it
            pass
    assert len(node.events("start")) == 1


async def test_a_wait_for_servers_of_another_model_ends_with_the_run(node: Node) -> None:
    small = node.plan(linger_s=0.1, model="small")
    async with use_servers(small):
        with pytest.raises(RunStoppedError, match="the run is over before the servers of 'small'"):
            async with use_servers(rename(small, "large"), lambda: "the run is over"):
                raise AssertionError
    await until(lambda: not is_served(node.files))


async def test_servers_that_a_worker_started_end_with_the_job(node: Node) -> None:
    """Once its last worker has left, nothing lingers."""
    async with AsyncExitStack() as worker:
        await worker.enter_async_context(use_servers(node.plan(linger_s=3600.0)))
        async with node.served() as orders:
            await until(lambda: any("standing by" in text for text in node.said))
            orders.stop.set()
            await until(lambda: any("end with the last worker" in text for text in node.said))
            assert node.listed()
            assert read_owner(node.files).endswith(f" pid {node.events('begin')[0]['pid']}")
            await worker.aclose()
    assert not is_served(node.files)
    assert not node.alive()
    assert len(node.events("begin")) == 1
    assert node.events("end")[-1]["why"] == "stopped"


async def test_what_was_given_up_is_not_started_again_and_again(node: Node) -> None:
    node.modes = ("fail",)
    loaded = settings(node)
    for _ in range(2):
        with pytest.raises(RunStoppedError) as error:
            async with node_endpoints(
                loaded.config, loaded.plain["endpoints"], "plain", False, never
            ):
                raise AssertionError
        assert "torch.OutOfMemoryError: no memory left" in error.value.message
    assert len(node.events("start")) == 1
    await until(lambda: not is_served(node.files))


@pytest.mark.parametrize("change", ["model", "command"])
async def test_what_was_given_up_does_not_stop_servers_of_another_kind(
    node: Node, change: str
) -> None:
    """The next stage with another model, or a session with a corrected command, starts its own."""
    node.modes = ("fail",)
    failed = node.plan(model="first")
    with pytest.raises(RunStoppedError, match="no memory left"):
        async with use_servers(failed):
            raise AssertionError
    node.modes = ()
    good = node.plan(model="second" if change == "model" else "first")
    async with use_servers(good):
        assert node.listed()
    await until(lambda: not is_served(node.files))
    with pytest.raises(RunStoppedError, match="no memory left"):  # it has not been corrected
        async with use_servers(failed):
            raise AssertionError
    await until(lambda: not is_served(node.files))


async def test_a_keeper_that_is_killed_is_followed_by_another(node: Node) -> None:
    plan = node.plan(linger_s=0.3)
    async with use_servers(plan):
        (begun,) = node.events("begin")
        os.kill(begun["pid"], signal.SIGKILL)
        await until(lambda: not is_served(node.files))
        async with use_servers(plan):
            assert len(node.events("begin")) == 2
            assert node.listed()
    await until(lambda: not is_served(node.files))
    await until(lambda: not node.alive())


async def test_with_aegis_nothing_is_started(node: Node) -> None:
    aegis = node.folder.parent / "aegis_endpoints.txt"
    aegis.write_text("node7:8000\nnode8:8000\n")
    loaded = settings(node, endpoints={"file": str(aegis)})
    async with node_endpoints(
        loaded.config, loaded.plain["endpoints"], "plain", False, never
    ) as up:
        assert [spec.url for spec in up.specs] == ["http://node7:8000"]
    assert not node.events()


async def test_a_folder_is_needed(node: Node) -> None:
    loaded = settings(node, endpoints={"urls": [f"http://127.0.0.1:{free_port()}"]})
    with pytest.raises(ConfigurationError, match=r"set backend\.registry"):
        async with node_endpoints(loaded.config, loaded.plain["endpoints"], "plain", False, never):
            raise AssertionError


async def test_a_simulated_server_makes_a_simulated_run(node: Node, tmp_path: Path) -> None:
    module = "fanfold.backends.simulated --nodes 1 --addressing port"
    serve = f"{sys.executable} -P -m {module} --port {{port}}"
    loaded = settings(node, serve, model={"name": "simulated-8b"})
    folder = (await prepare_run(loaded, tmp_path / "r")).folder
    assert folder.read_provenance()["simulated"] is True
    async with asyncio.timeout(60):
        async with node_endpoints(
            loaded.config, loaded.plain["endpoints"], "simulated-8b", True, never
        ):
            assert node.listed()
    await until(lambda: not is_served(node.files))


async def test_a_worker_waits_no_longer_than_its_run(node: Node) -> None:
    plan = node.plan(ready="/nowhere", linger_s=0.1)
    with pytest.raises(RunStoppedError, match="the run is over before the node's servers were"):
        async with use_servers(plan, lambda: "the run is over" if node.events("start") else None):
            raise AssertionError
    await until(lambda: not is_served(node.files))
    assert not node.alive()
