"""``langgraph dev`` serves both graphs, and a run with pasted items ends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

pytestmark = pytest.mark.integration
ROOT = Path(str(files("fanfold")))
START_S = 60


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[str]:
    """A development server on a free port, with its files in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = json.loads((ROOT / "langgraph.json").read_text()) | {"dependencies": [str(ROOT)]}
    (tmp_path / "langgraph.json").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("langgraph")), "dev", "--no-browser"]
    options = ["--no-reload", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"LANGGRAPH_DISABLE_FILE_PERSISTENCE": "true"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command + options, cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        await _until_ready(url, process, tmp_path / "log")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


async def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(START_S * 5):
            assert process.poll() is None, log.read_text()
            try:
                async with session.get(f"{url}/ok") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass  # not listening yet
            await asyncio.sleep(0.2)
    pytest.fail(f"langgraph dev did not start in {START_S} s:\n{log.read_text()}")


async def call(session: aiohttp.ClientSession, path: str, body: Any = None) -> Any:
    method = session.get if body is None else session.post
    async with method(path, **({} if body is None else {"json": body})) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def test_both_graphs_are_served_and_run(server: str, tmp_path: Path) -> None:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(server, timeout=timeout) as session:
        found = await call(session, "/assistants/search", {"limit": 10})
        ids = {a["graph_id"]: a["assistant_id"] for a in found}
        assert set(ids) == {"map_reduce", "item"}

        drawn = await call(session, f"/assistants/{ids['map_reduce']}/graph?xray=true")
        names = {node["id"] for node in drawn["nodes"]}
        assert {"load", "dispatch", "gather", "reduce", "shard:infer"} <= names

        schemas = await call(session, f"/assistants/{ids['map_reduce']}/schemas")
        assert {"path", "items"} <= schemas["input_schema"]["properties"].keys()
        assert "overrides" in schemas["context_schema"]["properties"]

        items = [{"id": "aspirin", "smiles": "CC(=O)Oc1ccccc1C(=O)O"}, {"smiles": "c1ccccc1"}]
        items[1]["id"] = "benzene"
        run = {"assistant_id": ids["map_reduce"], "input": {"items": items}}
        end = await call(session, "/runs/wait", run)
        assert end["progress"]["done"] == 2, (tmp_path / "log").read_text()
        assert end["results"]["simulated"] is True
        assert {row["id"] for row in end["aggregate"][0]["rows"]} == {"aspirin", "benzene"}

        one = {"id": "aspirin", "row": {"smiles": "CC(=O)Oc1ccccc1C(=O)O"}}
        end = await call(session, "/runs/wait", {"assistant_id": ids["item"], "input": one})
        assert end["output"]["solubility_class"] in {"poor", "moderate", "good"}
