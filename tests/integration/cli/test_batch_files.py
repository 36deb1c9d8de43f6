"""``fanfold batch``: OpenAI's batch file format in and out, through kills, stops and changes."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

from fanfold.tests.support.command_server import Command, started

from .conftest import Served, Shell

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
MODEL = "simulated-8b"
STREAMS = 32


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Answer(Strict):
    status_code: int
    request_id: str
    body: dict[str, Any]


class Problem(Strict):
    code: str
    message: str


class Line(Strict):
    """A line of the output, as OpenAI's reference describes it."""

    id: str
    custom_id: str
    response: Answer | None
    error: Problem | None

    @property
    def answer(self) -> dict[str, Any]:
        assert self.response is not None
        assert self.error is None
        assert self.response.status_code == 200
        return self.response.body

    @property
    def completion(self) -> ChatCompletion:
        return ChatCompletion.model_validate(self.answer)


def request(n: int, /, **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"Say {n}"}], "max_tokens": 16}
    return {"custom_id": f"request-{n}", "method": "POST", "url": CHAT, "body": body | changes}


def embedding(n: int) -> dict[str, Any]:
    body = {"model": MODEL, "input": [f"text {n}"]}
    return {"custom_id": f"request-{n}", "method": "POST", "url": "/v1/embeddings", "body": body}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def read(path: Path | str) -> list[Line]:
    return [Line.model_validate_json(line) for line in Path(path).read_text().splitlines()]


def by_id(path: Path | str) -> dict[str, Line]:
    found = {line.custom_id: line for line in read(path)}
    assert len(found) == len(read(path)), "a custom_id occurs twice"
    return found


class Recorder(ThreadingHTTPServer):
    """A plain server of one model, which records the bodies of its chat requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RecorderHandler)
        self.bodies = list[dict[str, Any]]()
        self.refuses_temperature = True
        self.pause_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.bodies.append(body)
        time.sleep(self.pause_s)
        if body.get("refuse"):
            return 400, {"error": {"message": "there is no such option", "code": "bad_option"}}
        if self.refuses_temperature and body.get("temperature", 0) > 2:
            return 400, {"error": {"message": "the parameter 'temperature' must be at most 2"}}
        message = {"role": "assistant", "content": "cut of"}
        choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
        about = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
        return 200, about | {"choices": [choice], "usage": usage, "vendor_answer": {"kept": True}}


class RecorderHandler(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        listed = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "me"}]}
        known = self.path == "/v1/models"
        self.send(200 if known else 404, listed if known else {"error": {"message": "unknown"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == CHAT:
            self.send(*self.server.answer(body))
        else:
            self.send(404, {"error": {"message": "unknown"}})

    def send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Write nothing to standard error."""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def urls(fleet: Served) -> str:
    return ",".join(fleet.urls)


@pytest.fixture
def lines(shell: Shell) -> list[dict[str, Any]]:
    made = [request(n) for n in range(20)]
    write(shell.folder / "in.jsonl", made)
    return made


def test_each_line_gets_the_servers_completion(
    shell: Shell, lines: list[dict[str, Any]], urls: str
) -> None:
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert said.code == 0, said.err
    assert f"Output: {shell.folder / 'out.jsonl'}" in said.err
    found = by_id("out.jsonl")
    assert found.keys() == {line["custom_id"] for line in lines}
    assert len({line.id for line in found.values()}) == len(lines)
    for line in found.values():
        completion = line.completion
        assert completion.object == "chat.completion"
        assert completion.model == MODEL
        assert completion.choices[0].message.role == "assistant"
        assert completion.choices[0].message.content
        assert completion.usage is not None
        assert 0 < completion.usage.completion_tokens <= 16
        assert line.response is not None
        assert line.response.request_id == completion.id
    shown = json.loads(shell("status", "out.jsonl.fanfold", "--json").out)
    assert (shown["done"], shown["items"]) == (20, 20)


def test_the_body_is_sent_as_it_is(shell: Shell, recorder: Recorder) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    own = {
        "temperature": 1.5,
        "seed": 7,
        "tools": tools,
        "metadata": {"a": [1, None]},
        "vendor_field": "x",
        "n": 2,
        "stop": ["\n"],
    }
    changed = request(0, **own, stream=True, stream_options={"include_usage": True})
    plain, unnamed = request(1), request(2)
    del unnamed["body"]["model"]
    write(shell.folder / "in.jsonl", [changed, plain, unnamed])
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", recorder.url)
    assert said.code == 0, said.err
    sent = {body["messages"][0]["content"]: body for body in recorder.bodies}
    expected = changed["body"] | {"stream": False}
    del expected["stream_options"]
    assert sent["Say 0"] == expected
    assert sent["Say 1"] == plain["body"] | {"stream": False}
    assert sent["Say 2"] == unnamed["body"] | {"model": MODEL, "stream": False}
    answer = by_id("out.jsonl")["request-0"].response
    assert answer is not None
    assert answer.body["vendor_answer"] == {"kept": True}
    assert answer.body["choices"][0]["finish_reason"] == "length"


def test_failed_lines_have_the_formats_shape(shell: Shell, recorder: Recorder) -> None:
    made = [
        request(0),
        request(1, refuse=True),
        request(2) | {"url": "/v1/audio/speech", "body": {"model": "e", "input": "text"}},
        request(3),
    ]
    write(shell.folder / "in.jsonl", made)
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", recorder.url)
    said = shell(*command, "--errors", "errors.jsonl")
    assert said.code == 3, said.err
    assert f"Errors: {shell.folder / 'errors.jsonl'}" in said.err
    assert by_id("out.jsonl").keys() == {"request-0", "request-3"}
    failed = by_id("errors.jsonl")
    assert failed.keys() == {"request-1", "request-2"}
    refused, other = failed["request-1"], failed["request-2"]
    assert refused.error is not None
    assert refused.error.code == "request_refused"
    assert "no such option" in refused.error.message
    assert refused.response is not None
    assert refused.response.status_code == 400
    assert "no such option" in refused.response.body["error"]["message"]
    assert other.response is None
    assert other.error is not None
    assert "/v1/audio/speech" in other.error.message
    assert len(recorder.bodies) == 3

    # without --errors all lines are in one file; the run is the same, and nothing is sent
    Path("out.jsonl").unlink()
    Path("errors.jsonl").unlink()
    assert shell(*command, "--set", "batch.errors=null").code == 3
    assert by_id("out.jsonl").keys() == {f"request-{n}" for n in range(4)}
    assert not Path("errors.jsonl").exists()
    assert len(recorder.bodies) == 3


OTHERS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["one", "two"], "dimensions": 4},
    "/v1/completions": {"prompt": "Once upon", "max_tokens": 9, "vendor_field": "x"},
    "/score": {"text_1": "a query", "text_2": ["one", "two", "three"]},
    "/v1/score": {"text_1": ["a", "b"], "text_2": ["c", "d"]},
    "/rerank": {"query": "a query", "documents": ["one", "two"]},
    "/v1/rerank": {"query": "a query", "documents": ["one", "two"], "top_n": 1},
    "/v2/rerank": {"query": "another", "documents": ["one"]},
}


def test_requests_to_other_urls(shell: Shell, fleet: Served, urls: str) -> None:
    """They are sent as they are, to the URL of the line, within the budget, and once."""
    made = [request(0)]
    for url, body in OTHERS.items():
        line = {"custom_id": url, "method": "POST", "url": url, "body": {"model": MODEL} | body}
        made.append(line)
    write(shell.folder / "in.jsonl", made)
    options = ("--set", "limits.affinity=100", "--set", "cache=run", "--budget-tokens", "10000")
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls, *options)
    said = shell(*command, "--json")
    assert said.code == 0, said.err
    found = {name: line.answer for name, line in by_id("out.jsonl").items()}
    embeddings = CreateEmbeddingResponse.model_validate(found["/v1/embeddings"])
    assert [len(one.embedding) for one in embeddings.data] == [4, 4]
    assert Completion.model_validate(found["/v1/completions"]).choices[0].text
    assert [len(found[url]["data"]) for url in ("/score", "/v1/score")] == [3, 2]
    assert [len(found[url]["results"]) for url in OTHERS if "rerank" in url] == [2, 1, 1]
    used = sum(answer["usage"]["total_tokens"] for answer in found.values())
    spent = json.loads(said.out)["budget"]["tokens"]
    assert spent["spent"] == used
    assert fleet.requests == len(made)
    assert shell(*command).code == 0
    assert fleet.requests == len(made)


def test_a_url_that_the_server_does_not_have_fails_its_line_only(
    shell: Shell, recorder: Recorder
) -> None:
    made = [request(0), embedding(1), *(request(n) for n in range(2, 9)), embedding(9)]
    write(shell.folder / "in.jsonl", made)
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", recorder.url)
    said = shell(*command, "--set", "limits.streams=1")
    assert said.code == 3, said.err
    found = by_id("out.jsonl")
    failed = [found.pop(f"request-{n}") for n in (1, 9)]
    assert all(line.completion for line in found.values())
    for line in failed:
        assert line.error is not None
        assert line.error.code == "request_refused"
        assert "does this endpoint serve /v1/embeddings?" in line.error.message
        assert line.response is not None
        assert line.response.status_code == 404


def test_a_file_with_several_models_is_refused_as_a_whole(
    shell: Shell, fleet: Served, urls: str
) -> None:
    made = [request(0), request(1, model="b"), request(2), embedding(3), request(4, model="c")]
    write(shell.folder / "in.jsonl", made)
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert said.code == 2
    assert "line 2: the model is 'b', but lines before it name 'simulated-8b'" in said.err
    assert "The file names 'simulated-8b' (3 lines), 'b' (1 line), 'c' (1 line)" in said.err
    assert fleet.requests == 0


def test_a_field_that_a_server_refuses_fails_its_line_only(
    shell: Shell, recorder: Recorder
) -> None:
    made = [request(0, temperature=9), *(request(n) for n in range(1, 4))]
    write(shell.folder / "in.jsonl", made)
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", recorder.url)
    said = shell(*command, "--set", "limits.streams=1")
    assert said.code == 3, said.err
    found = by_id("out.jsonl")
    assert found["request-0"].error is not None
    assert all(found[f"request-{n}"].completion for n in range(1, 4))

    recorder.refuses_temperature = False
    said = shell(*command, "--retry-failed")
    assert said.code == 0, said.err
    assert all(line.completion for line in by_id("out.jsonl").values())
    assert len(recorder.bodies) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"custom_id": "a", ', "line 3: the row is not JSON"),
        ("[1]", "line 3: the row is not a JSON object"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/x"}', "line 3: 'body' is missing"),
        (request(0), "'request-0'"),
        (request(9) | {"custom_id": 9}, "line 3: custom_id must be text"),
        (request(9) | {"custom_id": " a"}, "line 3: custom_id must be text"),
        (request(9) | {"method": "GET"}, "line 3: method must be"),
        (request(9) | {"body": []}, "line 3: body must be an object"),
        (request(9, messages=[]), "line 3: body.messages must be"),
        (request(9, messages=["a"]), "line 3: body.messages must be"),
        (request(9, max_tokens="many"), "line 3: body.max_tokens must be a whole number"),
        (request(9, n=True), "line 3: body.n must be a whole number"),
        (request(9, response_format="json"), "line 3: body.response_format must be an object"),
        (request(9, model="other"), "line 3: the model is 'other', but lines before it name"),
        (embedding(9) | {"body": {"model": MODEL}}, "line 3: body has none of input, messages"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(
    shell: Shell, fleet: Served, urls: str, bad: str | dict[str, Any], message: str
) -> None:
    lines = [json.dumps(request(0)), json.dumps(request(1))]
    lines.append(bad if isinstance(bad, str) else json.dumps(bad))
    (shell.folder / "in.jsonl").write_text("\n".join(lines))
    before = fleet.requests
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert said.code == 2
    assert message in said.err
    assert "line 3" in said.err
    assert not Path("out.jsonl").exists()
    assert not Path("out.jsonl.fanfold").exists()
    assert fleet.requests == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "name the endpoints"),
        ({"task": {"prompt": "x"}}, "the section 'task' has no place"),
        ({"model": {"temperature": 0.5}}, "model.temperature"),
        ({"model": {"name": "other"}}, "name the model 'simulated-8b'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    shell: Shell, fleet: Served, config: dict[str, Any] | None, message: str
) -> None:
    write(shell.folder / "in.jsonl", [request(0)])
    settings = {"endpoints": {"urls": [*fleet.urls]}} | (config or {})
    (shell.folder / "c.yaml").write_text(yaml.safe_dump(settings))
    given = [] if config is None else ["--config", "c.yaml"]
    said = shell("batch", "in.jsonl", "out.jsonl", *given)
    assert said.code == 2
    assert message in said.err
    assert not Path("out.jsonl").exists()


def test_a_file_of_settings_and_a_packed_input(
    shell: Shell, lines: list[dict[str, Any]], fleet: Served
) -> None:
    with gzip.open(shell.folder / "requests.txt.gz", "wt") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    settings = {
        "endpoints": {"urls": [*fleet.urls]},
        "limits": {"streams": 4},
        "budget": {"requests": 100},
        "cache": "run",
    }
    (shell.folder / "c.yaml").write_text(yaml.safe_dump(settings))
    said = shell(
        "batch", "requests.txt.gz", "o.jsonl", "--config", "c.yaml", "--folder", "runs", "--json"
    )
    assert said.code == 0, said.err
    shown = json.loads(said.out)
    assert shown["output"] == str(shell.folder / "o.jsonl")
    assert shown["budget"]["requests"]["spent"] == 20
    assert len(by_id("o.jsonl")) == 20


def test_langgraphs_engine_runs_the_same_steps(
    shell: Shell, lines: list[dict[str, Any]], urls: str
) -> None:
    options = ("--endpoints", urls, "--set", "shard.items=1")
    said = shell("batch", "in.jsonl", "out.jsonl", *options)
    assert said.code == 0, said.err
    assert by_id("out.jsonl").keys() == {line["custom_id"] for line in lines}
    assert all(line.completion for line in read("out.jsonl"))


def test_a_changed_input_is_refused(
    shell: Shell, lines: list[dict[str, Any]], fleet: Served, urls: str
) -> None:
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert shell(*command).code == 0
    before, requests = Path("out.jsonl").read_bytes(), fleet.requests
    assert shell(*command).code == 0, "the same input again adds nothing"
    write(shell.folder / "in.jsonl", [*lines, request(99)])
    said = shell(*command)
    assert said.code == 2
    assert "in.jsonl changed" in said.err
    assert Path("out.jsonl").read_bytes() == before
    assert fleet.requests == requests


def test_a_foreign_output_is_not_touched(
    shell: Shell, lines: list[dict[str, Any]], urls: str
) -> None:
    assert lines
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    Path("out.jsonl").write_text("my notes\n")
    said = shell(*command)
    assert said.code == 2
    assert "exists already" in said.err
    said = shell("batch", "in.jsonl", "in.jsonl", "--endpoints", urls)
    assert said.code == 2
    assert "is the input" in said.err
    Path("out.jsonl").unlink()
    assert shell(*command).code == 0
    Path("out.jsonl").write_text("my notes\n")
    said = shell(*command)
    assert said.code == 2
    assert "contains something else" in said.err
    assert Path("out.jsonl").read_text() == "my notes\n"


def test_a_copy_leaves_the_output_of_the_original_alone(
    shell: Shell, recorder: Recorder, tmp_path: Path
) -> None:
    write(shell.folder / "in.jsonl", [request(0), request(1), request(2, refuse=True)])
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", recorder.url)
    assert shell(*command, "--errors", "bad.jsonl").code == 3
    before = [Path(name).read_bytes() for name in ("out.jsonl", "bad.jsonl")]
    shutil.copytree("out.jsonl.fanfold", "copy")
    recorder.bodies.clear()
    said = shell("resume", "copy", "--retry-failed")
    assert said.code == 2, said.err
    assert "out.jsonl: is the output of run" in said.err
    assert "--set batch.output=FILE" in said.err
    said = shell(
        "resume", "copy", "--retry-failed", "--set", f"batch.output={shell.folder}/mine.jsonl"
    )
    assert said.code == 2, said.err
    assert "bad.jsonl: is the output of run" in said.err
    assert not recorder.bodies
    options = ("--set", f"batch.output={shell.folder}/mine.jsonl", "--set", "batch.errors=null")
    assert shell("resume", "copy", "--retry-failed", *options).code == 3
    assert len(recorder.bodies) == 1
    assert by_id("mine.jsonl").keys() == {"request-0", "request-1", "request-2"}
    assert [Path(name).read_bytes() for name in ("out.jsonl", "bad.jsonl")] == before
    assert shell(*command, "--errors", "bad.jsonl").code == 3
    (tmp_path / "moved").mkdir()
    for name in ("out.jsonl.fanfold", "out.jsonl", "bad.jsonl"):
        Path(name).rename(tmp_path / "moved" / name)
    said = shell("batch", "in.jsonl", "moved/out.jsonl", "--errors", "moved/bad.jsonl")
    assert said.code == 3, said.err
    assert Path("moved/out.jsonl").read_bytes() == before[0]
    assert not Path("out.jsonl").exists()


def cut_last(data: bytes) -> bytes:
    return data[:-30]


def cut_first(data: bytes) -> bytes:
    return data[:10]


def repeat_a_line(data: bytes) -> bytes:
    return data + data.splitlines(keepends=True)[3]


def damage_a_line(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([*lines[:5], b"\0" * 40 + b"\n", *lines[6:]])


def remove(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("break_it", [cut_last, cut_first, repeat_a_line, damage_a_line, remove])
def test_a_broken_output_is_repaired_from_the_journal(
    shell: Shell,
    lines: list[dict[str, Any]],
    fleet: Served,
    urls: str,
    break_it: Callable[[bytes], bytes],
) -> None:
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert shell(*command).code == 0
    whole, requests = Path("out.jsonl").read_bytes(), fleet.requests
    Path("out.jsonl").write_bytes(break_it(whole))
    assert shell(*command).code == 0
    assert sorted(Path("out.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    assert len(whole.splitlines()) == len(lines)
    assert fleet.requests == requests


def test_a_budget_pauses_a_batch_and_a_higher_one_ends_it(
    shell: Shell, lines: list[dict[str, Any]], fleet: Served, urls: str
) -> None:
    options = ("--endpoints", urls, "--budget-requests", "8", "--set", "limits.hedge=false")
    said = shell("batch", "in.jsonl", "out.jsonl", *options)
    assert said.code == 4, said.err
    assert "fanfold resume out.jsonl.fanfold --budget-requests N" in said.err
    first = by_id("out.jsonl")
    assert 0 < len(first) <= 8
    said = shell("resume", "out.jsonl.fanfold", "--budget-requests", "12")
    assert said.code == 4, said.err
    second = by_id("out.jsonl")
    assert len(first) < len(second) <= 12
    assert first.items() <= second.items()
    said = shell("batch", "in.jsonl", "out.jsonl", "--budget-requests", "100")
    assert said.code == 0, said.err
    assert by_id("out.jsonl").keys() == {line["custom_id"] for line in lines}
    assert fleet.requests == 20


def test_a_budget_requires_a_limit_in_each_line(shell: Shell, fleet: Served, urls: str) -> None:
    unlimited = request(1)
    del unlimited["body"]["max_tokens"]
    write(shell.folder / "in.jsonl", [request(0), unlimited])
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    said = shell(*command, "--budget-tokens", "100000")
    assert said.code == 2
    assert "line 2: a budget is set" in said.err
    assert fleet.requests == 0
    assert shell(*command).code == 0


def test_a_pilot_and_two_lists_of_endpoints(
    shell: Shell, lines: list[dict[str, Any]], fleet: Served
) -> None:
    first, second = fleet.urls
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", first, "--endpoints", second)
    said = shell(*command, "--pilot", "5")
    assert said.code == 5, said.err
    assert "pilot: 5 of 20 items" in said.err
    assert len(by_id("out.jsonl")) == 5
    said = shell(*command, "--pilot", "5", "--yes")
    assert said.code == 0, said.err
    assert len(by_id("out.jsonl")) == len(lines)
    assert fleet.requests == 20


def test_the_estimate_of_a_batch(shell: Shell, fleet: Served) -> None:
    unlimited = request(2)
    del unlimited["body"]["max_tokens"]
    made = [request(0, max_tokens=10, n=3), request(1, max_completion_tokens=50), unlimited]
    write(shell.folder / "in.jsonl", [*made, request(3) | {"url": "/v1/audio/speech"}])
    settings = {
        "input": {"path": "in.jsonl", "format": "openai_batch"},
        "endpoints": {"urls": [*fleet.urls]},
    }
    (shell.folder / "c.yaml").write_text(yaml.safe_dump(settings))
    said = shell("check", "c.yaml")
    assert said.code == 0, said.err
    assert "Say 0" in said.out
    assert '"messages"' not in said.out
    assert "sample: 3 prompts" in said.out
    assert "(answers of 40)" in said.out
    assert "without max_tokens: 1 request," in said.out


WORKERS = {
    "processes": ("backend.kind=local", "backend.processes=2"),
    "parsl": ("backend.kind=parsl", "backend.workers=2"),
}


@pytest.mark.parametrize("backend", WORKERS)
def test_workers(shell: Shell, fleet: Served, urls: str, backend: str) -> None:
    made = [request(n) for n in range(300)]
    made[0] |= {"url": "/v1/audio/speech"}
    made[17] |= {"url": "/v1/audio/speech"}
    made[18] |= embedding(18)
    made[200] |= embedding(200)
    write(shell.folder / "in.jsonl", made)
    said = shell(
        *("batch", "in.jsonl", "out.jsonl", "--endpoints", urls, "--errors", "errors.jsonl"),
        *(part for setting in WORKERS[backend] for part in ("--set", setting)),
        *("--budget-tokens", "1000000", "--set", "limits.hedge=false"),
    )
    assert said.code == 3, said.err
    assert len(by_id("out.jsonl")) == 298
    found = by_id("out.jsonl")
    embedded = [found.pop(f"request-{n}") for n in (18, 200)]
    assert all(line.completion for line in found.values())
    assert all(len(line.answer["data"]) == 1 for line in embedded)
    assert by_id("errors.jsonl").keys() == {"request-0", "request-17"}
    assert fleet.requests == 298


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(shell: Shell, most: int, *command: str) -> None:
    """Run a batch until its output has grown, and to so many lines, then kill it."""
    output = shell.folder / "out.jsonl"
    most = max(most, count_lines(output) + 1)
    with started(Command(command, new_session=True)) as process:
        process.wait_until(lambda: count_lines(output) >= most)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("items", "processes"),
    [(600, 1), (600, 2), *(pytest.param(5000, n, marks=pytest.mark.long) for n in (1, 2))],
)
def test_kills_lose_nothing(
    shell: Shell, fleet: Served, urls: str, items: int, processes: int
) -> None:
    made = [request(n) for n in range(items)]
    made[5] |= {"url": "/v1/responses"}
    write(shell.folder / "in.jsonl", made)
    command = (
        *("batch", "in.jsonl", "out.jsonl", "--endpoints", urls, "--quiet"),
        *("--set", f"limits.streams={STREAMS}", "--set", "limits.hedge=false"),
        *("--set", f"backend.processes={processes}"),
    )
    kill_after(shell, items // 5, *command)
    kill_after(shell, items // 2, *command)
    with started(Command(command, new_session=True)) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 3, err
    counts = Counter(line.custom_id for line in read("out.jsonl"))
    assert counts == Counter(line["custom_id"] for line in made)
    assert sum(line.error is None and bool(line.completion) for line in read("out.jsonl")) == (
        items - 1
    )
    # each kill repeats no more than what was in flight then
    assert items - 1 <= fleet.requests <= items - 1 + 2 * STREAMS


def test_an_output_that_cannot_be_written_stops_the_batch(shell: Shell, recorder: Recorder) -> None:
    made = [request(n) for n in range(400)]
    write(shell.folder / "in.jsonl", made)
    target, hidden = shell.folder / "target", shell.folder / "hidden"
    target.mkdir()
    recorder.pause_s = 0.05
    command = (
        *("batch", "in.jsonl", "target/out.jsonl", "--endpoints", recorder.url),
        *("--folder", "run", "--set", "limits.streams=4"),
    )
    with started(Command(command, new_session=True)) as process:
        process.wait_until(partial(count_lines, target / "out.jsonl"))
        target.rename(hidden)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "out.jsonl: the results cannot be written" in err
    sent = len(recorder.bodies)
    assert sent < 400
    hidden.rename(target)
    recorder.pause_s = 0.0
    assert shell(*command).code == 0
    assert len(by_id("target/out.jsonl")) == 400
    assert len(recorder.bodies) == 400


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "batch.md").read_text()
COMMAND = re.compile(r"^\$ fanfold (.*)$", re.MULTILINE)
CODES = {"status": 0}
"""One line of the example fails, so that every command but this one ends with 3."""


def read_block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_commands_of_the_page(shell: Shell, fleet: Served) -> None:
    Path("requests.jsonl").write_text(read_block("json"))
    Path("endpoints.txt").write_text("".join(f"{url}\n" for url in fleet.urls))
    commands = [shlex.split(line) for line in COMMAND.findall(PAGE)]
    assert [command[0] for command in commands] == [
        "batch",
        "batch",
        "status",
        "resume",
        "batch",
        "batch",
    ]
    for command in commands:
        said = shell(*command)
        assert said.code == CODES.get(command[0], 3), (command, said.err)
    assert by_id("answers.jsonl").keys() == {"a-1", "a-2", "a-3"}
    (failed,) = read("errors.jsonl")
    (shown,) = re.findall(r"^\| `errors.jsonl` \| `(.*)` \|$", PAGE, re.MULTILINE)
    assert json.loads(shown) == failed.model_dump() | {"id": "batch_req_…_3"}
    assert len(by_id("limited.jsonl")) == len(by_id("more.jsonl")) == 4


def test_a_configuration_with_a_batch(shell: Shell, fleet: Served) -> None:
    Path("requests.jsonl").write_text(read_block("json"))
    Path("endpoints.txt").write_text("".join(f"{url}\n" for url in fleet.urls))
    Path("own.yaml").write_text(read_block("yaml"))
    said = shell("run", "own.yaml", "--out", "folder")
    assert said.code == 3, said.err
    assert by_id("answers.jsonl").keys() == {"a-1", "a-2", "a-3"}
    assert by_id("errors.jsonl").keys() == {"a-4"}
    config = yaml.safe_load(Path("own.yaml").read_text())
    for changes, message in (
        ({"task": {"prompt": "Say {body}"}}, "leave out the section task"),
        (
            {"input": {"path": "requests.jsonl"}, "task": {"prompt": "Say {body}"}},
            "requires input.format",
        ),
        ({"batch": {"errors": "e.jsonl"}}, "errors needs output"),
        ({"batch": {"output": "o.jsonl", "errors": "o.jsonl"}}, "the same file"),
        ({"input": config["input"] | {"id": "x"}}, "custom_id names the items"),
        ({"model": {"max_tokens": 5}}, "model.max_tokens"),
    ):
        Path("bad.yaml").write_text(yaml.safe_dump(config | changes))
        said = shell("run", "bad.yaml", "--out", "other")
        assert said.code == 2
        assert message in said.err


def test_a_line_that_a_first_gateway_would_refuse(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by its number before anything is sent; other servers get it."""
    message = {"messages": [{"role": "user", "content": "hello"}], "model": "m", "max_tokens": 5}
    bodies = [message, {**message, "stream_task_id": 1, "cache_salt": "x"}, message]
    lines = [
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": CHAT, "body": body})
        for n, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("A_TOKEN", "good")
    first = {"base_url": "http://127.0.0.1:9", "token": "${A_TOKEN}"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"endpoints": {"first": first}}))
    ended = shell("batch", "in.jsonl", "out.jsonl", "--config", "c.yaml")
    assert ended.code == 2
    assert "line 2: a FIRST gateway refuses requests with stream_task_id, cache_salt" in ended.err
    assert "no request was sent" in ended.err
    assert not (tmp_path / "out.jsonl").exists()
    urls = {"endpoints": {"urls": ["http://127.0.0.1:9"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(urls))
    ended = shell("batch", "in.jsonl", "out.jsonl", "--config", "c.yaml")
    assert ended.code == 2
    assert "FIRST" not in ended.err
