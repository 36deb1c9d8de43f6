"""Runs over served nodes while servers die and nodes leave: each item ends once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fanfold.backends.cluster.utilization import read_job_servers
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.session import RunOptions, execute_run

from .conftest import Node, free_port, until

pytestmark = pytest.mark.integration

ITEMS = 300


def settings(folder: Path, **endpoints: Any) -> LoadedConfig:
    source = folder.parent / "in.csv"
    source.write_text("id,text\n" + "".join(f"{n},t{n}\n" for n in range(ITEMS)))
    return load_config(
        {
            "name": "t",
            "input": {"path": str(source), "id": "id"},
            "task": {"prompt": "Say {text}"},
            "endpoints": {"file": str(folder), "refresh_s": 0.05} | endpoints,
            "limits": {"streams": 4, "hedge": False},
        }
    )


def finished(folder: Path) -> int:
    return sum(f.read_text().count('"status"') for f in folder.glob("journal/*.jsonl"))


async def test_servers_die_and_a_node_leaves(node: Node, tmp_path: Path) -> None:
    node.ports = [free_port(), free_port()]
    other = Node(node.folder, "node8")
    loaded = settings(node.folder, least=3, wait_s=60)
    async with node.served(), other.served() as leaving:
        run = await prepare_run(loaded, tmp_path / "r")
        folder = run.folder
        console, options = Console(quiet=True), RunOptions(quiet=True)
        life = asyncio.create_task(execute_run(run, options, console))
        await until(lambda: finished(folder.path) >= 20)
        os.kill(node.pids()[0], signal.SIGKILL)
        await until(lambda: len(node.events("ready")) == 3)
        leaving.stop.set()
        await until(lambda: not other.alive())
        result = await asyncio.wait_for(life, 60)
    assert (result.exit_code, result.progress["done"], result.progress["failed"]) == (0, ITEMS, 0)
    assert finished(folder.path) == ITEMS
    (found,) = read_job_servers(node.folder, [(0.0, time.time())])
    assert {"up", "down"} <= {i.state for own in found.intervals.values() for i in own}
