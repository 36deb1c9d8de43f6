"""Odd values from a server, a model or a user's graph affect only their own item."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from rich.console import Console

from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.run_folder import RunFolder, open_folder
from fanfold.configs.loader import load_config
from fanfold.graphs.cli.export import export_results
from fanfold.graphs.run.prepare import prepare_run, resume_run
from fanfold.graphs.run.run_result import RunResult
from fanfold.graphs.session import RunOptions, execute_run

pytestmark = pytest.mark.integration

Change = Callable[[dict[str, Any]], Any]


def completion(content: Any = '{"x": 1}') -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
    }


def content(value: Any) -> Change:
    return lambda answer: answer["choices"][0]["message"].update(content=value)


def message(**values: Any) -> Change:
    return lambda answer: answer["choices"][0]["message"].update(values)


def choice(**values: Any) -> Change:
    return lambda answer: answer["choices"][0].update(values)


def top(**values: Any) -> Change:
    return lambda answer: answer.update(values)


def usage(**values: Any) -> Change:
    return lambda answer: answer["usage"].update(values)


def deep(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


def deep_object(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


DONE, BAD = None, "InvalidAnswerError"
UNKNOWN = {"prompt_tokens": None, "completion_tokens": 5}

CASES: dict[str, tuple[Change, str | None, dict[str, Any]]] = {
    "plain": (top(), DONE, {"prompt_tokens": 11, "completion_tokens": 5}),
    "200 arrays": (content(deep(200)), DONE, {}),
    "201 arrays": (content(deep(201)), BAD, {}),
    "253 arrays": (content(deep(253)), BAD, {"prompt_tokens": 22}),  # sent back once
    "300 objects": (content(deep_object(300)), BAD, {"prompt_tokens": 22}),
    "2000 arrays": (content(deep(2000)), BAD, {}),
    "text with brackets": (content('"' + "[" * 300 + '"'), DONE, {"output": "[" * 300}),
    "largest integer": (content("18446744073709551615"), DONE, {"output": 2**64 - 1}),
    "larger integer": (content("1" + "0" * 30), DONE, {"output": 1e30}),
    "10 MB": (content(f'"{"x" * 10_000_000}"'), DONE, {}),
    "parts": (content([{"type": "text", "text": '{"x": 2}'}]), DONE, {"output": {"x": 2}}),
    "object": (content({"x": 3}), DONE, {"output": {"x": 3}}),
    "number": (content(7), DONE, {"output": 7}),
    "content nested": (content(nested(240)), BAD, {}),
    "model object": (top(model={"id": 5}), DONE, {"model": None, "prompt_tokens": 11}),
    "model list": (top(model=["m"]), DONE, {"model": None}),
    "model number": (top(model=5), DONE, {"model": None}),
    "model nested": (top(model=nested(240)), DONE, {"model": None}),
    "id object": (top(id={"a": 1}, system_fingerprint=[1]), DONE, {}),
    "usage list": (top(usage=[1, 2]), DONE, dict.fromkeys(UNKNOWN)),
    "usage text": (top(usage="many"), DONE, dict.fromkeys(UNKNOWN)),
    "usage huge": (usage(prompt_tokens=2**64 - 1), DONE, UNKNOWN),
    "usage 63 bits": (usage(prompt_tokens=2**63), DONE, UNKNOWN),
    "usage negative": (usage(prompt_tokens=-5), DONE, UNKNOWN),
    "usage fraction": (usage(prompt_tokens=1.5), DONE, UNKNOWN),
    "usage words": (usage(prompt_tokens="7"), DONE, UNKNOWN),
    "usage true": (usage(prompt_tokens=True), DONE, UNKNOWN),
    "usage nested": (usage(prompt_tokens=nested(240)), DONE, UNKNOWN),
    "details": (usage(prompt_tokens_details="x"), DONE, {"cached_tokens": None}),
    "cached": (usage(prompt_tokens_details={"cached_tokens": -1}), DONE, {"cached_tokens": None}),
    "reason object": (choice(finish_reason={"a": 1}), DONE, {"prompt_tokens": 11}),
    "reason list": (choice(finish_reason=[]), DONE, {}),
    "refusal nested": (message(refusal=nested(240)), "RefusedAnswerError", {}),
    "refusal object": (message(refusal={"why": "no"}), "RefusedAnswerError", {}),
    "tool calls": (message(tool_calls=nested(240)), DONE, {}),
    "logprobs": (choice(logprobs=[1]), DONE, {}),
    "logprobs text": (choice(logprobs="x"), DONE, {}),
    "second choice": (lambda a: a["choices"].append("odd"), DONE, {}),
    "second null": (lambda a: a["choices"].append(None), DONE, {}),
    "second empty": (lambda a: a["choices"].append({"index": 1}), DONE, {}),
    "first null": (lambda a: a["choices"].insert(0, None), DONE, {"prompt_tokens": 11}),
    "tool calls text": (message(tool_calls="x"), DONE, {}),
    "tool calls number": (message(tool_calls=[1]), DONE, {}),
    "tool calls function": (message(tool_calls=[{"function": {"name": 5}}]), DONE, {}),
    "function call": (message(function_call="f"), DONE, {}),
    "audio": (message(audio=[1], name=5, id=[]), DONE, {}),
    "role": (message(role=["a"]), DONE, {}),
    "tier": (top(service_tier=["default"]), DONE, {}),
    "300 levels": (top(x=nested(240)), DONE, {"prompt_tokens": 11}),
}

ONCE = {"requests": 1, "prompt_tokens": 11, "completion_tokens": 5}
RAW: dict[str, tuple[Callable[[bytes], bytes], str | None, dict[str, Any]]] = {
    "raw half pair": (lambda b: b.replace(b'"m"', b'"\\ud83d"'), DONE, ONCE | {"model": "?"}),
    "raw half key": (lambda b: b.replace(b'"created"', b'"\\ud83d"'), DONE, ONCE),
    "raw mark": (lambda b: b"\xef\xbb\xbf" + b, DONE, ONCE | {"model": "m"}),
    "raw infinite": (lambda b: b.replace(b'"created":1', b'"created":-Infinity'), DONE, ONCE),
    "raw no number": (
        lambda b: b.replace(b'"prompt_tokens":11', b'"prompt_tokens":NaN'),
        DONE,
        ONCE | {"prompt_tokens": None},
    ),
    "raw digits": (
        lambda b: b.replace(b'"created":1', b'"created":NaN,"x":' + b"9" * 5000),
        DONE,
        ONCE,
    ),
    "raw utf-16": (lambda b: b.decode().encode("utf-16"), DONE, ONCE),
    "raw latin-1": (lambda b: b.replace(b'"m"', b'"\xe9"'), DONE, ONCE),
    "raw 999 levels": (
        lambda b: b.replace(b'"created":1', b'"y":' + deep(999).encode()),
        DONE,
        ONCE,
    ),
    "raw 5000 levels": (
        lambda b: b.replace(b'"created":1', b'"y":' + deep(5000).encode()),
        "EndpointReplyError",
        {"requests": 1},
    ),
}
"""Changes of the answer's bytes."""
CASES |= {name: (top(), error, expected) for name, (_, error, expected) in RAW.items()}


@asynccontextmanager
async def served(cases: dict[str, Change], asked: list[str]) -> AsyncIterator[str]:
    """Serve each case to the items that name it."""

    async def chat(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        name = body["messages"][0]["content"].removeprefix("case ")
        asked.append(name)
        answer = completion()
        cases.get(name, top())(answer)
        data = orjson.dumps(answer)
        if name in RAW:
            data = RAW[name][0](data)
        return web.Response(body=data, content_type="application/json")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def settings(url: str, names: list[str], home: Path, **changes: Any) -> dict[str, Any]:
    path = home / "cases.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name"])
        writer.writerows([name, name] for name in names)
    return {
        "input": {"path": str(path), "id": "id"},
        "task": {"prompt": "case {name}", "schema": {"properties": {"x": {}}}},
        "model": {"price": {"prompt": 1.0, "completion": 2.0}},
        "endpoints": {"urls": [url]},
        "shard": {"items": 10},
        "reduce": [
            {"op": "collect", "limit": 100},
            {"op": "top_k", "field": "x", "k": 100},
            {"op": "histogram", "field": "x"},
            {"op": "stats", "field": "x"},
            {"op": "count"},
        ],
    } | changes


async def lived(folder: RunFolder) -> RunResult:
    run = await resume_run(folder, None)
    return await execute_run(run, RunOptions(quiet=True), Console(quiet=True))


def read(folder: RunFolder, items: int) -> dict[str, dict[str, Any]]:
    about = folder.read_provenance()
    with Journal(folder.journal, about["run"], items) as ledger:
        return {record["id"]: record for record in ledger.read_records()}


@pytest.mark.parametrize(
    "backend",
    [
        {},
        {"kind": "local", "processes": 2},
        {"kind": "local", "processes": 2, "shared_folder": False},
    ],
    ids=["here", "processes", "records sent home"],
)
async def test_an_odd_answer_is_its_items_matter(tmp_path: Path, backend: dict[str, Any]) -> None:
    asked, names = list[str](), list(CASES)
    changes = {name: case[0] for name, case in CASES.items()}
    async with served(changes, asked) as url:
        config = settings(url, names, tmp_path, **({"backend": backend} if backend else {}))
        folder = (await prepare_run(load_config(config), tmp_path / "run")).folder
        first = await lived(folder)
        count = len(asked)
        again = await lived(open_folder(folder.path))
        assert len(asked) == count
    records = read(folder, len(names))
    too_long = {"10 MB"} if backend.get("shared_folder") is False else set()
    for name, (_, error, expected) in CASES.items():
        record = records[name]
        assert record["error_class"] == (BAD if name in too_long else error), (
            name,
            record["error"],
        )
        assert {key: record[key] for key in expected} == expected, name
        assert record["requests"] >= 1
        assert record["nano_usd"] >= 0
    assert first.exit_code == again.exit_code == 3
    assert first.progress == again.progress
    assert orjson.dumps(first.aggregate) == orjson.dumps(again.aggregate)
    table = pq.read_table(folder.results).to_pylist()
    assert [row["id"] for row in table] == names
    for form in ("jsonl", "csv", "parquet"):
        export_results(folder.path, form, tmp_path / f"out.{form}")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert [orjson.loads(line)["error_class"] for line in lines] == [
        records[name]["error_class"] for name in names
    ]
    csv.field_size_limit(20_000_000)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row["id"] for row in rows] == names


GRAPH = """
import asyncio, dataclasses, datetime, decimal, enum, uuid
from langchain_core.runnables import RunnableLambda

class Odd:
    pass

class Colour(enum.Enum):
    RED = "red"

@dataclasses.dataclass
class Data:
    x: float

def nested(levels):
    found = 1
    for _ in range(levels):
        found = [found]
    return found

looped = []
looped.append(looped)

OUTPUTS = {
    "plain": {"x": 1},
    "tuple": (1, 2),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "enum": Colour.RED,
    "data": Data(1.5),
    "bytes": b"abc",
    "set": {1, 2},
    "object": Odd(),
    "decimal": decimal.Decimal("1.5"),
    "nan": {"x": float("nan")},
    "infinity": [1, (float("inf"),)],
    "data nan": Data(float("nan")),
    "huge": 2**70,
    "surrogate": "half \\ud800",
    "surrogate key": {"\\ud800": 1},
    "keys": {1: "a"},
    "nested": nested(253),
    "deep": nested(5000),
    "looped": looped,
    "null": {"x": None},
}

def graph(model):
    async def answer(given):
        name = given["name"]
        await model.ainvoke(given["messages"])
        if name == "error":
            raise ValueError("half \\ud800")
        return {"output": OUTPUTS[name]}
    return RunnableLambda(answer)
"""

GRAPH_CASES: dict[str, tuple[str | None, Any]] = {
    "plain": (DONE, {"x": 1}),
    "tuple": (DONE, [1, 2]),
    "date": (DONE, "2026-01-02T00:00:00+00:00"),
    "enum": (DONE, "red"),
    "data": (DONE, {"x": 1.5}),
    **dict.fromkeys(
        (
            "bytes",
            "set",
            "object",
            "decimal",
            "nan",
            "infinity",
            "data nan",
            "huge",
            "surrogate",
            "surrogate key",
            "keys",
            "nested",
            "deep",
            "looped",
        ),
        (BAD, None),
    ),
    "null": (DONE, {"x": None}),
    "error": ("ValueError", None),
}


@pytest.mark.parametrize("processes", [1, 2])
async def test_what_a_graph_puts_out_is_its_items_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    (tmp_path / f"odd_graph_{processes}.py").write_text(GRAPH)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked, names = list[str](), list(GRAPH_CASES)
    async with served({}, asked) as url:
        config = settings(url, names, tmp_path)
        config["task"] = {"prompt": "case {name}", "graph": f"odd_graph_{processes}:graph"}
        config["backend"] = {"kind": "local", "processes": processes}
        config["reduce"] = [{"op": "collect", "limit": 100}, {"op": "count"}]
        folder = (await prepare_run(load_config(config), tmp_path / "run")).folder
        first = await lived(folder)
        assert sorted(asked) == sorted(names)
        again = await lived(open_folder(folder.path))
        assert sorted(asked) == sorted(names)
    assert f"odd_graph_{processes}" in sys.modules
    records = read(folder, len(names))
    for name, (error, output) in GRAPH_CASES.items():
        record = records[name]
        assert (record["error_class"], record["output"]) == (error, output), (name, record)
        assert (record["requests"], record["prompt_tokens"]) == (1, 11), name
    assert first.progress == again.progress
    assert orjson.dumps(first.aggregate) == orjson.dumps(again.aggregate)
