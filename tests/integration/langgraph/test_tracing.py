"""What a LangSmith project receives, recorded by a listener in its place."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langsmith import Client, tracing_context

from fanfold import RunContext, build_graph
from fanfold.backends.simulated.fleet import SimulatedFleet

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
