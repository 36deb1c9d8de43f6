"""``fanfold batch`` with lines that name audio, as ``vllm run-batch`` takes them."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai.types.audio import Transcription, Translation

from fanfold.tests.support.command_server import Command, run_command

from .conftest import Served, Shell
from .test_batch_files import MODEL, by_id, kill_after, request, write

pytestmark = pytest.mark.integration

URL = "/v1/audio/transcriptions"
AUDIO = os.urandom(40_000)


def make_data_url(data: bytes = AUDIO) -> str:
    return f"data:audio/wav;base64,{base64.b64encode(data).decode()}"


def audio(n: int, file: str | None = None, /, **changes: Any) -> dict[str, Any]:
    url = changes.pop("url", URL)
    body = {"model": MODEL, "file_url": make_data_url() if file is None else file} | changes
    return {"custom_id": f"request-{n}", "method": "POST", "url": url, "body": body}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path.startswith("/a.wav") else 404)
        self.end_headers()
        self.wfile.write(AUDIO)

    def log_message(self, *_: object) -> None:
        """Write nothing to standard error."""


@pytest.fixture
def files() -> Iterator[str]:
    """A server of files; return its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def urls(fleet: Served) -> str:
    return ",".join(fleet.urls)


def test_audio_is_transcribed_and_translated(shell: Shell, fleet: Served, urls: str) -> None:
    detailed = {"response_format": "verbose_json", "timestamp_granularities[]": ["segment"]}
    made = [
        audio(0),
        audio(1, url="/v1/audio/translations"),
        audio(2, **detailed, language="de", stream=True, stream_include_usage=True),
        audio(3, response_format="srt"),
        audio(4, make_data_url(b"")),
        request(5),
    ]
    write(shell.folder / "in.jsonl", made)
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls, "--budget-requests", "50")
    said = shell(*command, "--set", "cache=run")
    assert said.code == 3, said.err
    found = by_id("out.jsonl")
    spoken = Transcription.model_validate(found["request-0"].answer)
    assert spoken.text
    assert Translation.model_validate(found["request-1"].answer).text == spoken.text
    assert found["request-2"].answer["language"] == "de"
    for n, message in ((3, "Currently only support response_format"), (4, "unsupported audio")):
        failed = found[f"request-{n}"]
        assert failed.error is not None
        assert failed.error.code == "request_refused"
        assert message in failed.error.message
        assert failed.response is not None
        assert failed.response.status_code == 400
    assert fleet.requests == len(made)
    assert shell(*command).code == 3
    assert fleet.requests == len(made)


def test_audio_is_fetched_from_hosts_that_the_user_names(
    shell: Shell, fleet: Served, urls: str, files: str
) -> None:
    made = [audio(0), audio(1, f"{files}/a.wav?key=1"), audio(2, f"{files}/none.wav?key=1")]
    write(shell.folder / "in.jsonl", made)
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    said = shell(*command)
    assert said.code == 3, said.err
    refused = by_id("out.jsonl")["request-1"].error
    assert refused is not None
    assert refused.code == "invalid_item"
    assert "not fetched from 127.0.0.1; allow it with --allowed-media-domains" in refused.message
    assert fleet.requests == 1

    said = shell(*command, "--allowed-media-domains", "127.0.0.1,example.org", "--retry-failed")
    assert said.code == 3, said.err
    found = by_id("out.jsonl")
    assert found["request-1"].answer["text"] == found["request-0"].answer["text"]
    lost = found["request-2"].error
    assert lost is not None
    assert "/none.wav: 127.0.0.1 answered HTTP 404" in lost.message
    assert "key=1" not in Path("out.jsonl").read_text()
    assert fleet.requests == 2

    # options that are not given again keep their values
    assert shell(*command, "--retry-failed").code == 3
    assert "answered HTTP 404" in Path("out.jsonl").read_text()
    said = shell(*command[:2], "other.jsonl", *command[3:], "--allowed-media-domains", files)
    assert said.code == 2
    assert "name a host alone" in said.err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (audio(9) | {"body": {"model": MODEL}}, "line 2: body has none of file_url"),
        (audio(9, 7), "line 2: body.file_url must be text"),  # type: ignore[arg-type]
        (audio(9, file="x"), "line 2: body.file has no place in a batch"),
        (audio(9, model=""), "line 2: body.model must be text"),
    ],
)
def test_a_line_without_audio_is_refused_by_its_number(
    shell: Shell, fleet: Served, urls: str, bad: dict[str, Any], message: str
) -> None:
    write(shell.folder / "in.jsonl", [audio(0), bad])
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    assert said.code == 2
    assert message in said.err
    assert fleet.requests == 0


def test_a_budget_of_tokens_does_not_fit_audio(shell: Shell, fleet: Served, urls: str) -> None:
    """How many tokens it is is known only from the answer."""
    write(shell.folder / "in.jsonl", [request(0), audio(1)])
    command = ("batch", "in.jsonl", "out.jsonl", "--endpoints", urls)
    message = "the tokens of audio are not known before its answer"
    said = shell(*command, "--budget-tokens", "10000")
    assert said.code == 2
    assert f"line 2: a budget of tokens or US dollars is set, but {message}" in said.err
    settings = {
        "input": {"path": "in.jsonl", "format": "openai_batch"},
        "endpoints": {"urls": [*fleet.urls]},
        "budget": {"tokens": 10_000},
    }
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    for action in (("check", "c.yaml"), ("run", "c.yaml", "--out", "folder")):
        said = shell(*action)
        assert said.code == 2
        assert f"request 'request-1': a budget of tokens or US dollars is set, but {message}" in (
            " ".join(said.err.split())
        )
    assert fleet.requests == 0
    assert shell(*command, "--budget-requests", "1").code == 4
    said = shell(*command, "--budget-requests", "5", "--budget-tokens", "10000")
    assert said.code == (0 if "request-1" in Path("out.jsonl").read_text() else 2), said.err


def test_an_estimate_names_urls_that_are_not_fetched(
    shell: Shell, fleet: Served, files: str
) -> None:
    write(shell.folder / "in.jsonl", [audio(0, f"{files}/a.wav")])
    settings = {
        "input": {"path": "in.jsonl", "format": "openai_batch"},
        "endpoints": {"urls": [*fleet.urls]},
    }
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    assert "files are not fetched from 127.0.0.1" in " ".join(shell("check", "c.yaml").out.split())
    said = shell("check", "c.yaml", "--set", "batch.allowed_media_domains=[127.0.0.1]")
    assert said.code == 0, said.err
    assert "not fetched" not in said.out


@pytest.mark.parametrize(
    "backend",
    ["backend.processes=1", pytest.param("backend.processes=2", marks=pytest.mark.long)],
)
def test_a_kill_repeats_what_was_in_flight_only(
    shell: Shell, fleet: Served, urls: str, files: str, backend: str
) -> None:
    data = make_data_url(AUDIO[:2_000])
    made = [audio(n, f"{files}/a.wav" if n % 10 == 0 else data) for n in range(120)]
    write(shell.folder / "in.jsonl", made)
    command = (
        *("batch", "in.jsonl", "out.jsonl", "--endpoints", urls, "--quiet"),
        *("--allowed-media-domains", "127.0.0.1", "--set", backend),
        *("--set", "limits.streams=8", "--set", "limits.hedge=false"),
    )
    kill_after(shell, 30, *command)
    ended = run_command(Command(command))
    assert ended.returncode == 0, ended.stderr
    found = by_id("out.jsonl")
    assert len(found) == len(made)
    assert len({json.dumps(line.answer["text"]) for line in found.values()}) == 2
    assert len(made) <= fleet.requests <= len(made) + 8 * int(backend[-1])
