"""``langgraph dev`` serves the graphs by MCP as well, to any MCP client."""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent

from fanfold.tests.integration.dev_server import Server

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("langgraph-dev")]


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[ClientSession]:
    async with (
        streamable_http_client(f"{server.url}/mcp/") as (receive, send),
        ClientSession(receive, send) as session,
    ):
        await session.initialize()
        yield session


async def test_an_mcp_client_finds_and_calls_the_graphs(dev_server: Server) -> None:
    async with connected(dev_server) as client:
        found = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(found) == {"map_reduce", "item"}
        assert "every item of a batch" in (found["map_reduce"].description or "")
        assert "one item" in (found["item"].description or "")
        given = found["map_reduce"].input_schema["properties"]
        assert given["items"]["type"] == "array"
        assert {"id", "row"} <= found["item"].input_schema["properties"].keys()

        items = [{"id": "ethanol", "smiles": "CCO"}, {"id": "benzene", "smiles": "c1ccccc1"}]
        answer = await client.call_tool("map_reduce", {"items": items})
        end = ast.literal_eval(_text(answer))
        assert end["progress"]["done"] == 2
        assert end["results"]["simulated"] is True
        assert [row["id"] for row in end["aggregate"][0]["rows"]] == ["ethanol", "benzene"]

        answer = await client.call_tool("item", {"id": "ethanol", "row": {"smiles": "CCO"}})
        assert "solubility_class" in _text(answer)


def _text(answer: CallToolResult) -> str:
    """Return a tool's answer; the server writes it in Python's notation."""
    (content,) = answer.content
    assert isinstance(content, TextContent)
    assert not answer.is_error, content.text
    return content.text
