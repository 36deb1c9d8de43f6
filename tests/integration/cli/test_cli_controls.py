"""Commands over a server and a file whose texts contain terminal control sequences."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fanfold.backends.core.terminal import CONTROLS

from .conftest import Shell

pytestmark = pytest.mark.integration

EVIL = "\x1b]0;owned\x07\x9b2J\u202e\x7f[red]x"


LABELLED = {
    "type": "object",
    "properties": {"score": {"type": "number"}, "label": {"type": "string"}},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, document: object) -> None:
        body = json.dumps(document, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "m"}, {"id": f"other{EVIL}"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "bad" in asked["messages"][-1]["content"]:
            self.answer(400, {"error": {"message": f"no {EVIL}", "code": f"c{EVIL}"}})
            return
        content = json.dumps({"score": 0.5, "label": EVIL}, ensure_ascii=False)
        message = {"role": "assistant", "content": content}
        choice = {"message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        self.answer(200, {"model": f"m{EVIL}", "choices": [choice], "usage": usage})

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_command_shows_them(shell: Shell, url: str) -> None:
    (shell.folder / "in.jsonl").write_text(
        "".join(
            json.dumps({"id": f"{n}{EVIL}", "text": text}) + "\n"
            for n, text in enumerate([f"good {EVIL}", f"bad {EVIL}", "good"])
        )
    )
    message = {"role": "user", "content": f"bad {EVIL}"}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": [message]}}
    lines = [line | {"custom_id": f"a{EVIL}"}, line | {"custom_id": "b", "url": f"/{EVIL}"}]
    (shell.folder / "lines.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    shell.write(
        input={"path": "in.jsonl", "id": "id"},
        task={"prompt": "Say {text}", "system": f"Be {EVIL}", "schema": LABELLED},
        model={"name": "m"},
        endpoints={"urls": [url]},
        reduce=[{"op": "top_k", "field": "score", "k": 3}, {"op": "collect"}],
    )
    for words in (
        ["-v", "check", "c.yaml"],
        ["endpoints", "c.yaml"],
        ["-v", "run", "c.yaml", "--out", "run"],  # its table is looked at below
        ["-v", "resume", "run", "--retry-failed"],
        ["status", "run"],
        ["status", "run", "--endpoints"],
        ["failures", "run"],
        ["show", "run", "--columns", "error,output.label,text,prompt"],
        ["failures", "run", "--class", "RequestRefusedError"],
        ["cost", "run", "--by", "model"],
        ["ls", "."],
        ["endpoints", "run"],
        ["run", "c.yaml", "--from", "run", "--out", "more", "--yes", "--ask-again", "all"],
        ["run", "c.yaml", "--from", "run", "--out", "none", "--only", f"{EVIL} == 1"],
        ["run", "c.yaml", "--from", "run", "--out", "none", "--only", f'label == "{EVIL}"'],
        ["show", "run", "--columns", EVIL],
        ["batch", "lines.jsonl", "out.jsonl", "--endpoints", url],
        ["failures", "out.jsonl.fanfold"],
        ["show", "out.jsonl.fanfold"],
        ["run", "c.yaml", "--set", f"model.name={json.dumps(EVIL)}"],
        ["run", f"none{EVIL}"],
    ):
        said = shell(*words)
        assert not CONTROLS.search(said.out + said.err), words
        assert "Traceback" not in said.err, said.err
    assert r"\x1b]0;owned\x07" in shell("run", "c.yaml", "--out", "again").out


def test_data_for_others_is_unchanged(shell: Shell, url: str) -> None:
    shell.write(
        model={"name": "m"}, endpoints={"urls": [url]}, task={"prompt": "Say {text}"}, reduce=[]
    )
    assert shell("run", "c.yaml", "--out", "run").code == 0
    for line in shell("results", "run").out.splitlines():
        assert json.loads(json.loads(line)["output"])["label"] == EVIL
    assert "\x9b2J\u202e\x7f" in shell("results", "run", "--format", "csv").out
    models = json.loads(shell("cost", "run", "--by", "model", "--json").out)["model"]
    assert [row["name"] for row in models] == [f"m{EVIL}"]


def test_safe_csv(shell: Shell, url: str) -> None:
    (shell.folder / "in.csv").write_text("id,text\n=1+1,one\n-2,two\n")
    shell.write(
        model={"name": "m"}, endpoints={"urls": [url]}, task={"prompt": "Say {text}"}, reduce=[]
    )
    assert shell("run", "c.yaml", "--out", "run").code == 0
    assert shell("results", "run", "--format", "csv").out.splitlines()[1].startswith("=1+1,")
    first, second = shell("results", "run", "--format", "csv", "--safe-csv").out.splitlines()[1:]
    assert first.startswith("'=1+1,")
    assert second.startswith("-2,")
    said = shell("results", "run", "--safe-csv")
    assert said.code == 2
    assert "--safe-csv requires --format csv, not jsonl" in said.err
