"""Files that requests name: where they come from, and how they are sent."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from tenacity.wait import wait_exponential

from fanfold.backends.core.errors import EndpointError, InvalidItemError
from fanfold.backends.core.request_urls import URL_FIELD, find_file_problem
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet import files
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams

URL = "/v1/audio/transcriptions"
AUDIO = bytes(range(256)) * 40 + b"\r\n--x\r\n"


def make_data_url(data: bytes = AUDIO, media: str = "audio/wav") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


class Server:
    """A server of transcriptions and a server of files, which records what it gets."""

    def __init__(self) -> None:
        self.forms = list[list[tuple[str, Any]]]()
        self.answer = web.json_response({"text": "spoken", "usage": {"type": "duration"}})
        self.status = dict[str, list[int]]()
        self.headers = list[dict[str, str]]()
        self.queries = list[str]()
        self.port = 0

    async def transcribe(self, request: web.Request) -> web.Response:
        form = await request.post()
        self.forms.append(
            [
                (name, (value.filename, value.file.read()))
                if isinstance(value, web.FileField)
                else (name, value)
                for name, value in form.items()
            ]
        )
        body = self.answer.body
        assert isinstance(body, bytes)
        return web.Response(
            body=body, status=self.answer.status, content_type=self.answer.content_type
        )

    async def send_file(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        self.queries.append(request.raw_path.partition("?")[2])
        name = request.match_info["name"]
        targets = {
            "moved": "speech.MP3",
            "away": f"http://localhost:{self.port}/files/a.wav",
            "local": "file:///etc/hostname",
            "data": "data:audio/wav;base64,AA",
            "bracket": "http://[x/b",
            "loop": "loop",
        }
        if name in targets:
            return web.Response(status=302, headers={"Location": targets[name]})
        if statuses := self.status.get(name):
            return web.Response(status=statuses.pop(0))
        if name == "large":
            return web.Response(body=bytes(files.MOST_BYTES + 1))
        return web.Response(body=AUDIO, content_type="audio/flac")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application(client_max_size=2**28)
    app.router.add_post(URL, made.transcribe)
    app.router.add_get("/files/{name}", made.send_file)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


async def ask(server: Server, url: str, *hosts: str, **body: Any) -> tuple[dict[str, Any], Usage]:
    policy = FleetPolicy(file_hosts=frozenset(hosts))
    spec = EndpointSpec(f"http://127.0.0.1:{server.port}", "a-secret-key")
    async with Fleet([spec], policy) as fleet:
        client = FleetClient(fleet, ModelParams("whisper"))
        answer, reply = await client.complete({**body, URL_FIELD: URL, "file_url": url})
        return answer, reply.usage


async def test_a_request_is_sent_as_a_form(server: Server) -> None:
    body = {
        "language": "de",
        "temperature": 0.5,
        "use_beam_search": True,
        "prompt": "Zürich\r\nBern",
        "timestamp_granularities": ["word", "segment"],
        "include[]": ["logprobs"],
        "vllm_xargs": {"a": [1]},
        "seed": None,
        'odd"; filename="x\r\n': "y",
    }
    answer, usage = await ask(server, make_data_url(), **body)
    assert answer == {"text": "spoken", "usage": {"type": "duration"}}
    assert usage == Usage()
    (form,) = server.forms
    assert sorted(form, key=str) == sorted(
        [
            ("model", "whisper"),
            ("language", "de"),
            ("temperature", "0.5"),
            ("use_beam_search", "true"),
            ("prompt", "Zürich\r\nBern"),
            ("timestamp_granularities[]", "word"),
            ("timestamp_granularities[]", "segment"),
            ("include[]", "logprobs"),
            ("vllm_xargs", '{"a":[1]}'),
            ("odd%22; filename=%22x%0D%0A", "y"),
            ("file", ("audio.wav", AUDIO)),
        ],
        key=str,
    )


@pytest.mark.parametrize(
    ("body", "media", "text"),
    [
        ('{"text": "a b"}', "application/json", "a b"),
        ("a b\n", "text/plain", "a b\n"),
        ("42", "text/plain", "42"),
        ("WEBVTT\n\n00:00.000 --> 00:01.000\na", "text/vtt", None),
    ],
)
async def test_answers_of_all_formats(
    server: Server, body: str, media: str, text: str | None
) -> None:
    server.answer = web.Response(body=body.encode(), content_type=media)
    answer, _ = await ask(server, make_data_url())
    assert answer["text"] == (body if text is None else text)


async def test_tokens_that_an_answer_reports_are_counted(server: Server) -> None:
    used = {"type": "tokens", "input_tokens": 14, "output_tokens": 5, "total_tokens": 19}
    server.answer = web.json_response({"text": "a", "usage": used})
    assert (await ask(server, make_data_url()))[1] == Usage(14, 5)


@pytest.mark.parametrize("body", ['{"segments": []}', "<html>", '{"text": ["a"]}'])
async def test_an_answer_without_a_text_is_none(server: Server, body: str) -> None:
    server.answer = web.Response(body=body.encode(), content_type="application/json")
    policy = FleetPolicy.from_limits(attempts=1)
    async with Fleet([EndpointSpec(f"http://127.0.0.1:{server.port}")], policy) as fleet:
        client = FleetClient(fleet, ModelParams("whisper"))
        with pytest.raises(EndpointError, match="no text 'text'"):
            await client.complete({URL_FIELD: URL, "file_url": make_data_url()})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.wav", "audio.wav"),
        ("plain", "audio.flac"),
        ("moved", "audio.mp3"),
        ("x.exe", "audio.flac"),
    ],
)
async def test_a_file_is_fetched_from_an_allowed_host(server: Server, path: str, name: str) -> None:
    url = f"http://127.0.0.1:{server.port}/files/{path}?signature=1"
    await ask(server, url, "127.0.0.1")
    assert dict(server.forms[0])["file"] == (name, AUDIO)
    assert not any("a-secret-key" in str(headers) for headers in server.headers)


async def test_a_host_that_fails_once_is_asked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAIT", wait_exponential(multiplier=0.01))
    server.status = {"a.wav": [503, 500]}
    await ask(server, f"http://127.0.0.1:{server.port}/files/a.wav", "127.0.0.1")
    assert len(server.headers) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("away", "redirects to another place: files are not fetched from localhost; allow it"),
        ("local", "redirects to another place: give the URL of a file"),
        ("data", "redirects to a data URL"),
        ("bracket", "redirects to a malformed URL"),
        ("loop", "more than 5 redirects"),
        ("large", "larger than 26,214,400 bytes"),
        ("gone", "HTTP 404"),
    ],
)
async def test_a_file_that_cannot_be_fetched(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(files, "_WAIT", wait_exponential(multiplier=0.01))
    server.status = {"gone": [404]}
    url = f"http://127.0.0.1:{server.port}/files/{path}?signature=1"
    with pytest.raises(InvalidItemError, match=message) as caught:
        await ask(server, url, "127.0.0.1")
    assert "signature" not in caught.value.message
    assert not server.forms


async def test_a_host_that_is_dead_or_busy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The item is not to blame: the file may be there later."""
    monkeypatch.setattr(files, "_WAIT", wait_exponential(multiplier=0.01))
    with pytest.raises(EndpointError, match=r"the file http://127.0.0.1:9/a.wav: .*connect"):
        await ask(server, "http://127.0.0.1:9/a.wav", "127.0.0.1")
    server.status = {"busy": [503] * 3}
    with pytest.raises(EndpointError, match="HTTP 503") as caught:
        await ask(server, f"http://127.0.0.1:{server.port}/files/busy?signature=1", "127.0.0.1")
    assert "signature" not in caught.value.message


async def test_a_url_is_fetched_as_it_is_written(server: Server) -> None:
    """Its query may be signed."""
    query = "x=a%2Fb%3Aq&y=%e4"
    await ask(server, f"http://127.0.0.1:{server.port}/files/a.wav?{query}", "127.0.0.1")
    assert server.queries == [query]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (None, "give the URL of a file"),
        ("file:///etc/passwd", "give the URL of a file"),
        ("/etc/passwd", "give the URL of a file"),
        ("ftp://good/a", "give the URL of a file"),
        ("data:audio/wav,abc", "not base64"),
        ("http://", "malformed"),
        ("http://[::1/a", "malformed"),
        ("http://good\\@bad/a", "malformed"),
        ("http://good@bad/a", "malformed"),
        ("http://good/a b", "malformed"),
        ("http://good/ü", "malformed"),
        ("http://good/\n", "malformed"),
        ("http://good.bad/a", "not fetched from good.bad"),
        ("https://bad/a", "not fetched from bad; allow it with --allowed-media-domains bad"),
        ("http://[::1]/a", "not fetched from IPv6 addresses (::1); name the host"),
        ("http://good/a", None),
        ("https://GOOD:81/a?b#c", None),
        ("data:audio/wav;base64,AA", None),
    ],
)
def test_where_files_may_come_from(url: object, problem: str | None) -> None:
    found = find_file_problem(url, ("good",))
    assert (found is None) if problem is None else (problem in (found or ""))


async def test_a_data_url_that_is_damaged(server: Server) -> None:
    with pytest.raises(InvalidItemError, match=r"body.file_url: the data URL is not base64"):
        await ask(server, "data:audio/wav;base64,%%%")
