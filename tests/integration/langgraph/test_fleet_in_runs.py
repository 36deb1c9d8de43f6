"""Whole runs: refused items, nested calls and budgets, here and in worker processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from fanfold import build_graph
from fanfold.backends.core.errors import BudgetExhaustedError, RunStoppedError

pytestmark = pytest.mark.integration

THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}
GOOD = '{"score": 0.5}'


class Server:
    """Refuses items that are called bad, and streams what is asked for as a stream."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.out = False

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        item = str(body["messages"][-1]["content"])
        self.asked[item] += 1
        if self.out or item.startswith("bad"):
            return web.json_response({"error": {"message": "flagged"}}, status=403)
        await asyncio.sleep(0.002)
        if body.get("stream"):
            chunks = [_chunk(GOOD[:5]), _chunk(GOOD[5:]), _chunk("", "stop")]
            text = "".join(f"data: {orjson.dumps(c).decode()}\n\n" for c in chunks)
            return web.Response(text=text + "data: [DONE]\n\n", content_type="text/event-stream")
        message = {"role": "assistant", "content": GOOD}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "model": "m", "created": 1}
            | {"choices": [choice], "usage": usage}
        )


def _chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return head | {"choices": [choice]}


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", server.answer), web.get("/v1/models", models)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def settings(url: str, **more: Any) -> dict[str, Any]:
    task = {"prompt": "{x}", "schema": {"type": "object", "required": ["score"]}}
    return {
        "name": "test",
        "task": task | more.pop("task", {}),
        "endpoints": {"urls": [url]},
        "limits": {"hedge": False, "streams": 4} | more.pop("limits", {}),
        "shard": {"items": 20},
        "reduce": [{"op": "count"}],
        **more,
    }


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
async def test_refused_items_fail_and_the_run_ends(processes: int) -> None:
    server = Server()
    items = [{"x": f"{'bad' if n % 20 == 3 else 'ok'} {n}"} for n in range(80)]
    async with serving(server) as url:
        graph = build_graph(settings(url, backend={"kind": "local", "processes": processes}))
        state = await graph.ainvoke({"items": items})
    (count,) = state["aggregate"]
    assert (count["done"], count["failed"]) == (76, 4)
    assert count["failed_by_class"] == {"RequestRefusedError": 4}
    assert set(server.asked.values()) == {1}


async def test_an_outage_stops_the_run_and_resuming_asks_what_is_left() -> None:
    server = Server()
    items = [{"x": f"ok {n}"} for n in range(300)]
    async with serving(server) as url:
        graph = build_graph(settings(url, limits={"streams": 2}), checkpointer=InMemorySaver())

        async def break_down() -> None:
            while len(server.asked) < 50:  # noqa: ASYNC110 - the server has no event
                await asyncio.sleep(0.001)
            server.out = True

        outage = asyncio.create_task(break_down())
        with pytest.raises(RunStoppedError, match="look like an outage"):
            await graph.ainvoke({"items": items}, THREAD)
        await outage
        assert len(server.asked) < 80
        server.out = False
        state = await graph.ainvoke(None, THREAD)
    (count,) = state["aggregate"]
    assert count["failed"] <= 10
    assert count["done"] + count["failed"] == 300
    assert max(server.asked.values()) <= 2


def nested(model: Any) -> Any:
    """Return a graph that asks again while its stream is open."""

    async def node(state: Asked) -> dict[str, Any]:
        text, inner = "", ""
        async for part in model.astream(state["messages"]):
            text += str(part.text)
            if not inner:
                inner = str((await model.ainvoke(f"inner of {state['messages'][-1].text}")).text)
        return {"output": orjson.loads(text)}

    return StateGraph(Asked).add_node("n", node).add_edge(START, "n").compile()


class Asked(MessagesState):
    output: Any


@pytest.mark.parametrize("streams", [1, 4])
async def test_nested_calls_of_a_users_graph_end(streams: int) -> None:
    server = Server()
    items = [{"x": f"ok {n}"} for n in range(8)]
    async with asyncio.timeout(30), serving(server) as url:
        task = {"graph": f"{__name__}:nested"}
        limits = {"streams": streams, "endpoint_streams": 1}
        graph = build_graph(settings(url, task=task, limits=limits))
        state = await graph.ainvoke({"items": items})
    assert state["aggregate"][0]["done"] == 8
    assert len(server.asked) == 16


@pytest.mark.parametrize("streams", [1, 4])
async def test_a_budget_of_one_request_per_item_stops_the_run(streams: int) -> None:
    server = Server()
    items = [{"x": f"ok {n}"} for n in range(4)]
    async with asyncio.timeout(30), serving(server) as url:
        task = {"graph": f"{__name__}:nested", "repairs": 0}
        graph = build_graph(
            settings(
                url,
                task=task,
                limits={"streams": streams},
                budget={"requests": 4, "on_limit": "stop"},
            )
        )
        with pytest.raises(BudgetExhaustedError):
            await graph.ainvoke({"items": items})
    assert sum(server.asked.values()) <= 4
