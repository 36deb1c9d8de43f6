"""Capacity, connections and addresses of the simulated fleet."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp
import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.requests import Question
from fanfold.backends.simulated.responders import RESPONDERS
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

ONE = SimulationSpec.fast(nodes=1)
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 8}


async def ask(http: aiohttp.ClientSession, url: str, **body: Any) -> dict[str, Any]:
    async with http.post(f"{url}/chat/completions", json={**BODY, **body}) as response:
        return {"status": response.status, **(await response.json())}


async def settle(fleet: SimulatedFleet, **wanted: int) -> None:
    while {k: fleet.stats()["nodes"][0][k] for k in wanted} != wanted:  # noqa: ASYNC110 - polls
        await asyncio.sleep(0)


@pytest.mark.parametrize("addressing", ["path", "port", "addr"])
async def test_each_node_has_its_address(addressing: str) -> None:
    spec = SimulationSpec.fast(nodes=3, addressing=addressing)
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        assert len(set(fleet.urls)) == 3
        for node, url in enumerate(fleet.urls):
            assert (await ask(http, url))["status"] == 200
            assert fleet.stats()["nodes"][node]["requests"] == 1


async def test_answers_do_not_depend_on_the_node() -> None:
    async with SimulatedFleet(SimulationSpec.fast()) as fleet, aiohttp.ClientSession() as http:
        answers = [await ask(http, url, max_tokens=50) for url in fleet.urls]
        assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
        assert len({answer["id"] for answer in answers}) == 8
        totals = fleet.stats()["questions"]
        assert (totals["distinct"], totals["served"], totals["duplicates"]) == (1, 8, 7)
        assert totals["wasted_tokens"] == 7 * answers[0]["usage"]["total_tokens"]


async def test_slots_and_queue() -> None:
    spec = SimulationSpec.fast(
        nodes=1, ttft_s=0.02, capacities={0: 2}, max_num_queued_reqs=3, max_num_seqs=9
    )
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        answers = await asyncio.gather(*(ask(http, fleet.urls[0], seed=n) for n in range(7)))
        assert sorted(answer["status"] for answer in answers) == [200] * 5 + [503] * 2
        node = fleet.stats()["nodes"][0]
        assert (node["running_max"], node["waiting_max"]) == (2, 3)
        assert (node["running"], node["waiting"]) == (0, 0)
        assert node["refused"] == {"503": 2}


async def test_leaving_frees_slots_and_places() -> None:
    spec = SimulationSpec.fast(nodes=1, ttft_s=3600.0, max_num_seqs=1)
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        calls = []
        for n in range(3):
            calls.append(asyncio.create_task(ask(http, fleet.urls[0], seed=n)))
            await settle(fleet, running=1, waiting=n)
        for call, left in ((calls[1], (1, 1)), (calls[0], (1, 0)), (calls[2], (0, 0))):
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await settle(fleet, running=left[0], waiting=left[1])
        assert fleet.stats()["totals"]["disconnects"] == 3
        assert fleet.stats()["totals"]["finished"] == {}


async def test_leaving_a_stream() -> None:
    spec = SimulationSpec.fast(nodes=1, tpot_s=3600.0)
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        body = {**BODY, "stream": True}
        async with http.post(f"{fleet.urls[0]}/chat/completions", json=body) as response:
            assert await response.content.readline()
        await settle(fleet, running=0, disconnects=1)


async def test_a_streamed_tool_call() -> None:
    why = {"const": "water " * 20}
    schema = {"type": "object", "properties": {"why": why}, "required": ["why"]}
    tool = {"type": "function", "function": {"name": "rate", "parameters": schema}}
    body = {**BODY, "tools": [tool], "tool_choice": "required", "stream": True, "max_tokens": 99}
    async with (
        SimulatedFleet(ONE) as fleet,
        aiohttp.ClientSession() as http,
        http.post(f"{fleet.urls[0]}/chat/completions", json=body) as response,
    ):
        events = [line[6:] for line in (await response.read()).split(b"\n\n") if line]
    choices = [orjson.loads(event)["choices"][0] for event in events[:-1]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [call["function"].get("name") for call in calls] == ["rate"] + [None] * (len(calls) - 1)
    assert calls[0]["type"] == "function"
    assert orjson.loads("".join(call["function"]["arguments"] for call in calls))["why"]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_tokenize() -> None:
    async with (
        SimulatedFleet(ONE) as fleet,
        aiohttp.ClientSession() as http,
    ):
        url = fleet.urls[0].removesuffix("/v1") + "/tokenize"
        async with http.post(url, json={"prompt": "12345678"}) as response:
            assert (await response.json())["count"] == 2
        async with http.post(url, json={"prompt": "12345678", "model": "other"}) as response:
            assert response.status == 404
        async with http.get(f"{fleet.control_url}/elsewhere") as response:
            assert response.status == 404


@pytest.mark.parametrize(("mode", "expected"), [("null", None), ("omit", "left out")])
async def test_usage_modes(mode: str, expected: str | None) -> None:
    spec = SimulationSpec.fast(nodes=1, usage=mode)
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        assert (await ask(http, fleet.urls[0])).get("usage", "left out") == expected


async def test_usage_details() -> None:
    spec = SimulationSpec.fast(nodes=1, usage="details")
    async with SimulatedFleet(spec) as fleet, aiohttp.ClientSession() as http:
        usage = (await ask(http, fleet.urls[0]))["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_own_responders() -> None:
    def echo(question: Question) -> str:
        return str(question.messages[-1]["content"])

    responders = {**RESPONDERS, "echo": lambda _: echo}
    spec = SimulationSpec.fast(nodes=1, responder="echo")
    async with SimulatedFleet(spec, responders) as fleet, aiohttp.ClientSession() as http:
        answer = await ask(http, fleet.urls[0])
        assert answer["choices"][0]["message"]["content"] == "What?"


async def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
            async with SimulatedFleet(SimulationSpec.fast(port=port)):
                pass


async def test_a_port_beyond_the_last() -> None:
    spec = SimulationSpec.fast(nodes=3, port=65_535, addressing="port")
    with pytest.raises(ConfigurationError, match=r"65536|65535"):
        async with SimulatedFleet(spec):
            pass


async def test_closing_ends_what_waits() -> None:
    async with aiohttp.ClientSession() as http:
        async with SimulatedFleet(SimulationSpec.fast(nodes=1, ttft_s=3600.0)) as fleet:
            call = asyncio.create_task(ask(http, fleet.urls[0]))
            await settle(fleet, running=1)
        with pytest.raises(aiohttp.ClientConnectionError):
            await call


async def talk(fleet: SimulatedFleet, *parts: bytes) -> bytes:
    host, _, port = fleet.control_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_requests_in_any_wrapping() -> None:
    payload = orjson.dumps(BODY)
    head = b"POST /node-0/v1/chat/completions HTTP/1.1\r\nConnection: close\r\n"
    length = b"Content-Length: %d\r\n" % len(payload)
    async with SimulatedFleet(ONE) as fleet:
        for parts in (
            [head + length + b"\r\n" + payload],
            [head, length, b"\r\n", payload[:9], payload[9:]],
            [head + b"Expect: 100-continue\r\n" + length + b"\r\n", payload],
            [
                head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + payload[:5],
                b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(payload) - 5, payload[5:]),
            ],
        ):
            answer = await talk(fleet, *parts)
            assert b"HTTP/1.1 200 OK" in answer
        assert fleet.stats()["questions"]["duplicates"] == 3


async def test_pipelined_requests_are_answered_in_turn() -> None:
    get = b"GET /node-0/version HTTP/1.1\r\n\r\n"
    last = b"GET /node-9/version HTTP/1.1\r\nConnection: close\r\n\r\n"
    async with SimulatedFleet(ONE) as fleet:
        answer = await talk(fleet, get + get + last)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"x" * 70_000, b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ],
    ids=["nonsense", "endless", "chunk"],
)
async def test_what_is_no_request_is_refused(data: bytes, status: bytes) -> None:
    async with SimulatedFleet(ONE) as fleet:
        assert (await talk(fleet, data)).startswith(b"HTTP/1.1 " + status)
