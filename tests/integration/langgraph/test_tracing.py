"""What a LangSmith project receives, recorded by a listener in its place."""

from __future__ import annotations

import email
import email.policy
import json
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from langchain_core.runnables import RunnableLambda
from langsmith import Client, tracing_context

from fanfold import RunContext, build_graph
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = pytest.mark.integration


class Listener(BaseHTTPRequestHandler):
    """Counts the runs posted, by name."""

    names: Counter[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/runs":
            self.names[json.loads(body)["name"]] += 1
        self._answer()

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture
def traced() -> Iterator[Counter[str]]:
    """Trace to a listener; yield its counts."""
    names = Counter[str]()
    handler = type("Counting", (Listener,), {"names": names})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    client = Client(api_url=url, api_key="none", auto_batch_tracing=False)
    try:
        with tracing_context(enabled=True, client=client):
            yield names
    finally:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


def user_agent(model: Any) -> Any:
    """A user's item graph: one traced step around the model's call."""

    async def ask(given: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(given["messages"])]}

    return RunnableLambda(ask).with_config(run_name="ask-my-way")


@pytest.mark.parametrize(
    ("count", "trace", "graph", "each"),
    [
        (4, False, None, {"prepare": 4, "infer": 4, "ChatFleet": 4}),
        (201, False, None, {"prepare": 0, "infer": 0, "ChatFleet": 0}),
        (201, True, None, {"prepare": 201, "infer": 201, "ChatFleet": 201}),
        (4, False, "test_tracing:user_agent", {"delegate": 4, "ask-my-way": 4}),
        (201, False, "test_tracing:user_agent", {"ask-my-way": 0, "ChatFleet": 0}),
    ],
)
async def test_above_200_items_traces_are_per_shard(  # noqa: PLR0913, PLR0917 - a table's columns
    simulated: SimulatedFleet,
    traced: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    trace: bool,
    graph: str | None,
    each: dict[str, int],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = {
        "task": {"prompt": "{x}", "graph": graph},
        "endpoints": {"urls": list(simulated.urls)},
    }
    items = [{"x": f"thing {n}"} for n in range(count)]
    end = await build_graph(RunContext(config=config, trace=trace)).ainvoke({"items": items})
    assert end["progress"]["done"] == count
    assert traced["shard"] == (count if count <= 200 else 1)
    assert {name: traced[name] for name in each} == each


@dataclass
class LangSmith:
    """What LangSmith's ingestion routes were sent, by run.

    Attributes:
        url: Where it listens.
        runs: By the run's id: name, parent and all parts, among them inputs and outputs.
        raw: All bodies.
    """

    url: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    raw: bytes = b""

    async def tell(self, _: web.Request) -> web.Response:
        batches = {
            "use_multipart_endpoint": True,
            "size_limit": 100,
            "size_limit_bytes": 20_971_520,
            "scale_up_qsize_trigger": 1000,
            "scale_up_nthreads_limit": 16,
            "scale_down_nempty_trigger": 4,
        }
        return web.json_response({"batch_ingest_config": batches, "instance_flags": {}})

    async def ingest(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + body, EmailMessage, policy=email.policy.HTTP)
        for part in message.iter_parts():
            name = part.get_param("name", header="content-disposition")
            _, run, *key = str(name).split(".")
            value = json.loads(part.get_content())
            self.runs.setdefault(run, {}).update({key[0]: value} if key else value)
        return web.json_response({})

    def named(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if run["name"] == name]

    async def trace(
        self,
        folder: Path,
        *arguments: str,
        program: str | None = None,
        code: int = 0,
        **variables: str,
    ) -> tuple[str, str]:
        """Run a command or program whose traces come here; return its output and error output."""
        told = {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": self.url}
        environment = os.environ | told | {"LANGSMITH_API_KEY": "lsv2_pt_none"} | variables
        command = Command(arguments, program, str(folder), environment)
        done = await get_command_server().run(command)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest_asyncio.fixture
async def langsmith() -> AsyncIterator[LangSmith]:
    one, app = LangSmith(), web.Application(client_max_size=10**9)
    app.router.add_get("/info", one.tell)
    app.router.add_post("/runs/multipart", one.ingest)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


SETTINGS: dict[str, Any] = {
    "name": "traced",
    "task": {"prompt": "Ask about {x}.", "schema": {"type": "object", "required": ["score"]}},
    "endpoints": {"simulated": {"nodes": 2, "time_scale": 1000}},
    "reduce": [{"op": "count"}],
}
PROGRAM = """
import json, sys
from langchain_core.tracers.langchain import wait_for_all_tracers
from fanfold import build_graph
settings, count = json.loads(sys.argv[1]), int(sys.argv[2])
end = build_graph(settings).invoke({"items": [{"x": f"thing-{n:05}"} for n in range(count)]})
wait_for_all_tracers()
"""
NODES = ("__start__", "load", "dispatch", "shard", "gather", "reduce", "prepare", "infer")
HIDDEN = {"LANGSMITH_HIDE_INPUTS": "true", "LANGSMITH_HIDE_OUTPUTS": "true"}


async def invoked(langsmith: LangSmith, tmp_path: Path, count: int, **more: Any) -> str:
    given = json.dumps(SETTINGS), str(count)
    return (await langsmith.trace(tmp_path, *given, program=PROGRAM, **more))[1]


@pytest.mark.parametrize("count", [3, 1000])
async def test_only_the_graph_and_the_model_send_items(
    langsmith: LangSmith, tmp_path: Path, count: int
) -> None:
    """Pasted items are the input of the graph's run; its nodes send names and times."""
    await invoked(langsmith, tmp_path, count)
    (root,) = (run for run in langsmith.named("LangGraph") if run.get("parent_run_id") is None)
    assert len(root["inputs"]["items"]) == count
    assert root["outputs"]["progress"]["done"] == count
    for name in NODES if count == 3 else NODES[:6]:
        found = langsmith.named(name)
        assert found, name
        assert all(not run["inputs"] and not run["outputs"] for run in found), name
        assert all(run["end_time"] for run in found)
    asked = langsmith.named("ChatFleet")
    assert len(asked) == (3 if count == 3 else 0)
    assert all("Ask about thing-" in json.dumps(run["inputs"]) for run in asked)
    known = {*NODES, "validate", "ChatFleet", "LangGraph"}
    assert {run["name"] for run in langsmith.runs.values()} <= known
    if count == 1000:
        assert langsmith.raw.count(b"thing-00007") <= 2  # when the run starts, and at its end


async def test_many_pasted_items_are_not_traced(langsmith: LangSmith, tmp_path: Path) -> None:
    error = await invoked(langsmith, tmp_path, 1001, code=1)
    assert "1,001 items are pasted while LangSmith tracing is on" in error
    assert "LANGSMITH_HIDE_INPUTS=true" in error
    assert not langsmith.runs
    assert not list(tmp_path.iterdir()), "no run folder, so nothing was asked"


@pytest.mark.parametrize("count", [3, 1001])
async def test_hidden_payloads_stay_here(langsmith: LangSmith, tmp_path: Path, count: int) -> None:
    await invoked(langsmith, tmp_path, count, **HIDDEN)
    assert langsmith.named("reduce")
    assert b"thing-" not in langsmith.raw
    for run in langsmith.runs.values():  # the schema is a parameter of the model, and no payload
        told = {key: run.get(key) for key in ("inputs", "outputs", "events", "error")}
        assert "score" not in json.dumps(told)


@pytest.mark.parametrize(("count", "asked"), [(4, 4), (201, 0)])
async def test_check_says_what_a_command_sends(
    langsmith: LangSmith, tmp_path: Path, count: int, asked: int
) -> None:
    lines = ["x", *(f"thing-{n:05}" for n in range(count))]
    (tmp_path / "items.csv").write_text("\n".join(lines))
    settings = tmp_path / "mine.yaml"
    settings.write_text(json.dumps(SETTINGS | {"input": {"path": "items.csv"}}))
    said = " ".join(await langsmith.trace(tmp_path, "check", str(settings)))
    assert "gets prompts of up to 200 items" in " ".join(said.split())
    assert not langsmith.runs
    await langsmith.trace(tmp_path, "run", str(settings), "--out", "run")
    (root,) = (run for run in langsmith.named("LangGraph") if run.get("parent_run_id") is None)
    assert root["inputs"] == {}
    assert len(langsmith.named("ChatFleet")) == asked
    assert (b"thing-" in langsmith.raw) is (asked > 0)
