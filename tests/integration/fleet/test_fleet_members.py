from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.sources import FileSource, follow_source, read_endpoints_file
from fanfold.backends.fleet.endpoint import EndpointSpec, merge_spellings
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import ModelParams

from .conftest import Canned, Stub, completion, until

pytestmark = pytest.mark.integration
Q = [{"role": "user", "content": "q"}]


async def everybody(specs: list[EndpointSpec]) -> list[EndpointSpec]:
    return specs


async def test_nodes_join_and_leave(make_stub: Callable[[], Stub], tmp_path: Path) -> None:
    old, new = make_stub(), make_stub()
    for stub in (old, new):
        stub.answers["m"] = [Canned(200, completion())]
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(old.url)
    async with Fleet(read_endpoints_file(hosts)) as fleet:
        model = FleetClient(fleet, ModelParams("m"))
        listed = read_endpoints_file(hosts)
        async with follow_source(fleet, FileSource(hosts), listed, everybody, every_s=0.01):
            await model.ask(Q)
            hosts.write_text(f"{old.url}\n{new.url}\n")
            await until(lambda: fleet.health().healthy == 2)
            hosts.write_text("broken line here")
            hosts.write_text(f"# moved\n{new.url}\n")
            await until(lambda: fleet.health().healthy == 1)
            await model.ask(Q)
        assert [r.state for r in fleet.report()] == ["left the fleet", "in use"]
        assert fleet.health().total == 1
    assert (len(old.bodies), len(new.bodies)) == (1, 1)


async def test_what_ends_the_following_is_raised(stub: Stub, tmp_path: Path) -> None:
    """A bug must not leave a run with a list that is no longer read."""
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"{stub.url}\nhttp://127.0.0.1:9\n")
    asked = asyncio.Event()

    async def broken(_: list[EndpointSpec]) -> list[EndpointSpec]:
        asked.set()
        msg = "a bug"
        raise ZeroDivisionError(msg)

    async with Fleet([EndpointSpec(stub.url)]) as fleet:

        async def follow() -> None:
            listed = [endpoint.spec for endpoint in fleet.endpoints]
            async with follow_source(fleet, FileSource(hosts), listed, broken, every_s=0.01):
                await asked.wait()
                await asyncio.sleep(0)

        with pytest.raises(ZeroDivisionError):
            await follow()


async def test_who_returns_starts_anew(stub: Stub, make_stub: Callable[[], Stub]) -> None:
    other = make_stub()
    async with Fleet([EndpointSpec(stub.url)]) as fleet:
        assert fleet.update([EndpointSpec(other.url)]) == (1, 1)
        assert fleet.update([EndpointSpec(other.url), EndpointSpec(stub.url)]) == (1, 0)
        assert fleet.health().healthy == 2
        with pytest.raises(ConfigurationError):
            fleet.update([])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.txt"):
        read_endpoints_file(tmp_path / "gone.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="binary"):
        read_endpoints_file(tmp_path / "binary")


def respell(url: str) -> list[str]:
    """Return further spellings of a base URL on the loopback."""
    port = url.partition("127.0.0.1:")[2].partition("/")[0]
    return [f"http://127.0.0.1:{port}/", f"http://LOCALHOST:{port}/v1", f"http://localhost.:{port}"]


async def test_an_endpoint_under_several_spellings_is_used_once(
    make_stub: Callable[[], Stub], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = make_stub(), make_stub()
    for stub in (one, other):
        stub.answers["m"] = [Canned(200, completion())]
    urls = [one.url, *respell(one.url), other.url]
    async with Fleet([EndpointSpec(url, max_in_flight=1) for url in urls]) as fleet:
        model = FleetClient(fleet, ModelParams("m"))
        await asyncio.gather(*(model.ask(Q) for _ in range(8)))
        assert (fleet.health().total, len(fleet.report())) == (2, 2)
        assert min(len(one.bodies), len(other.bodies)) >= 3
        assert fleet.update([EndpointSpec(url) for url in reversed(urls)]) == (0, 0)
    assert caplog.text.count("is also listed as") == 1
    assert all(spelling in caplog.text for spelling in (one.url, *respell(one.url)))


class Listed:
    """A list that changes when a test says so."""

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.polls = 0

    async def list_endpoints(self) -> list[EndpointSpec]:
        self.polls += 1
        return merge_spellings(map(EndpointSpec, self.urls))


async def test_another_spelling_in_a_followed_list_changes_nothing(stub: Stub) -> None:
    source = Listed(stub.url)
    listed = await source.list_endpoints()
    async with Fleet(listed) as fleet, follow_source(fleet, source, listed, everybody, 0.001):
        for urls in [[one] for one in respell(stub.url)] + [[*respell(stub.url), stub.url]]:
            source.urls = tuple(urls)
            seen = source.polls + 2
            await until(lambda polls=seen: source.polls > polls)  # type: ignore[misc]
        assert [r.state for r in fleet.report()] == ["in use"]
        source.urls = (*respell(stub.url), "http://127.0.0.1:9")
        await until(lambda: fleet.health().total == 2)
        assert [r.state for r in fleet.report()] == ["in use", "in use"]
