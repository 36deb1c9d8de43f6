"""Servers as they are met in practice: what a run makes of each way to answer."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from rich.console import Console

from fanfold.backends.core.errors import EXIT_INTERRUPTED, ConfigurationError, NoEndpointError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.run_folder import RunFolder, open_folder
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run, resume_run
from fanfold.graphs.session import RunOptions, execute_run

pytestmark = pytest.mark.integration

GOOD = '{"score": 0.5, "why": "ok"}'
ITEMS = ("apple", "banana", "cherry POISON", "date")
SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number"}, "why": {"type": "string"}},
}
Body = dict[str, Any]
Behaviour = Callable[[Body], web.Response]


def completion(content: Any = GOOD, finish: Any = "stop", **message: Any) -> Body:
    said = {"role": "assistant", "content": content, **message}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": said, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def reply(content: Any = GOOD, finish: Any = "stop", **message: Any) -> Behaviour:
    return lambda _: web.json_response(completion(content, finish, **message))


def raw(old: str, new: str) -> Behaviour:
    """Return a good answer in whose bytes a text is replaced."""
    data = orjson.dumps(completion()).decode()
    assert old in data
    body = data.replace(old, new).encode()
    return lambda _: web.Response(body=body, content_type="application/json")


def is_poison(body: Body) -> bool:
    return "POISON" in str(body["messages"])


@dataclass
class Server:
    """A server with one behaviour per base URL."""

    behaviours: dict[str, Behaviour]
    url: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    bodies: list[Body] = field(default_factory=list)
    unlisted: dict[str, int] = field(default_factory=dict)

    def address(self, name: str) -> str:
        return f"{self.url}/b/{name.replace(' ', '-')}/v1"

    async def chat(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "").replace("-", " ")
        body = orjson.loads(await request.read())
        self.calls[name] += 1
        self.bodies.append(body)
        return self.behaviours[name](body)

    async def models(self, request: web.Request) -> web.Response:
        if status := self.unlisted.get(request.match_info.get("name", "")):
            return web.json_response({"detail": "Not Found"}, status=status)
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Server]:
        app = web.Application()
        app.router.add_post("/b/{name}/v1/chat/completions", self.chat)
        app.router.add_get("/b/{name}/v1/models", self.models)
        app.router.add_post("/v1beta/openai/chat/completions", self.chat)
        app.router.add_get("/v1beta/openai/models", self.models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


def settings(url: str, home: Path, **sections: Any) -> dict[str, Any]:
    path = home / "items.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([item] for item in ITEMS)])
    config: dict[str, Any] = {
        "input": {"path": str(path)},
        "task": {"prompt": "Rate {text}", "schema": SCHEMA},
        "model": {"name": "m"},
        "endpoints": {"urls": [url]},
        "limits": {"fleet_wait_s": 5},
    }
    return {name: config.get(name, {}) | sections.get(name, {}) for name in config | sections}


async def run_items(config: dict[str, Any], home: Path) -> tuple[RunFolder, list[dict[str, Any]]]:
    """Run to the end; return the folder and the journal's records."""
    folder = (await prepare_run(load_config(config), home / "run")).folder
    run = await resume_run(folder, None)
    await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
    with Journal(folder.journal, folder.read_provenance()["run"], len(ITEMS)) as journal:
        return folder, list(journal.read_records())


def stream(*deltas: Any, end: bytes = b"data: [DONE]\n\n") -> Behaviour:
    """Return a server that streams without being asked to."""
    events = [
        {"id": "c", "model": "m", "choices": [{"index": 0, **choice}]}
        for choice in [*({"delta": delta} for delta in deltas), {"finish_reason": "stop"}]
    ]
    events.append({"choices": [], "usage": completion()["usage"]})
    body = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + end
    return lambda _: web.Response(body=body, content_type="text/event-stream")


THOUGHT = "Let me see {a: 1}."
KEPT: dict[str, Behaviour] = {
    "plain": reply(),
    "reasoning apart": reply(reasoning_content=f"\n{THOUGHT}\n"),
    "reasoning under its new name": reply(reasoning=THOUGHT),
    "reasoning under both names": reply(reasoning=THOUGHT, reasoning_content=THOUGHT),
    "reasoning apart and in the text": reply(
        f"<think>{THOUGHT}</think>{GOOD}", reasoning_content=THOUGHT
    ),
    "reasoning that is blank": reply(f"<think>{THOUGHT}</think>{GOOD}", reasoning_content=" "),
    "reasoning as a part": reply(
        [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": GOOD}]
    ),
    "reasoning as a part of parts": reply(
        [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"text": GOOD}]
    ),
    "reasoning as a part with a summary": reply(
        [{"type": "reasoning", "summary": [{"text": THOUGHT}]}, {"type": "text", "text": GOOD}]
    ),
    "reasoning as a marked part": reply([{"thought": True, "text": THOUGHT}, {"text": GOOD}]),
    "a stream": stream({"role": "assistant"}, {"content": GOOD[:9]}, {"content": GOOD[9:]}),
    "a stream without its last line": stream({"content": GOOD}, end=b""),
    "reasoning in a stream": stream(
        {"reasoning_content": THOUGHT[:5]}, {"reasoning_content": THOUGHT[5:]}, {"content": GOOD}
    ),
    "an object as reasoning": reply(reasoning={"effort": "low"}),
    "reasoning": reply(f"<think>\nLet me see {{a: 1}}.\n</think>\n\n{GOOD}"),
    "reasoning without its beginning": reply(f"Let me see {{a: 1}}.\n</think>\n\n{GOOD}"),
    "text around a fence": reply(f"Here is the JSON:\n```json\n{GOOD}\n```\nHope that helps!"),
    "fence on one line": reply(f"```json {GOOD} ```"),
    "fence in capitals": reply(f"```JSON\n{GOOD}\n```"),
    "parts": reply([{"type": "text", "text": GOOD}]),
    "parts that split the text": reply([{"text": GOOD[:5]}, {"text": GOOD[5:]}]),
    "parts with a hidden thought": reply([{"type": "redacted_thinking", "data": "x"}, GOOD]),
    "parts of an odd type": reply([{"type": ["x"], "text": GOOD}, {"type": {}, "x": 1}]),
    "other name of the end": reply(finish="eos_token"),
    "end in capitals": reply(finish="STOP"),
    "end as a list": reply(finish=["stop"]),
    "end as a number": reply(finish=0),
    "no end": raw(',"finish_reason":"stop"', ""),
    "end null": reply(finish=None),
    "control characters": reply('{"score": 0.5, "why": "ok\n\t"}'),
    "byte order mark": reply(f"\ufeff{GOOD}"),
    "half a pair": reply('{"score": 0.5, "why": "\\ud83d"}'),
    "infinity outside": raw('"logprobs":null', '"logprobs":{"content":[{"logprob":-Infinity}]}'),
    "half a pair outside": raw('"role"', '"x":"\\ud83d","role"'),
    "model is an object": raw('"model":"m"', '"model":{"id":5}'),
    "64 bits": raw('"prompt_tokens":11', f'"prompt_tokens":{2**64 - 1}'),
    "negative": raw('"prompt_tokens":11', '"prompt_tokens":-1'),
    "stream by default": lambda body: (
        web.Response(text="data: [DONE]\n\n", content_type="text/event-stream")
        if body.get("stream", True)
        else web.json_response(completion())
    ),
    "long header": lambda _: web.json_response(
        completion(), headers={"Content-Security-Policy": "x" * 60_000}
    ),
    "tool call without an object": reply(
        tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]
    ),
}


@pytest.mark.parametrize("name", KEPT)
async def test_good_answers_are_kept_and_paid_once(tmp_path: Path, name: str) -> None:
    async with Server(KEPT).open() as server:
        config = settings(server.address(name), tmp_path)
        folder, records = await run_items(config, tmp_path)
    assert server.calls[name] == len(ITEMS)
    assert [(r["status"], r["repairs"], r["output"]["score"]) for r in records] == [
        ("done", 0, 0.5)
    ] * len(ITEMS)
    wanted = THOUGHT if name.startswith("reasoning") else None
    assert [record.get("reasoning") for record in records] == [wanted] * len(ITEMS)
    assert pq.read_table(folder.results)["reasoning"].to_pylist() == [wanted] * len(ITEMS)


async def test_free_text_is_stored_without_its_reasoning(tmp_path: Path) -> None:
    text = "<think>" + "x" * 20_000 + "</think>\nyes"
    async with Server({"text": reply(text, "end_turn")}).open() as server:
        config = settings(server.address("text"), tmp_path, task={"schema": None})
        _, records = await run_items(config, tmp_path)
    for record in records:
        assert (record["status"], record["output"]) == ("done", "yes")
        assert record["reasoning"].startswith("xxx")
        assert len(record["reasoning"].encode()) == 16_000
        assert record["reasoning_bytes"] == 20_000


INVALID: dict[str, tuple[Behaviour, str]] = {
    "deep": (reply('{"score": 0.5, "d": ' + "[" * 252 + "]" * 252 + "}"), "InvalidAnswerError"),
    "deeper": (reply('{"score": 0.5, "d": ' + "[" * 900 + "]" * 900 + "}"), "InvalidAnswerError"),
    "deepest": (reply("[" * 50_000), "InvalidAnswerError"),
    "reasoning alone": (reply("<think>so\n</think>\n"), "EmptyAnswerError"),
    "reasoning apart alone": (reply("", reasoning_content="so"), "EmptyAnswerError"),
    "thoughts alone": (reply([{"type": "thinking", "thinking": "so"}]), "EmptyAnswerError"),
    "no parts": (reply([]), "EmptyAnswerError"),
    "cut under another name": (reply(GOOD, "MAX_TOKENS"), "TruncatedAnswerError"),
    "withheld under another name": (reply(GOOD, "SAFETY"), "RefusedAnswerError"),
}


@pytest.mark.parametrize("name", INVALID)
async def test_no_exception_of_python_is_an_error_of_an_item(tmp_path: Path, name: str) -> None:
    behaviour, error = INVALID[name]
    async with Server({name: behaviour}).open() as server:
        config = settings(server.address(name), tmp_path)
        _, records = await run_items(config, tmp_path)
    assert [record["error_class"] for record in records] == [error] * len(ITEMS)


@pytest.mark.parametrize(
    ("behaviour", "reasoning"),
    [
        (reply("", "length", reasoning_content="so"), "so"),
        (reply(None, "length", reasoning="so"), "so"),
        (reply([{"type": "thinking", "thinking": "so"}], "length"), "so"),
        (reply("<think>so", "length"), None),
        (reply("<think>so</think>", "length"), "so"),
    ],
)
async def test_an_answer_that_is_cut_in_its_reasoning_says_so(
    tmp_path: Path, behaviour: Behaviour, reasoning: str | None
) -> None:
    async with Server({"cut": behaviour}).open() as server:
        config = settings(server.address("cut"), tmp_path, model={"max_tokens": 7})
        _, records = await run_items(config, tmp_path)
    wanted = "all tokens went into the model's reasoning: the answer was cut at 7 tokens"
    for record in records:
        assert record["error_class"] == "TruncatedAnswerError"
        assert record["error"].startswith(wanted)
        assert record.get("reasoning") == reasoning
        assert record["repairs"] == 0


def refusal(status: int, message: Any, **fields: Any) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", **fields}
    return web.json_response({"error": error}, status=status)


def refuse_if(test: Callable[[Body], bool], refused: Callable[[], web.Response]) -> Behaviour:
    return lambda body: refused() if test(body) else web.json_response(completion())


def has_role(role: str) -> Callable[[Body], bool]:
    return lambda body: body["messages"][0]["role"] == role


EXTRA = {"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}
SETTINGS: dict[str, tuple[Behaviour, str, dict[str, Any]]] = {
    "temperature": (
        refuse_if(
            lambda body: "temperature" in body,
            lambda: refusal(400, "Unsupported value: 'temperature' does not support 0."),
        ),
        "model.temperature: null",
        {"model": {"temperature": None}},
    ),
    "length": (
        refuse_if(
            lambda body: "max_completion_tokens" in body,
            lambda: web.json_response(
                {"object": "error", "message": {"detail": [EXTRA]}}, status=422
            ),
        ),
        "model.max_tokens_field: max_tokens",
        {"model": {"max_tokens_field": "max_tokens"}},
    ),
    "system role": (
        refuse_if(has_role("system"), lambda: refusal(400, "System role not supported")),
        "model.system_role: user",
        {"model": {"system_role": "user"}},
    ),
    "developer role": (
        refuse_if(
            has_role("system"),
            lambda: refusal(400, "'messages[0].role' does not support 'system' here"),
        ),
        "model.system_role",
        {"model": {"system_role": "developer"}},
    ),
    "schema": (
        refuse_if(
            lambda body: "response_format" in body,
            lambda: refusal(400, "UNSUPPORTED JSON schema keyword: minimum"),
        ),
        "task.schema",
        {"task": {"schema": None}},
    ),
    "own field": (
        refuse_if(lambda body: "top_k" in body, lambda: refusal(400, "Unknown field: top_k")),
        "remove top_k from model.extra_body",
        {"model": {"extra_body": {}}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("processes", [1, 2])
async def test_a_refused_field_stops_the_run_and_names_the_setting(
    tmp_path: Path, name: str, processes: int
) -> None:
    behaviour, advice, changes = SETTINGS[name]
    sections: dict[str, Any] = {
        "task": {"system": "Be brief."},
        "model": {"extra_body": {"top_k": 4}},
        "backend": {"kind": "local", "processes": processes},
    }
    async with Server({name: behaviour}).open() as server:
        config = settings(server.address(name), tmp_path, **sections)
        with pytest.raises(ConfigurationError, match=advice) as caught:
            await run_items(config, tmp_path)
        folder = open_folder(tmp_path / "run")
        changed = load_config(
            config | {name: config.get(name, {}) | values for name, values in changes.items()}
        )
        if "start a new run" in caught.value.message:  # the message is right about what helps
            with pytest.raises(ConfigurationError, match="use a new run folder"):
                await resume_run(folder, changed)
        else:
            assert "can be resumed with it: fanfold resume DIR --set" in caught.value.message
            await resume_run(folder, changed)
            await resume_run(folder, load_config(config))
        with pytest.raises(ConfigurationError, match=advice):
            await execute_run(
                await resume_run(folder, None), RunOptions(quiet=True), Console(quiet=True)
            )
        assert server.calls[name] <= 2 * len(ITEMS)
        with Journal(folder.journal, folder.read_provenance()["run"], len(ITEMS)) as journal:
            assert not list(journal.read_records())
        for section, values in changes.items():
            config[section] |= values
        (tmp_path / "again").mkdir()
        _, records = await run_items(config, tmp_path / "again")
    assert [record["status"] for record in records] == ["done"] * len(ITEMS)
    texts = {message["content"] for message in server.bodies[-1]["messages"]}
    assert all(any(part in text for text in texts) for part in ("Be brief.", "Rate "))


async def test_the_field_of_the_length_can_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    async with Server({"length": SETTINGS["length"][0]}).open() as server:
        config = settings(server.address("length"), tmp_path)
        with pytest.raises(ConfigurationError):
            await run_items(config, tmp_path)
        folder = open_folder(tmp_path / "run")
        changed = load_config(config | {"model": {"name": "m", "max_tokens_field": "max_tokens"}})
        result = await execute_run(
            await resume_run(folder, changed), RunOptions(quiet=True), Console(quiet=True)
        )
    assert result.exit_code == 0


ITEM_ERRORS: dict[str, Behaviour] = {
    "moderation": refuse_if(is_poison, lambda: refusal(403, "Input was flagged by moderation")),
    "no endpoint": refuse_if(is_poison, lambda: refusal(404, "None can process this input")),
    "bad input": refuse_if(is_poison, lambda: refusal(400, "Invalid input: temperature of what?")),
    "bad type": refuse_if(
        is_poison,
        lambda: web.json_response({"detail": [{"loc": ["body", "messages"]}]}, status=422),
    ),
}


@pytest.mark.parametrize("name", ITEM_ERRORS)
async def test_an_error_of_the_content_fails_its_item_alone(tmp_path: Path, name: str) -> None:
    async with Server(ITEM_ERRORS).open() as server:
        _, records = await run_items(settings(server.address(name), tmp_path), tmp_path)
    assert {r["index"]: r["error_class"] for r in records} == {
        0: None,
        1: None,
        2: "RequestRefusedError",
        3: None,
    }


def cut(used: int, most: int = 10_000) -> Behaviour:
    def answer(body: Body) -> web.Response:
        asked = body["max_completion_tokens"]
        if asked > most:
            return refusal(400, f"{asked} is too large. At most {most}", param="max_tokens")
        document = completion(GOOD[:9], "length")
        document["usage"]["completion_tokens"] = min(used, asked)
        return web.json_response(document)

    return answer


CUT: dict[str, tuple[Behaviour, str]] = {
    "at the limit": (cut(10_000), "cut at 256 tokens (model.max_tokens)"),
    "in a full context": (cut(7), "cut after 7 of the 256 tokens"),
    "at a lower limit": (cut(10_000, 40), "cut at 40 tokens, the most that the endpoint accepts"),
    "below a lower limit": (cut(7, 40), "cut after 7 of the 40 tokens"),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("items", [None, 1])
async def test_a_cut_answer_names_the_number_that_was_sent(
    tmp_path: Path, name: str, items: int | None
) -> None:
    behaviour, words = CUT[name]
    async with Server({name: behaviour}).open() as server:
        config = settings(server.address(name), tmp_path, shard={"items": items})
        _, records = await run_items(config, tmp_path)
    for record in records:
        assert record["error_class"] == "TruncatedAnswerError"
        assert words in record["error"]


async def stop_reason(config: dict[str, Any], home: Path) -> str:
    """Run until the run stops; return why."""
    folder = (await prepare_run(load_config(config), home / "run")).folder
    run = await resume_run(folder, None)
    result = await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
    assert result.exit_code == EXIT_INTERRUPTED
    return result.reason or ""


STOPPED: dict[str, tuple[Behaviour, tuple[str, ...]]] = {
    "no credit": (lambda _: refusal(402, "Insufficient credits."), ("Insufficient credits.",)),
    "daily quota": (
        lambda _: refusal(429, "Rate limit exceeded: 50 requests per day"),
        ("Rate limit exceeded: 50 requests per day", "resume the run when it is renewed"),
    ),
    "monthly quota": (
        lambda _: refusal(429, "Your Monthly allowance is used up"),
        ("Your Monthly allowance is used up",),
    ),
    "redirect": (
        lambda _: web.Response(status=307, headers={"Location": "/b/ok/v1/chat/completions"}),
        ("HTTP 307", "redirects to /b/ok/v1/chat/completions"),
    ),
    "redirect elsewhere": (
        lambda _: web.Response(
            status=308, headers={"Location": "https://me:secret@api.example/v2?token=hidden"}
        ),
        ("HTTP 308", "redirects to https://api.example/v2,"),
    ),
}


@pytest.mark.parametrize("name", STOPPED)
async def test_a_run_that_cannot_go_on_repeats_what_the_server_says(
    tmp_path: Path, name: str
) -> None:
    behaviour, words = STOPPED[name]
    async with Server({name: behaviour}).open() as server:
        config = settings(server.address(name), tmp_path, limits={"fleet_wait_s": 0.5})
        reason = await stop_reason(config, tmp_path)
    assert all(word in reason for word in words), reason
    assert "secret" not in reason
    assert "hidden" not in reason


async def test_a_fleet_that_stays_down_names_its_last_failure(tmp_path: Path) -> None:
    def fail(_: Body) -> web.Response:
        server.unlisted["down"] = 503
        return refusal(502, "upstream is being upgraded")

    async with Server({"down": fail}).open() as server:
        config = settings(server.address("down"), tmp_path, limits={"fleet_wait_s": 0.5})
        reason = await stop_reason(config, tmp_path)
    assert "no endpoint recovered" in reason
    assert "upstream is being upgraded" in reason


@pytest.mark.parametrize("status", [403, 404, 405, 501])
async def test_a_server_without_a_list_of_models_serves_the_configured_one(
    tmp_path: Path, status: int
) -> None:
    async with Server({"ok": reply()}, unlisted={"ok": status}).open() as server:
        config = settings(server.address("ok"), tmp_path)
        _, records = await run_items(config, tmp_path)
        assert [record["status"] for record in records] == ["done"] * len(ITEMS)
        config["model"] = {}
        (tmp_path / "again").mkdir()
        with pytest.raises(ConfigurationError, match=f"set model.name: .*HTTP {status}"):
            await run_items(config, tmp_path / "again")


@pytest.mark.parametrize("status", [500, 503])
async def test_a_server_that_fails_to_list_its_models_is_down(tmp_path: Path, status: int) -> None:
    async with Server({"ok": reply()}, unlisted={"ok": status}).open() as server:
        with pytest.raises(NoEndpointError, match=f"HTTP {status}"):
            await run_items(settings(server.address("ok"), tmp_path), tmp_path)


@pytest.mark.parametrize("path", ["/v1beta/openai", "/v1beta/openai/chat/completions"])
async def test_the_version_in_a_path_is_kept(tmp_path: Path, path: str) -> None:
    async with Server({"": reply()}).open() as server:
        _, records = await run_items(settings(server.url + path, tmp_path), tmp_path)
    assert [record["status"] for record in records] == ["done"] * len(ITEMS)
    assert all(body["stream"] is False for body in server.bodies)
