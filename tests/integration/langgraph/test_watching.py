"""Streaming a run never changes its results, whatever a server does with the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from langchain_core.callbacks import AsyncCallbackHandler
from langgraph.graph import START, MessagesState, StateGraph

from fanfold import build_graph

pytestmark = pytest.mark.integration

GOOD = '{"score": 0.5}'
SSE = "text/event-stream"


def completion(content: str | None = GOOD, finish: str | None = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def events(*documents: Any, done: bool = True) -> str:
    lines = "".join(f"data: {orjson.dumps(d).decode()}\n\n" for d in documents)
    return lines + ("data: [DONE]\n\n" if done else "")


ROLE = chunk({"role": "assistant", "content": ""})
PARTS = [chunk({"content": GOOD[:4]}), chunk({"content": GOOD[4:]})]
END = chunk({}, "stop")
USAGE = chunk({}) | {"choices": [], "usage": completion()["usage"]}
EMPTY = completion("")
THOUGHTS = ["Is it", " {gold}", "?"]

STREAMS: dict[str, tuple[str, str]] = {
    "as it should be": (events(ROLE, *PARTS, END, USAGE), SSE),
    "whole, as JSON": (orjson.dumps(completion()).decode(), "application/json"),
    "whole, on many lines": (
        orjson.dumps(completion(), option=orjson.OPT_INDENT_2).decode(),
        "application/json; charset=utf-8",
    ),
    "whole, called a stream": (orjson.dumps(completion()).decode(), SSE),
    "whole, called text": ("\n" + orjson.dumps(completion()).decode(), "text/plain"),
    "a stream called JSON": (events(ROLE, *PARTS, END, USAGE), "application/json"),
    "whole, in one event": (events(completion()), SSE),
    "a message at the end": (events(ROLE, *PARTS, completion()), SSE),
    "no end mark": (events(ROLE, *PARTS, END, USAGE, done=False), SSE),
    "no reason for the end": (events(ROLE, *PARTS), SSE),
    "no usage": (events(ROLE, *PARTS, END), SSE),
    "comments between": (": hello\n\n" + events(ROLE, *PARTS, END), SSE),
    "no space after data": (events(ROLE, *PARTS, END).replace("data: {", "data:{"), SSE),
    "signs of life": ("data:\n\ndata: ping\n\ndata: null\n\n" + events(ROLE, *PARTS, END), SSE),
    "names of events": (
        events(ROLE, *PARTS, END).replace("data: {", "event: message\nid: 1\nretry: 9\ndata: {"),
        SSE,
    ),
    "empty lines": (events(ROLE, *PARTS, END).replace("data: {", "id: 1\n\n\n\ndata: {"), SSE),
    "a mark before all": ("\ufeff" + events(ROLE, *PARTS, END), SSE),
    "whole, after a mark": ("\ufeff" + orjson.dumps(completion()).decode(), "application/json"),
    "no reason, end without space": (
        events(ROLE, *PARTS).replace("data: [DONE]", "data:[DONE]"),
        SSE,
    ),
    "reasoning apart": (
        events(ROLE, *[chunk({"reasoning_content": text}) for text in THOUGHTS], *PARTS, END),
        SSE,
    ),
    "reasoning under its new name": (
        events(ROLE, *[chunk({"reasoning": text}) for text in THOUGHTS], *PARTS, END),
        SSE,
    ),
    "reasoning in parts": (
        events(
            ROLE,
            *[chunk({"content": [{"type": "thinking", "thinking": text}]}) for text in THOUGHTS],
            *PARTS,
            END,
        ),
        SSE,
    ),
    "reasoning in the text": (
        events(ROLE, chunk({"content": "<think>"}), chunk({"content": "".join(THOUGHTS)})).replace(
            "data: [DONE]\n\n", ""
        )
        + events(chunk({"content": "</think>\n"}), *PARTS, END),
        SSE,
    ),
    "the end told twice": (events(ROLE, *PARTS, END, END, USAGE), SSE),
}


def used(usage: Any) -> tuple[str, str]:
    return events(ROLE, *PARTS, END, USAGE | {"usage": usage}), SSE


def odd(part: dict[str, Any]) -> tuple[str, str]:
    """Return a stream with one more event, which brings nothing."""
    return events(ROLE, PARTS[0], part, PARTS[1], END, USAGE), SSE


def choice(**values: Any) -> dict[str, Any]:
    return chunk({}) | {"choices": [{"index": 0, "delta": {}, "finish_reason": None} | values]}


COUNTS: dict[str, Any] = {
    "negative": {"prompt_tokens": -5, "completion_tokens": -1},
    "64 bits": {"prompt_tokens": 2**64 - 1, "completion_tokens": -1},
    "63 bits": {"prompt_tokens": 2**63, "completion_tokens": 2**63, "total_tokens": 2},
    "text": "x",
    "list": [1],
    "fraction": {"prompt_tokens": 1.5, "completion_tokens": 2},
    "true": {"prompt_tokens": True, "completion_tokens": "7"},
    "details": {"prompt_tokens_details": {"cached_tokens": -1}, "completion_tokens_details": [1]},
}
STREAMS |= {f"usage: {name}": used(usage) for name, usage in COUNTS.items()}
STREAMS |= {
    "odd: tool calls text": odd(chunk({"tool_calls": "x"})),
    "odd: tool calls number": odd(chunk({"tool_calls": [1]})),
    "odd: function text": odd(chunk({"tool_calls": [{"index": 0, "function": "f"}]})),
    "odd: function call": odd(chunk({"function_call": "f"})),
    "odd: choices text": odd(chunk({}) | {"choices": ["x"]}),
    "odd: choices object": odd(chunk({}) | {"choices": {"a": 1}}),
    "odd: choices null": odd(chunk({}) | {"choices": [None]}),
    "odd: delta text": odd(choice(delta="")),
    "odd: delta list": odd(choice(delta=[1])),
    "odd: role": odd(chunk({"role": ["assistant"]})),
    "odd: name and id": odd(chunk({"name": 5, "id": {}})),
    "odd: logprobs text": odd(choice(logprobs="x")),
    "odd: logprobs nested": odd(choice(logprobs={"content": 5})),
    "odd: tier": odd(chunk({}) | {"service_tier": ["default"]}),
    "odd: nested deep": (
        odd(chunk({}))[0].replace('"created":1', f'"y":{"[" * 999}{"]" * 999}'),
        SSE,
    ),
    "odd: half pair": (odd(chunk({}))[0].replace('"id":"c"', '"id":"\\ud83d"'), SSE),
    "odd: infinite": (odd(chunk({}))[0].replace('"created":1', '"created":-Infinity'), SSE),
}


class Server:
    """Answers a plain request well; a stream as it is told.

    Args:
        stream: Returns the body of a stream and its type.
        reason: The finish reason of plain answers.
        always: Whether plain requests get a stream too.

    Attributes:
        asked: Requests by the item's text and whether a stream was asked for.
    """

    def __init__(
        self,
        stream: Callable[[str, int], tuple[str, str]],
        reason: str | None = "stop",
        *,
        always: bool = False,
    ) -> None:
        self._stream, self._reason, self._always = stream, reason, always
        self.asked: Counter[tuple[str, bool]] = Counter()
        self.first: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        item, streamed = str(body["messages"][-1]["content"]), bool(body.get("stream"))
        self.asked[item, streamed] += 1
        self.first[item] += 1
        number = self.first[item]
        if item == "refused":
            return web.json_response({"error": {"message": "no"}}, status=400)
        if not streamed and not self._always:
            whole = EMPTY if "empty" in item and number == 1 else completion(finish=self._reason)
            if "cut" in item and number == 1:
                return await _cut(request, orjson.dumps(whole).decode()[:-5], "application/json")
            return web.json_response(whole)
        text, kind = self._stream(item, number)
        if "empty" in item and number == 1:
            text, kind = events(ROLE, END), SSE
        if "cut" in item and number == 1:
            return await _cut(request, events(ROLE, *PARTS[:1], done=False), SSE)
        return web.Response(text=text, headers={"Content-Type": kind})


async def _cut(request: web.Request, text: str, kind: str) -> web.StreamResponse:
    """Announce more than is sent, and close the connection."""
    headers = {"Content-Type": kind, "Content-Length": str(len(text) + 100)}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    await response.write(text.encode())
    assert request.transport is not None
    request.transport.close()
    return response


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", server.answer), web.get("/v1/models", models)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def graph_over(url: str, **task: Any) -> Any:
    return build_graph(
        {
            "name": "watched",
            "task": {
                "prompt": "{x}",
                "schema": {"type": "object", "required": ["score"]},
                **task,
            },
            "endpoints": {"urls": [url]},
            "limits": {"hedge": False, "streams": 4},
            "reduce": [{"op": "collect", "limit": 99}, {"op": "count"}],
        }
    )


async def invoked(graph: Any, items: Any) -> Any:
    return await graph.ainvoke(items)


async def with_callbacks(graph: Any, items: Any) -> Any:
    return await graph.ainvoke(items, {"callbacks": [AsyncCallbackHandler()]})


async def event_by_event(graph: Any, items: Any) -> Any:
    last: Any = None
    async for event in graph.astream_events(items, version="v2"):
        if event["event"] == "on_chain_end" and not event["parent_ids"]:
            last = event["data"]["output"]
    return last


def streamed(*modes: str) -> Callable[[Any, Any], Any]:
    async def watch(graph: Any, items: Any) -> Any:
        last: Any = None
        wanted = [*dict.fromkeys((*modes, "values"))]
        async for _, mode, part in graph.astream(items, stream_mode=wanted, subgraphs=True):
            if mode == "values" and "results" in part:
                last = part
        return last

    watch.__name__ = "+".join(modes)
    return watch


WATCHES = [
    with_callbacks,
    event_by_event,
    streamed("messages"),
    streamed("values", "updates", "custom", "debug"),
    streamed("messages", "debug"),
]


async def result(server: Server, watch: Any, items: list[str], **task: Any) -> Any:
    async with serving(server) as url:
        given = {"items": [{"x": item} for item in items]}
        state = await watch(graph_over(url, **task), given)
    collected, counts = state["aggregate"]
    return collected, counts


def ends(got: Any) -> tuple[int, int]:
    return got[1]["done"], got[1]["failed"]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


ITEMS = ["one", "two", "refused", "three"]
_plain: dict[str | None, Any] = {}


async def plain_result(reason: str | None = "stop") -> Any:
    """Return the result of a server that is asked for no stream, which is asked once."""
    if reason not in _plain:
        _plain[reason] = await result(Server(lambda *_: ("", SSE), reason), invoked, ITEMS)
    return _plain[reason]


@pytest.mark.parametrize("kind", list(STREAMS))
async def test_a_server_of_any_kind(kind: str) -> None:
    reason = None if kind.startswith("no reason") else "stop"
    plain = await plain_result(reason)
    assert ends(plain) == (3, 1)
    server = Server(lambda *_: STREAMS[kind], reason)
    assert await result(server, streamed("messages"), ITEMS) == plain
    assert server.asked["one", True] == 1
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("kind", list(STREAMS))
@pytest.mark.parametrize("watch", [invoked, streamed("messages")], ids=["plain", "streamed"])
async def test_a_server_that_always_streams(kind: str, watch: Any) -> None:
    wanted = await plain_result()
    server = Server(lambda *_: STREAMS[kind], always=True)
    async with serving(server) as url:
        state = await watch(graph_over(url), {"items": [{"x": item} for item in ITEMS]})
    assert tuple(state["aggregate"]) == wanted
    assert set(server.asked.values()) == {1}
    rows = pq.read_table(state["results"]["table"]).to_pylist()
    thoughts = "".join(THOUGHTS) if kind.startswith("reasoning") else None
    assert [row["reasoning"] for row in rows] == [thoughts, thoughts, None, thoughts]
    assert {row["prompt_tokens"] for row in rows} <= {3, None}


@pytest.mark.parametrize("watch", [invoked, streamed("messages")], ids=["plain", "streamed"])
async def test_a_stream_without_an_end_is_cut(watch: Any) -> None:
    server = Server(
        lambda _, number: (
            (events(ROLE, *PARTS[:1], done=False), SSE)
            if number == 1
            else STREAMS["as it should be"]
        ),
        always=True,
    )
    _, counts = await result(server, watch, ["one", "two"])
    assert (counts["done"], counts["failed"]) == (2, 0)
    assert server.first == {"one": 2, "two": 2}


@pytest.mark.parametrize(
    "broken", ['data: {"choices": [\n\n', f"data: {{{chr(34)}x{chr(34)}: {'[' * 5000}\n\n"]
)
@pytest.mark.parametrize("place", ["first", "later"])
async def test_an_event_that_cannot_be_read(broken: str, place: str) -> None:
    parts = [broken, events(ROLE, PARTS[0], done=False), events(PARTS[1], END)]
    if place == "later":
        parts[:2] = parts[1::-1]
    plain = await result(Server(lambda *_: ("", SSE)), invoked, ITEMS)
    server = Server(lambda *_: ("".join(parts), SSE))
    assert await result(server, streamed("messages"), ITEMS) == plain
    assert server.asked["one", True] == server.asked["one", False] == 1  # asked again as a whole


async def test_lines_of_events_are_named_as_what_they_are() -> None:
    lines = "".join(orjson.dumps(part).decode() + "\n" for part in (ROLE, *PARTS, END))
    last: Any = None
    async with serving(Server(lambda *_: (lines, "application/x-ndjson"))) as url:
        async for mode, part in graph_over(url).astream(
            {"items": [{"x": "one"}]}, stream_mode=["messages", "values"]
        ):
            last = part if mode == "values" else last
    (failed,) = Path(last["results"]["failures"]).read_bytes().splitlines()
    assert "the answer is not a JSON object: HTTP 200" in orjson.loads(failed)["error"]


@pytest.mark.parametrize("watch", WATCHES, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("kind", ["as it should be", "whole, as JSON"])
async def test_every_way_to_watch(kind: str, watch: Any) -> None:
    items = ["one", "refused", "cut", "empty"]
    plain_server = Server(lambda *_: STREAMS[kind])
    plain = await result(plain_server, invoked, items)
    assert ends(plain) == (3, 1)
    server = Server(lambda *_: STREAMS[kind])
    assert await result(server, watch, items) == plain
    assert server.first == plain_server.first


@pytest.mark.parametrize("graph", ["asking", "streaming"])
async def test_a_users_own_graph(graph: str) -> None:
    task = {"graph": f"{__name__}:{graph}"}
    items = ["one", "refused", "empty", "two"]
    for kind in ("as it should be", "whole, as JSON", "whole, in one event"):
        plain = await result(Server(lambda *_, kind=kind: STREAMS[kind]), invoked, items, **task)
        assert ends(plain) == (3, 1)
        for watch in (streamed("messages"), event_by_event):
            server = Server(lambda *_, kind=kind: STREAMS[kind])
            assert await result(server, watch, items, **task) == plain


def asking(model: Any) -> Any:
    return _graph(model.ainvoke)


def streaming(model: Any) -> Any:
    async def read(messages: Any) -> Any:
        whole: Any = None
        async for part in model.astream(messages):
            whole = part if whole is None else whole + part
        return whole

    return _graph(read)


class Asked(MessagesState):
    output: Any


def _graph(ask: Any) -> Any:
    async def node(state: Asked) -> dict[str, Any]:
        answer = await ask(state["messages"])
        return {"output": orjson.loads(str(answer.text))}

    return StateGraph(Asked).add_node("n", node).add_edge(START, "n").compile()
