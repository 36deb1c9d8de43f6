"""One command asks each endpoint once what it serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from fanfold import build_graph
from fanfold.nodes.state import RunInput
from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = pytest.mark.integration


@asynccontextmanager
async def serve(asked: Counter[str], name: str) -> AsyncIterator[str]:
    """Serve a model of one constant answer; count the requests by path."""

    async def models(_: web.Request) -> web.Response:
        asked[f"{name} models"] += 1
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(_: web.Request) -> web.Response:
        asked[f"{name} chat"] += 1
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "yes"},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        return web.json_response({"id": "1", "model": "m", "choices": [choice], "usage": usage})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def settings(urls: list[str]) -> dict[str, Any]:
    return {
        "name": "probes",
        "task": {"prompt": "Is {x} even?"},
        "endpoints": {"urls": urls},
        "limits": {"streams": 2},
    }


async def command(*arguments: str, folder: Path) -> None:
    done = await get_command_server().run(Command((*arguments, "--quiet"), cwd=str(folder)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [(), ("--pilot", "2", "--yes")], ids=["run", "pilot"])
async def test_a_command_probes_once_for_each_session(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    asked = Counter[str]()
    (tmp_path / "in.jsonl").write_text("".join(f'{{"x": {n}}}\n' for n in range(6)))
    async with serve(asked, "a") as first, serve(asked, "b") as second, serve(asked, "c") as third:
        config = settings([first, second]) | {"input": {"path": "in.jsonl"}}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        await command("run", "mine.yaml", "--out", "out", *options, folder=tmp_path)
        sessions = 2 if options else 1
        assert (asked["a models"], asked["b models"]) == (sessions, sessions)
        assert asked["a chat"] + asked["b chat"] == 6
        if not options:
            limited = ("--limit", "4", "--out", "less")
            await command("run", "mine.yaml", *limited, folder=tmp_path)
            asked.clear()
            await command("resume", "less", "--endpoints", third, folder=tmp_path)
            assert dict(asked) == {"c models": 1}  # the check; no item is open


async def test_an_invocation_probes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Counter[str]()
    async with serve(asked, "a") as url:
        graph = build_graph(settings([url]))
        given: RunInput = {"items": [{"x": n} for n in range(6)]}
        final = await graph.ainvoke(given)
    assert final["progress"]["done"] == 6
    assert dict(asked) == {"a models": 1, "a chat": 6}
