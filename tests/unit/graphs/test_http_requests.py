"""HTTP requests that LangGraph's server accepts: by host name and origin."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from fanfold.graphs.integrations.http_app import HOSTS_ENV, SourceMiddleware

HTTP = json.loads((files("fanfold") / "langgraph.json").read_text())["http"]


async def taken(
    headers: dict[str, str], kind: str = "http", root: str = "", **environment: str
) -> bool:
    """Say whether a request reaches the application behind the check."""
    reached, told = list[str](), list[Any]()

    async def app(scope: Any, *_: Any) -> None:
        reached.append(scope["type"])

    async def receive() -> Any:
        return {"type": f"{kind}.connect"}

    async def send(message: Any) -> None:
        told.append(message)

    named = [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()]
    scope: Any = {"type": kind, "path": "/", "headers": named, "root_path": root, "method": "POST"}
    check = SourceMiddleware(app, {"LANGGRAPH_HTTP": json.dumps(HTTP), **environment})
    await check(scope, receive, send)
    assert bool(reached) != bool(told)
    if told:
        refused = told[0].get("status") == 403 or told[0]["type"] == "websocket.close"
        assert refused
    return bool(reached)


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:2024", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("[::1]:2024", True),
        ("node17:2024", False),
        ("192.0.2.7", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.", False),
        ("evil.example#localhost", False),
        ("evil.example/localhost", False),
        ("[::1", False),
        ("", False),
    ],
)
async def test_the_host_is_this_machine(kind: str, host: str, allowed: bool) -> None:
    assert await taken({"Host": host}, kind) is allowed


async def test_a_request_without_a_host_is_refused() -> None:
    assert not await taken({})


async def test_the_owner_names_hosts() -> None:
    names = {HOSTS_ENV: "node17, API.example"}
    for host in ("node17:2024", "api.example"):
        assert await taken({"Host": host}, **names)
        assert await taken({"Host": host, "Origin": f"https://{host}"}, **names)
    assert not await taken({"Host": "node18"}, **names)
    assert not await taken({"Host": "node17", "Origin": "https://evil.example"}, **names)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://smith.langchain.com", True),
        ("http://localhost:5173", True),
        ("http://127.0.0.1", True),
        ("http://smith.langchain.com", False),
        ("https://smith.langchain.com.evil.example", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost:80@evil.example", False),
        ("http://127x0x0x1", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_origins(kind: str, origin: str, allowed: bool) -> None:
    assert await taken({"Host": "localhost", "Origin": origin}, kind) is allowed


async def test_the_server_itself_may_ask() -> None:
    """Its own requests have a root path that no request from outside can have."""
    assert await taken({"Host": "api"}, root="/noauth")
    assert await taken({"Host": "api"}, root="/noauth/prefix")
    assert not await taken({"Host": "api"}, root="/noauthority")
    assert await taken({}, kind="lifespan")
