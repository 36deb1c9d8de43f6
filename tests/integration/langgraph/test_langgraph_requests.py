"""What a client that can send requests to ``langgraph dev`` cannot do."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from langgraph_sdk import get_client

from fanfold.tests.integration.dev_server import Server

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("langgraph-dev")]

ITEMS = [{"id": "a", "smiles": "CCO"}]
SECRET = "the-secret-of-the-house"
WAYS: dict[str, dict[str, str]] = {
    "plain": {"Content-Type": "application/json"},
    "as text": {"Content-Type": "text/plain"},
    "foreign host": {"Host": "rebound.evil.example", "Content-Type": "text/plain"},
    "a host like loopback": {"Host": "127.0.0.1.evil.example:80"},
    "foreign origin": {"Origin": "https://evil.example", "Content-Type": "text/plain"},
    "null origin": {"Origin": "null"},
    "an origin like Studio's": {"Origin": "https://smith.langchain.com.evil.example"},
}
"""Ways to send a request: a page that is open in a browser can send all but the first."""


def sent(
    server: Server, path: str, body: Any, method: str = "POST", **headers: str
) -> tuple[int, str]:
    """Send a request as a browser would, whatever its headers; return status and text."""
    at = urlsplit(server.url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port or 0, timeout=90)
    try:
        connection.request(method, path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def all_sent(
    server: Server, path: str, bodies: list[Any], **headers: str
) -> list[tuple[int, str]]:
    """Send several requests at a time."""
    sending = (asyncio.to_thread(sent, server, path, body, **headers) for body in bodies)
    return await asyncio.gather(*sending)


def assert_refused(text: str) -> None:
    """Check that an answer says what is not allowed, and nothing was run or read."""
    assert any(
        words in text for words in ("FANFOLD_SERVER_", "outside the folder", "unknown key")
    ), text
    assert not any(words in text for words in ("progress", "solubility_class", SECRET)), text


@asynccontextmanager
async def trap() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Open a server that no request may lead to; yield its address and what it was sent."""
    seen = list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


def attacks(marker: Path, secret: Path, url: str) -> dict[str, dict[str, Any]]:
    """Return contexts that would run a command, read a file or ask a stranger."""
    touch = f"touch {marker}"
    first = {"base_url": url, "paths": ["a/b"], "token_command": touch}
    task = {"prompt": "{smiles}"}
    return {
        "token command": {"endpoint_options": {"first": first}},
        "token command by override": {
            "overrides": ["endpoints.simulated=null", f"endpoints.first={json.dumps(first)}"]
        },
        "token command by configuration": {"config": {"task": task, "endpoints": {"first": first}}},
        "node servers": {"node": {"serve": touch}},
        "launched workers": {"backend": "launched", "backend_options": {"command": touch}},
        "executor": {"overrides": ["backend={kind: executor, factory: 'os:abort'}"]},
        "item graph": {"graph": "os:abort"},
        "endpoints": {"endpoints": url},
        "endpoints file": {"endpoints": str(secret)},
        "a key": {"endpoints": url, "api_key": "${HOME}"},
        "input path": {"overrides": [f"input.path={secret}"]},
        "schema file": {"overrides": [f"task.schema={secret}"]},
        "configuration file": {"config": str(secret)},
        "run folder": {"out": str(marker)},
        "answers of others": {"cache": str(marker)},
        "examples file": {"overrides": [f"task.examples={secret}"]},
        "examples file by configuration": {"config": {"task": {**task, "examples": str(secret)}}},
        "output file": {"batch": {"output": str(marker)}},
        "output file by override": {
            "overrides": ["input.format=openai_batch", f"batch.output={marker}"]
        },
        "items that are requests": {"input_format": "openai_batch"},
        "batch service": {"backend": "batch", "backend_options": {"dir": str(marker.parent)}},
        "commands of servers": {"node": {"ready": touch, "env": {"LD_PRELOAD": str(secret)}}},
        "found endpoints": {"endpoints": "auto"},
        "endpoints of a registry": {"overrides": [f"endpoints.aegis_registry={url}"]},
        "gateway of a stranger": {"overrides": [f"endpoints.first.base_url={url}"]},
        "hosts": {"endpoint_options": {"hosts": ["127.0.0.1"], "port": int(url.rsplit(":", 1)[1])}},
        "backend of a user": {"backend_options": {"client": "os:abort", "executor": "os:abort"}},
        "load of servers": {"load": "metrics"},
        "metrics port": {"metrics_port": 65000},
    }


NAMES = list(attacks(Path("m"), Path("s"), "http://u:1"))


@pytest.fixture
def marker(plain_server: Server) -> Path:
    return plain_server.folder / "marker"


@pytest.fixture
def secret(plain_server: Server) -> Path:
    file = plain_server.folder / "secret.csv"
    file.write_text(f"smiles\n{SECRET}\n")
    return file


@pytest.mark.parametrize("way", WAYS)
async def test_no_way_to_send_an_attack_works(
    plain_server: Server, marker: Path, secret: Path, way: str
) -> None:
    """Requests of foreign pages are refused whole; the others by the name of what they set."""
    async with trap() as (url, seen):
        bodies: list[Any] = [
            {"assistant_id": "map_reduce", "input": {"items": ITEMS}, "context": context}
            for context in attacks(marker, secret, url).values()
        ]
        for status, text in await all_sent(plain_server, "/runs/wait", bodies, **WAYS[way]):
            if way in {"plain", "as text"}:
                assert_refused(text)
            else:
                assert status == 403
        assert not seen
    assert not marker.exists()


@pytest.mark.parametrize("path", ["/runs/stream", "/runs/wait"])
async def test_configurable_is_a_context_as_well(
    plain_server: Server, marker: Path, secret: Path, path: str
) -> None:
    bodies: list[Any] = [
        {
            "assistant_id": "map_reduce",
            "input": {"items": ITEMS},
            "config": {"configurable": context},
        }
        for context in attacks(marker, secret, "http://127.0.0.1:9").values()
    ]
    for _, text in await all_sent(plain_server, path, bodies):
        assert_refused(text)
    assert not marker.exists()


async def test_an_assistant_is_a_request_as_well(
    plain_server: Server, marker: Path, secret: Path
) -> None:
    async with get_client(url=plain_server.url) as client:
        made = [
            (await client.assistants.create("map_reduce", context=context))["assistant_id"]
            for context in attacks(marker, secret, "http://127.0.0.1:9").values()
        ]
        bodies: list[Any] = [{"assistant_id": one, "input": {"items": ITEMS}} for one in made]
        for _, text in await all_sent(plain_server, "/runs/wait", bodies):
            assert_refused(text)
        for one in made:
            await client.assistants.delete(one)
    assert not marker.exists()


@pytest.mark.parametrize("graph", ["map_reduce", "item"])
async def test_mcp_is_no_other_way(
    plain_server: Server, marker: Path, secret: Path, graph: str
) -> None:
    """Neither with a context beside the arguments nor within them."""
    given: Any = {"items": ITEMS} if graph == "map_reduce" else {"id": "a", "row": ITEMS[0]}
    headers = {"Accept": "application/json, text/event-stream", "Content-Type": "text/plain"}
    calls: list[Any] = [
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": graph} | params}
        for context in attacks(marker, secret, "http://127.0.0.1:9").values()
        for params in (
            {"arguments": given, "context": context},
            {"arguments": given | context},
        )
    ]
    for _, text in await all_sent(plain_server, "/mcp", calls, **headers):
        result = json.loads(text)["result"]  # the server names no more than the error's class
        assert result["isError"] is True
        assert result["content"][0]["text"] in {"ConfigurationError", "InputError"}
    assert not marker.exists()


async def test_files_are_read_below_the_root_only(plain_server: Server, secret: Path) -> None:
    shared = plain_server.folder / "shared"
    (shared / "mine.csv").write_text("mol_id,smiles\nm1,CCO\nm2,CCC\n")
    (shared / "link.csv").symlink_to(secret)
    async with get_client(url=plain_server.url) as client:
        end: Any = await client.runs.wait(None, "map_reduce", input={"path": "mine.csv"})
        assert end["progress"]["done"] == 2
        for path in (str(secret), "../secret.csv", "link.csv", "/proc/self/environ"):
            with pytest.raises(Exception, match="outside the folder"):
                await client.runs.wait(None, "map_reduce", input={"path": path})


async def test_state_is_not_a_clients_to_write(plain_server: Server, tmp_path: Path) -> None:
    """Nor is the way through the graph: a run's folder and its counts come from its nodes."""
    forged = {"run": {"id": "x", "name": "../../etc"}, "total": 1, "cursor": 0, "left": [[0, 1]]}
    async with get_client(url=plain_server.url) as client:
        thread = str((await client.threads.create())["thread_id"])
        given: Any = {"items": ITEMS}
        end: Any = await client.runs.wait(thread, "map_reduce", input=given)
        with pytest.raises(Exception, match="may not write"):
            await client.threads.update_state(thread, forged, as_node="load")
        load: Any = {"node": "load", "input": {"given": {"path": "/etc/passwd", "pasted": False}}}
        commands: list[Any] = [
            {"update": forged},
            {"goto": load},
            {"goto": "reduce"},
            {"update": forged, "resume": 1},
        ]
        for command in commands:
            with pytest.raises(Exception, match="may only answer an interrupt"):
                await client.runs.wait(thread, "map_reduce", command=command)
        state = await client.threads.get_state(thread)
        assert isinstance(state["values"], dict)
        assert state["values"]["total"] == end["progress"]["items"] == 1
        body = {
            "supersteps": [{"updates": [{"values": forged, "as_node": "load"}]}],
            "metadata": {"graph_id": "map_reduce"},
        }
        status, text = await asyncio.to_thread(sent, plain_server, "/threads", body)
        assert (status, "may not write" in text) == (422, True)
    assert not list(tmp_path.iterdir())


async def test_an_answer_where_nothing_asked_starts_nothing(plain_server: Server) -> None:
    """A fresh thread has no interrupt, and the bound batch is no answer to one."""
    runs = plain_server.folder / "fanfold-runs"
    before = sorted(runs.glob("*"))
    async with get_client(url=plain_server.url) as client:
        thread = str((await client.threads.create())["thread_id"])
        command: Any = {"resume": {"usd": 5}}
        for graph in ("map_reduce", "item"):
            with pytest.raises(Exception, match="there is nothing to resume"):
                await client.runs.wait(thread, graph, command=command)
        assert not (await client.threads.get_state(thread))["values"]
    assert sorted(runs.glob("*")) == before


@pytest.mark.parametrize(
    ("configurable", "words"),
    [({"limit": 1}, None), ({"out": "elsewhere"}, "may not set out")],
)
async def test_event_streams_start_runs_as_well(
    plain_server: Server, configurable: dict[str, Any], words: str | None
) -> None:
    """The server marks these runs in what it hands over as the context."""
    async with get_client(url=plain_server.url) as client:
        thread = str((await client.threads.create())["thread_id"])
        given = {"items": [*ITEMS, {"id": "b", "smiles": "CCC"}]}
        params = {"assistant_id": "map_reduce", "input": given}
        params["config"] = {"configurable": configurable}
        command = {"id": 1, "method": "run.start", "params": params}
        path = f"/threads/{thread}/commands"
        status, text = await asyncio.to_thread(sent, plain_server, path, command)
        assert status == 200, text
        await client.runs.join(thread, json.loads(text)["result"]["run_id"])
        end: Any = await client.threads.get(thread)
        if words is None:
            assert end["values"]["progress"]["done"] == configurable["limit"]
        else:
            assert words in end["error"]["message"]


async def test_unintended_input_starts_nothing(plain_server: Server) -> None:
    cases: list[tuple[Any, str]] = [
        ({"itemss": ITEMS}, "did you mean 'items'"),
        ({"path": ""}, "is empty"),
        ({"path": None}, "is null"),
        ({"items": []}, "is empty"),
        ({"items": ITEMS, "path": "mine.csv"}, "not both"),
        ({"items": ITEMS, "folder": "/tmp"}, "unknown key 'folder'"),
    ]
    async with get_client(url=plain_server.url) as client:
        for given, words in cases:
            with pytest.raises(Exception, match=words):
                await client.runs.wait(None, "map_reduce", input=given)
        misspelt: Any = {"streamz": 4}
        one: Any = {"items": ITEMS}
        with pytest.raises(Exception, match="did you mean 'streams'"):
            await client.runs.wait(None, "map_reduce", input=one, context=misspelt)


async def test_what_is_open_works_and_is_remembered(plain_server: Server) -> None:
    """Settings of a run's first request hold for the next one; variables are plain text."""
    context: Any = {
        "preset": "data_annotation",
        "system": "Path: ${PATH}",
        "prompt": "Rate {x}.",
        "answer_schema": {
            "type": "object",
            "required": ["score"],
            "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
        },
        "reduce": [{"op": "stats", "field": "score"}],
        "streams": 2,
        "overrides": [
            "model.temperature=0.5",
            "model.extra_body={top_k: 5}",
            "task.examples=null",
            "evaluate=null",
        ],
    }
    async with get_client(url=plain_server.url) as client:
        thread = str((await client.threads.create())["thread_id"])
        given: Any = {"items": [{"x": str(n)} for n in range(3)]}
        end: Any = await client.runs.wait(thread, "map_reduce", input=given, context=context)
        assert end["aggregate"][0]["count"] == 3
        kept = Path(end["results"]["folder"], "run.yaml").read_text()
        assert "$${PATH}" in kept
        assert "temperature: 0.5" in kept
        history = await client.threads.get_history(thread)
        (point,) = [state["checkpoint"] for state in history if state["next"] == ["reduce"]]
        again: Any = await client.runs.wait(thread, "map_reduce", checkpoint=point)
        assert again["aggregate"] == end["aggregate"]
        preset: Any = {"config": "data_annotation", "limit": 1}
        end = await client.runs.wait(None, "map_reduce", input={}, context=preset)
        assert end["progress"]["items"] == 1


async def test_the_form_hides_what_is_closed(plain_server: Server) -> None:
    async with get_client(url=plain_server.url) as client:
        for one in await client.assistants.search():
            schemas: Any = await client.assistants.get_schemas(one["assistant_id"])
            for kind in ("context_schema", "config_schema"):
                form = (schemas[kind] or {})["properties"]
                assert {"preset", "config", "prompt", "streams", "usd", "model"} <= form.keys()
                assert not form.keys() & {
                    "api_key",
                    "backend",
                    "backend_options",
                    "cache",
                    "endpoint_options",
                    "endpoints",
                    "graph",
                    "metrics_port",
                    "node",
                    "out",
                    "price",
                    "retry_failed",
                    "trace",
                }


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "https://smith.langchain.com"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost:2024"}, 200),
        ({"Host": "[::1]:2024"}, 200),
        ({"Host": "192.0.2.7:2024"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:80.evil.example"}, 403),
        ({"Origin": "file://"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/ok", "/docs", "/assistants/search"])
def test_hosts_and_origins(
    plain_server: Server, path: str, headers: dict[str, str], status: int
) -> None:
    method = "POST" if "search" in path else "GET"
    assert sent(plain_server, path, {}, method, **headers)[0] == status


def test_no_foreign_page_is_told_that_it_may_read(plain_server: Server) -> None:
    at = urlsplit(plain_server.url)
    for origin, allowed in (
        ("https://smith.langchain.com", True),
        ("http://localhost:5173", True),
        ("https://evil.example", False),
    ):
        connection = http.client.HTTPConnection(at.hostname or "", at.port or 0, timeout=30)
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", "/runs/wait", headers=asked)
        found = connection.getresponse().getheader("access-control-allow-origin")
        connection.close()
        assert (found == origin) is allowed
