"""Every fault, as a client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What?"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
}


class Client:
    def __init__(self, fleet: SimulatedFleet, http: aiohttp.ClientSession) -> None:
        self.fleet = fleet
        self.http = http

    async def raw(self, node: int = 0, **body: Any) -> tuple[int, bytes, Any]:
        url = f"{self.fleet.urls[node]}/chat/completions"
        headers = body.pop("headers", {})
        async with self.http.post(url, json={**BODY, **body}, headers=headers) as response:
            return response.status, await response.read(), response.headers

    async def ask(self, node: int = 0, **body: Any) -> tuple[int, Any]:
        status, data, _ = await self.raw(node, **body)
        return status, orjson.loads(data)

    async def stream(self, node: int = 0) -> str:
        return (await self.raw(node, stream=True))[1].decode()

    async def control(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.http.post(f"{self.fleet.control_url}/_sim/{path}", json=body) as response:
            return response.status, await response.json()

    async def get(self, path: str, node: int = 0) -> int:
        url = self.fleet.urls[node].removesuffix("/v1")
        async with self.http.get(f"{url}{path}") as response:
            return response.status


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the fleet has no event for it
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(*faults: FaultRule, **spec: Any) -> AsyncIterator[Client]:
    whole = SimulationSpec.fast(**{"nodes": 2, "faults": faults, **spec})
    async with SimulatedFleet(whole) as fleet, aiohttp.ClientSession() as http:
        yield Client(fleet, http)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("500", 500, "InternalServerError"),
        ("500_text", 500, "Internal Server Error"),
        ("502_html", 502, "<html>"),
        ("503", 503, "ServiceUnavailableError"),
        ("503_busy", 503, "Service Unavailable"),
        ("504", 504, "internal_endpoint_error"),
        ("429", 429, "Too Many Requests"),
        ("malformed", 200, '{"id"'),
        ("html200", 200, "<html>"),
        ("error200", 200, '{"error"'),
        ("null_choices", 200, '"choices":null'),
        ("empty_choices", 200, '"choices":[]'),
        ("no_usage", 200, '"usage":null'),
        ("empty_content", 200, '"content":""'),
        ("content_filter", 200, '"finish_reason":"content_filter"'),
        ("refusal", 200, '"refusal":"I'),
        ("bad_schema", 200, '"content":"{}"'),
    ],
)
async def test_answers_of_a_fault(kind: str, status: int, words: str) -> None:
    async with serving(FaultRule(kind)) as client:
        got, body, headers = await client.raw()
        assert got == status
        assert words in body.decode()
        assert headers["content-length"] == str(len(body))
        assert client.fleet.stats()["totals"]["injected"] == {kind: 1}
        if kind == "malformed":
            with pytest.raises(orjson.JSONDecodeError):
                orjson.loads(body)


async def test_retry_after() -> None:
    rules = (
        FaultRule("429_ra", value=7, max_count=1),
        FaultRule("429_ra", value=300, max_count=1, shape="first"),
        FaultRule("429_ra", value=60, http_date=True),
    )
    async with serving(*rules) as client:
        assert (await client.raw())[2]["retry-after"] == "7"
        _, body, headers = await client.raw()
        assert (headers["retry-after"], body) == ("300", b'{"detail":"Too many requests."}')
        assert parsedate_to_datetime((await client.raw())[2]["retry-after"]).year > 2020


@pytest.mark.parametrize("kind", ["drop", "reset", "cut_body"])
async def test_broken_connections(kind: str) -> None:
    async with serving(FaultRule(kind, max_count=1)) as client:
        with pytest.raises((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
            await client.raw()
        assert (await client.ask())[0] == 200


async def test_a_hang_lasts_until_the_client_leaves() -> None:
    async with serving(FaultRule("hang", max_count=1)) as client:
        call = asyncio.create_task(client.raw())
        await until(lambda: bool(client.fleet.stats()["totals"]["injected"]))
        assert (await client.ask(node=1))[0] == 200
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await client.ask())[0] == 200


async def test_token_window() -> None:
    async with serving(FaultRule("tpm", value=5)) as client:
        assert (await client.ask())[0] == 200
        status, body = await client.ask()
        assert (status, body["error"]["code"]) == (429, "too_many_requests")


async def test_cold_start() -> None:
    async with serving(FaultRule("cold", nodes=(0,), value=100.0)) as client:
        assert await client.get("/health") == 503
        status, body = await client.ask()
        assert status == 503
        assert "not ready to receive tasks" in body["error"]["message"]
        client.fleet._started -= 100
        assert await client.get("/health") == 200
        assert (await client.ask())[0] == 200


async def test_an_expired_token() -> None:
    async with serving() as client:
        old, new = ({"Authorization": f"Bearer {name}"} for name in ("old", "new"))
        client.fleet.add_fault(FaultRule("401_after", value=3600.0))
        assert (await client.ask(headers=old))[0] == 200
        client.fleet._started -= 3600
        status, body = await client.ask(headers=old)
        assert (status, body["error"]["code"]) == (401, "unauthorized")
        assert (await client.ask(headers=new))[0] == 200


async def test_api_key() -> None:
    async with serving(api_key="right") as client:
        assert await client.ask() == (401, {"error": "Unauthorized"})
        assert (await client.ask(headers={"Authorization": "Bearer right"}))[0] == 200
        assert await client.get("/health") == 200


async def test_a_small_context() -> None:
    async with serving(FaultRule("context", nodes=(1,), value=20)) as client:
        long = [{"role": "user", "content": "word " * 50}]
        assert (await client.ask(messages=long))[0] == 200
        status, body = await client.ask(node=1, messages=long)
        assert (status, body["error"]["param"]) == (400, "input_tokens")
        answer = (await client.ask(node=1, response_format=None, max_tokens=20))[1]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 20


async def test_a_slow_node_is_counted() -> None:
    async with serving(FaultRule("slow", nodes=(1,), value=0.5)) as client:
        await client.ask()
        await client.ask(node=1)
        assert client.fleet.stats()["nodes"][1]["injected"] == {"slow": 1}
        assert client.fleet.stats()["nodes"][0]["injected"] == {}


async def test_an_idle_connection_is_closed() -> None:
    async with serving(FaultRule("keepalive_race", value=0.01)) as client:
        reader, writer = await _open(client.fleet.control_url)
        writer.write(b"GET /node-0/health HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).endswith(b"200 OK\r\n")
        await reader.read()  # ends when the server closes
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("stream_error", '"error"'),
        ("stream_no_finish", "[DONE]"),
        ("stream_api_error", "chatcmpl-api-error"),
    ],
)
async def test_streams_that_end_badly(kind: str, words: str) -> None:
    async with serving(FaultRule(kind)) as client:
        text = await client.stream()
        assert words in text
        assert ('"finish_reason":"stop"' in text) == (kind == "stream_api_error")
        assert (await client.ask())[0] == 200
        assert client.fleet.stats()["questions"]["served"] == 1


async def test_a_cut_stream() -> None:
    async with serving(FaultRule("stream_cut")) as client:
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
            await client.stream()


@pytest.mark.parametrize("kind", ["html200", "no_usage", "bad_schema", "refusal"])
async def test_streams_with_faults_of_answers(kind: str) -> None:
    async with serving(FaultRule(kind)) as client:
        text = await client.stream()
        assert ("data: " in text) == (kind != "html200")
        assert '"usage"' not in text


async def test_bad_answers_are_cured_by_a_repair_round() -> None:
    async with serving(FaultRule("bad_schema", draw="item", first_round=True)) as client:
        bad = (await client.ask())[1]["choices"][0]["message"]
        again = (await client.ask(node=1))[1]["choices"][0]["message"]
        assert bad["content"] == again["content"] == "{}"
        repair = [*BODY["messages"], {"role": "assistant", "content": "{}"}, BODY["messages"][0]]
        good = (await client.ask(messages=repair))[1]["choices"][0]["message"]
        assert good["content"] == '{"a":null}'


async def test_the_same_item_fails_on_every_node() -> None:
    async with serving(FaultRule("500", p=0.5, draw="item")) as client:
        fates = []
        for n in range(20):
            messages = [{"role": "user", "content": f"Item {n}"}]
            one, two = [(await client.ask(node, messages=messages))[0] for node in (0, 1)]
            assert one == two
            fates.append(one)
        assert set(fates) == {200, 500}


@pytest.mark.parametrize("addressing", ["path", "port"])
async def test_death_and_revival(addressing: str) -> None:
    async with serving(addressing=addressing, ttft_s=30.0) as client:
        call = asyncio.create_task(client.raw())
        await until(lambda: client.fleet.stats()["nodes"][0]["running"] == 1)
        await client.fleet.kill(0)
        with pytest.raises(aiohttp.ClientConnectionError):
            await call
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get("/health")
        assert await client.get("/health", node=1) == 200
        assert not client.fleet.stats()["nodes"][0]["alive"]
        await client.fleet.revive(0)
        await client.fleet.revive(0)
        assert await client.get("/health") == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_graceful_death_answers_with_abort(stream: bool) -> None:
    async with serving(ttft_s=30.0, addressing="port", max_num_seqs=1) as client:
        calls = [asyncio.create_task(client.raw(stream=stream)) for _ in range(2)]
        await until(lambda: client.fleet.stats()["nodes"][0]["waiting"] == 1)
        await client.fleet.kill(0, graceful=True)
        for status, body, _ in await asyncio.gather(*calls):
            assert status == 200
            assert b'"finish_reason":"abort"' in body
        assert client.fleet.stats()["totals"]["finished"] == {"abort": 2}
        assert client.fleet.stats()["questions"]["served"] == 0


async def test_planned_death_and_revival() -> None:
    rules = (FaultRule("die_at", nodes=(0,), value=1.0), FaultRule("revive_at", value=2.0))
    async with serving(*rules, time_scale=1000.0) as client:
        await until(lambda: client.fleet.stats()["nodes"][0]["injected"] == {"die_at": 1})
        await until(lambda: bool(client.fleet.stats()["nodes"][0]["alive"]))
        assert await client.get("/health") == 200


async def test_control_plane() -> None:
    async with serving() as client:
        rule = FaultRule("500", max_count=1).to_mapping()
        assert await client.control("fault", **rule) == (200, {})
        assert (await client.ask())[0] == 500
        assert await client.control("kill?node=1") == (200, {})
        assert not client.fleet.stats()["nodes"][1]["alive"]
        assert await client.control("revive?node=1") == (200, {})
        assert client.fleet.stats()["nodes"][1]["alive"]
        assert await client.control("reset") == (200, {})
        assert client.fleet.stats()["totals"]["requests"] == 0
        for wrong in ("kill?node=7", "kill?node=x", "kill", "fault"):
            status, body = await client.control(wrong)
            assert (status, body["error"]["code"]) == (400, 400)
        assert (await client.control("nothing"))[0] == 404
        await client.ask()
        async with client.http.get(f"{client.fleet.control_url}/_sim/stats?prompts=1") as response:
            stats = await response.json()
        assert [prompt["served"] for prompt in stats["prompts"].values()] == [1]


async def test_a_fault_on_a_node_that_does_not_exist() -> None:
    async with serving() as client:
        with pytest.raises(ConfigurationError, match="numbered from 0 to 1"):
            client.fleet.add_fault(FaultRule("500", nodes=(2,)))


async def _open(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))
