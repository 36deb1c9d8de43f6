"""What is sent to an address, and how much is read from it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import logging
import resource
import sys
import zlib
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import globus_sdk
import orjson
import pytest

from fanfold.backends.budget.tokens import TokenCounter
from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    EndpointError,
    EndpointLostError,
    EndpointReplyError,
    NoEndpointError,
    RunStoppedError,
)
from fanfold.backends.core.types import Reply
from fanfold.backends.discovery.gateway import Gateway
from fanfold.backends.discovery.login import CommandToken
from fanfold.backends.discovery.probe import probe_models
from fanfold.backends.discovery.sources import RegistrySource
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams, RetryPolicy, TimeoutPolicy
from fanfold.backends.fleet.server_load import read_server_loads
from fanfold.backends.fleet.transport import Transport
from fanfold.backends.workers.globus.service import ComputeService
from fanfold.backends.workers.launched.worker import run_worker

from .conftest import completion
from .raw_server import Answer, RawServer, Request, good, head, plain, serving

pytestmark = pytest.mark.integration

KEY = "sk-own-key"
LIMIT = 1 << 20
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
PROXY_NAMES = ("http_proxy", "https_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_NAMES, *map(str.upper, PROXY_NAMES)):
        monkeypatch.delenv(name, raising=False)


def small() -> FleetPolicy:
    retry = RetryPolicy(attempts=2, backoff_s=0.001, refusal_pause_s=0.001)
    return FleetPolicy(retry=retry, body_bytes=LIMIT, timeout=TimeoutPolicy(fleet_s=0.1))


def ask(fleet: Fleet) -> Awaitable[Reply]:
    return FleetClient(fleet, ModelParams("m")).ask(BODY["messages"])


async def read_stream(fleet: Fleet) -> bytes:
    stream, _ = await fleet.open_stream(BODY)
    return b"".join([line async for line in stream.lines()])


def spec(server: RawServer, proxied: bool = False) -> EndpointSpec:
    return EndpointSpec(f"{server.url}/v1", KEY, proxied=proxied)


def endless(block: bytes) -> Iterator[bytes]:
    """Yield more than any test reads: 1.5 GB."""
    return itertools.repeat(block, 1_500_000_000 // len(block))


def chunked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield head(Transfer_Encoding="chunked", Content_Type="application/json")
    for block in blocks:
        yield f"{len(block):x}\r\n".encode() + block + b"\r\n"
    yield b"0\r\n\r\n"


def bomb(wbits: int) -> bytes:
    """Return 40 MB of blanks, compressed to some hundred kilobytes."""
    press = zlib.compressobj(1, zlib.DEFLATED, wbits)
    block = b" " * 1_000_000
    return b"".join(press.compress(block) for _ in range(40)) + press.flush()


LARGE: dict[str, Answer] = {
    "length": lambda _: itertools.chain(
        [head(Content_Length="1500000000")], endless(b" " * 100_000)
    ),
    "chunked": lambda _: chunked(endless(b" " * 100_000)),
    "until the end": lambda _: itertools.chain([head()], endless(b" " * 100_000)),
    "gzip": lambda _: plain(bomb(31), Content_Encoding="gzip"),
    "deflate": lambda _: plain(bomb(15), Content_Encoding="deflate"),
}


@pytest.mark.parametrize("kind", LARGE)
async def test_an_answer_above_the_bound_fails_its_item(kind: str) -> None:
    async with serving(LARGE[kind]) as server, Fleet([spec(server)], small()) as fleet:
        with pytest.raises(EndpointReplyError, match=r"1,048,576 bytes.*limits\.body_bytes"):
            await ask(fleet)
        server.answer = good  # the endpoint is used on
        await ask(fleet)
        assert server.sent < 100 * LIMIT


async def test_the_memory_that_an_answer_takes_is_bounded() -> None:
    """1.5 GB were read into four times as much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with serving(LARGE["chunked"]) as server, Fleet([spec(server)]) as fleet:
        with pytest.raises(EndpointReplyError, match="67,108,864 bytes"):
            await ask(fleet)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 256 * 1024


async def test_an_answer_just_within_the_bound_is_an_answer() -> None:
    body = orjson.dumps(completion("x" * (LIMIT - 1000)))
    answers: list[Answer] = [
        lambda _: plain(body),
        lambda _: chunked(iter([body[:5], body[5:]])),
        lambda _: plain(gzip.compress(body), Content_Encoding="gzip"),
    ]
    async with serving() as server, Fleet([spec(server)], small()) as fleet:
        for server.answer in answers:
            assert len((await ask(fleet)).content) == LIMIT - 1000


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
async def test_an_error_keeps_its_meaning_however_long_its_text(status: str) -> None:
    def answer(_: Request) -> Iterator[bytes]:
        return itertools.chain([head(status)], endless(b"no! " * 10_000))

    async with serving(answer) as server, Fleet([spec(server)], small()) as fleet:
        with pytest.raises(EndpointError, match=rf"HTTP {status[:3]}: no! no!"):
            await ask(fleet)


STREAMS: dict[str, Answer] = {
    "one line without an end": lambda _: chunked(
        itertools.chain([b"data: "], endless(b"x" * 100_000))
    ),
    "comments for ever": lambda _: chunked(endless(b": wait\n\n" * 10_000)),
    "tokens for ever": lambda _: chunked(
        endless(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n' * 2000)
    ),
    "an error for ever": lambda _: itertools.chain(
        [head("500 Internal Server Error")], endless(b" " * 100_000)
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
async def test_streams_are_bounded_too(kind: str) -> None:
    async with serving(STREAMS[kind]) as server, Fleet([spec(server)], small()) as fleet:
        with pytest.raises(EndpointError):
            await read_stream(fleet)
        assert server.sent < 100 * LIMIT


async def test_a_long_line_of_a_stream_is_read_whole() -> None:
    text = "y" * 600_000
    event = orjson.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]})
    sent = b"data: " + event + b"\n\ndata: [DONE]\n\n"
    pieces = [sent[n : n + 50_000] for n in range(0, len(sent), 50_000)]
    async with (
        serving(lambda _: chunked(iter(pieces))) as server,
        Fleet([spec(server)], small()) as fleet,
    ):
        assert await read_stream(fleet) == sent


async def test_small_documents_are_bounded() -> None:
    async with serving(LARGE["chunked"]) as server:
        (found,) = await probe_models([spec(server)], timeout_s=20)
        assert found.error == "the answer is larger than 8,388,608 bytes"
        (gauges,) = await read_server_loads([spec(server)], timeout_s=20)
        assert gauges.running is None
        with pytest.raises(NoEndpointError, match="larger than 8,388,608 bytes"):
            await RegistrySource(server.url, timeout_s=20).list_endpoints()
        (found,) = await Gateway.from_paths(server.url, ["a/b"], KEY).probe_models(20)
        assert found.error == "the answer is larger than 8,388,608 bytes"
        async with TokenCounter([spec(server)], "m", timeout_s=20) as counter:
            assert not (await counter.count(BODY)).exact
    endless_key = CommandToken(f"{sys.executable} -c \"while 1: print('x' * 9999)\"", "where")
    with pytest.raises(RunStoppedError, match="printed more than 65,536 bytes"):
        await endless_key()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_carry_no_key(status: int) -> None:
    async with serving() as other:

        def answer(_: Request) -> list[bytes]:
            return plain(b"{}", f"{status} Moved", Location=f"{other.url}/v1/chat/completions")

        async with serving(answer) as server:
            async with Fleet([spec(server)], small()) as fleet:
                with pytest.raises((EndpointError, RunStoppedError)):
                    await ask(fleet)
                with pytest.raises((EndpointError, RunStoppedError)):
                    await read_stream(fleet)
            (found,) = await probe_models([spec(server)])
            assert found.error is not None
            assert (await read_server_loads([spec(server)]))[0].running is None
            async with TokenCounter([spec(server)], "m") as counter:
                assert not (await counter.count(BODY)).exact
            (found,) = await Gateway.from_paths(server.url, ["a/b"], KEY).probe_models()
            assert found.error is not None
            with pytest.raises(ConfigurationError):
                await RegistrySource(server.url, KEY).list_endpoints()
            assert server.seen
            assert other.seen == []


async def test_a_worker_shows_its_token_to_its_desk_only() -> None:
    async with serving() as other:

        def answer(_: Request) -> list[bytes]:
            return plain(b"", "302 Found", Location=f"{other.url}/")

        async with serving(answer) as server:
            with pytest.raises(BackendError, match="redirect"):
                await run_worker(f"{server.url}/", "desk-token", lambda order: order, 60)
            assert other.seen == []


async def test_orders_for_globus_follow_no_redirect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's sessions would send them on, with what .netrc holds for the other host."""
    write_netrc(tmp_path / ".netrc", monkeypatch)
    monkeypatch.setattr("globus_sdk.transport.requests.time.sleep", lambda _: None)
    async with serving() as other:

        def answer(_: Request) -> list[bytes]:
            return plain(b"{}", "307 Temporary Redirect", Location=f"{other.url}/v2/endpoints")

        async with serving(answer) as server:
            client = SimpleNamespace(
                authorizer=globus_sdk.AccessTokenAuthorizer("globus-token"),
                web_service_address=server.url,
            )
            service = ComputeService(client, None)
            with pytest.raises(BackendError):
                await asyncio.to_thread(service.fetch_health, "endpoint")
            await asyncio.to_thread(service.close)
            assert {r.headers["authorization"] for r in server.seen} == {"Bearer globus-token"}
            assert other.seen == []


def write_netrc(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(
        "machine 127.0.0.1 login other password netrc-secret\n"
        "default login other password netrc-secret\n"
    )
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.parametrize("by_home", [False, True])
@pytest.mark.parametrize("proxied", [False, True])
async def test_netrc_neither_carries_nor_replaces_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxied: bool, by_home: bool
) -> None:
    write_netrc(tmp_path / ".netrc", monkeypatch)
    if by_home:
        monkeypatch.delenv("NETRC")
        monkeypatch.setenv("HOME", str(tmp_path))
    async with serving() as server:
        if proxied:
            monkeypatch.setenv("http_proxy", server.url)
        async with Fleet([spec(server, proxied=proxied)], small()) as fleet:
            await ask(fleet)
        await probe_models([spec(server, proxied=proxied)])
        await Gateway.from_paths(server.url, ["a/b"], KEY).probe_models()
        keys = {r.headers.get("authorization") for r in server.seen if "/status" not in r.target}
        assert keys == {f"Bearer {KEY}"}
        (status,) = [r for r in server.seen if "/status" in r.target]
        assert "authorization" not in status.headers  # whether a gateway is up needs no key
        assert all("proxy-authorization" not in r.headers for r in server.seen)


@pytest.mark.parametrize(
    ("variable", "goes"),
    [
        ({"http_proxy": "{proxy}"}, True),
        ({"HTTP_PROXY": "{proxy}"}, True),
        ({"http_proxy": "{bare}"}, True),
        ({"https_proxy": "{proxy}"}, False),
        ({"http_proxy": "{proxy}", "no_proxy": "gateway.invalid"}, False),
        ({"http_proxy": "{proxy}", "NO_PROXY": "other,.invalid"}, False),
        ({"http_proxy": "{proxy}", "no_proxy": "gateway.invalid:8000"}, False),
        ({"http_proxy": "{proxy}", "no_proxy": "elsewhere.invalid"}, True),
        ({"http_proxy": "{proxy}", "no_proxy": "*"}, False),
    ],
)
async def test_proxy_variables_count(
    variable: dict[str, str], goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as proxy:
        bare = proxy.url.removeprefix("http://")
        for name, value in variable.items():
            monkeypatch.setenv(name, value.format(proxy=proxy.url, bare=bare))
        there = EndpointSpec("http://gateway.invalid:8000/v1", KEY, proxied=True)
        async with Fleet([there], small()) as fleet:
            if goes:
                await ask(fleet)
            else:
                with pytest.raises((EndpointLostError, RunStoppedError)):
                    await ask(fleet)
        targets = [r.target for r in proxy.seen]
        assert targets == ["http://gateway.invalid:8000/v1/chat/completions"] * goes


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_gets_its_own_password_and_no_message_shows_it(
    scheme: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def refuse(_: Request) -> list[bytes]:
        return plain(b"", "407 Proxy Authentication Required")

    async with serving(refuse) as proxy:
        monkeypatch.setenv(
            f"{scheme}_proxy", proxy.url.replace("http://", "http://me:pass%40word@")
        )
        there = EndpointSpec(f"{scheme}://gateway.invalid/v1", KEY, proxied=True)
        (found,) = await probe_models([there])
        async with Fleet([there], small()) as fleet:
            with pytest.raises((EndpointError, RunStoppedError)) as caught:
                await ask(fleet)
        told = f"Basic {base64.b64encode(b'me:pass@word').decode()}"
        assert {r.headers["proxy-authorization"] for r in proxy.seen} == {told}
        if scheme == "https":  # the tunnel's request is the proxy's; the key is the gateway's
            assert all("authorization" not in r.headers for r in proxy.seen)
        shown = f"{found.error} {caught.value!r} {caught.value.__cause__} {caplog.text}"
        for secret in ("pass%40word", "pass@word", told, KEY):
            assert secret not in shown


@pytest.mark.parametrize("text", ["socks5://127.0.0.1:1", "https://127.0.0.1:1", "http://"])
async def test_a_proxy_variable_that_is_none_is_named(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", text)
    there = EndpointSpec("http://gateway.invalid/v1", KEY, proxied=True)
    (found,) = await probe_models([there])
    assert found.error is not None
    assert "http_proxy (or HTTP_PROXY) does not name an HTTP proxy" in found.error


async def test_no_session_reads_the_environment() -> None:
    """aiohttp reads .netrc wherever a session trusts the environment."""
    transport = Transport(replace(FleetPolicy(), trust_env=True))
    assert isinstance(transport.session(), aiohttp.ClientSession)
    assert not transport.session().trust_env
    await transport.aclose()


ECHOED = orjson.dumps({"error": {"message": f"Incorrect API key provided: Bearer {KEY}"}})


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "401 Unauthorized", "500 Error"])
@pytest.mark.parametrize("streams", [False, True])
async def test_a_key_that_a_server_repeats_is_masked(status: str, streams: bool) -> None:
    async with (
        serving(lambda _: plain(ECHOED, status)) as server,
        Fleet([spec(server)], small()) as fleet,
    ):
        expected = (EndpointError, RunStoppedError)
        with pytest.raises(expected, match=r"Bearer \*{10}") as caught:
            await (read_stream(fleet) if streams else ask(fleet))
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("head", [b"", b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'])
async def test_a_key_in_an_event_is_masked(head: bytes) -> None:
    answer = plain(head + b"data: " + ECHOED + b"\n\n", Content_Type="text/event-stream")
    async with serving(lambda _: answer) as server, Fleet([spec(server)], small()) as fleet:
        with pytest.raises(EndpointError, match=r"Bearer \*{10}") as caught:
            await read_stream(fleet)
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"
