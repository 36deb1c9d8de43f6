"""Lists of endpoints that change: a file, and Aegis' registry, which comes and goes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError, NoEndpointError
from fanfold.backends.core.parsing import ServerLoad
from fanfold.backends.discovery.connect import make_chat_fleet
from fanfold.backends.discovery.gateway import Gateway
from fanfold.backends.discovery.sources import (
    FileSource,
    RegistrySource,
    find_registry_file,
    follow_source,
    read_registry_file,
)
from fanfold.backends.fleet.endpoint import NO_KEY, EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.fleet.server_load import read_server_loads
from fanfold.configs.endpoints import AEGIS_FILE, AEGIS_REGISTRY_FILE

from .standins import First, Model, Registry, serve

pytestmark = pytest.mark.integration


async def test_a_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("a:1\n")
    source = FileSource(path, "key")
    assert [(s.url, s.api_key) for s in await source.list_endpoints()] == [("http://a:1", "key")]
    path.write_text("a:1\nb:2\n")
    assert len(await source.list_endpoints()) == 2
    path.write_text("a b c\n")
    with pytest.raises(ConfigurationError, match="line 1"):
        await source.list_endpoints()
    path.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        await source.list_endpoints()


async def test_a_server_that_the_registry_forgets_for_a_while_stays() -> None:
    registry = Registry()
    for port in (1, 2):
        registry.list_url(f"http://127.0.0.1:{port}", "m")
    both = list(registry.services)
    async with serve(*registry.routes()) as url:
        source = RegistrySource(url, patience=3)
        assert [(s.url, s.model) for s in await source.list_endpoints()] == [
            ("http://127.0.0.1:1", "m"),
            ("http://127.0.0.1:2", "m"),
        ]
        for listed in (both[:1], both[:1], both, both[:1], both[:1]):
            registry.services = listed
            assert len(await source.list_endpoints()) == 2
        assert [s.url for s in await source.list_endpoints()] == ["http://127.0.0.1:1"]


async def test_a_server_that_works_never_leaves_whatever_the_registry_says() -> None:
    registry = Registry()
    async with serve(*registry.routes()) as url, serve(*Model().routes()) as server:
        source = RegistrySource(url, patience=2)
        registry.list_url(server, "m")
        assert [s.url for s in await source.list_endpoints()] == [server]
        for status in ("unhealthy", "unknown", "healthy", "unhealthy", "starting", "stopping") * 2:
            registry.list_url(server, "m", status, last_seen=1_000_010.0)
            assert [s.url for s in await source.list_endpoints()] == [server]
        registry.services = []
        for _ in range(7):
            assert [s.url for s in await source.list_endpoints()] == [server]


async def test_a_server_that_was_not_seen_for_long_leaves_when_it_does_not_answer() -> None:
    registry, dead = Registry(), "http://127.0.0.1:9"
    async with serve(*registry.routes()) as url, serve(*Model().routes()) as server:
        source = RegistrySource(url, patience=2)
        registry.list_url(server, last_seen=1_000_000.0)
        registry.list_url(dead, last_seen=1_000_000.0)
        assert len(await source.list_endpoints()) == 2
        registry.list_url(server, last_seen=1_000_085.0)
        registry.list_url(dead, status="unhealthy", last_seen=1_000_000.0)
        for _ in range(5):  # a dead server makes a round longer: it may have been its turn only now
            assert len(await source.list_endpoints()) == 2
        registry.list_url(server, last_seen=1_000_091.0)
        assert len(await source.list_endpoints()) == 2
        assert [s.url for s in await source.list_endpoints()] == [server]
        registry.list_url(dead, last_seen=1_000_091.0)
        assert len(await source.list_endpoints()) == 2


async def test_a_server_joins_when_it_is_up() -> None:
    registry, dead = Registry(), "http://127.0.0.1:9"
    async with serve(*registry.routes()) as url, serve(*Model().routes()) as server:
        source = RegistrySource(url)
        registry.list_url(server, "m", "starting")
        registry.list_url(dead, "m", "unhealthy")
        with pytest.raises(NoEndpointError, match="lists 2 servers, none healthy yet"):
            await source.list_endpoints()
        registry.list_url(server, "m", "unhealthy")  # it answers: the registry's round is slow
        assert [s.url for s in await source.list_endpoints()] == [server]
        old = RegistrySource(url)
        registry.list_url(dead, "m", "unhealthy", last_seen=1_001_000.0)
        with pytest.raises(NoEndpointError):  # nobody has seen it for long: it is not even asked
            await old.list_endpoints()


async def test_what_is_no_registry() -> None:
    registry = Registry()
    async with serve(*registry.routes()) as url:
        with pytest.raises(ConfigurationError, match="lists no server"):
            await RegistrySource(url).list_endpoints()
        hosts = ("", "a b", "a/b", "u:p@n", "n?", "-n", "fe80::1%eth0", "http://n", "n" * 300, None)
        registry.services = [
            {"host": 5},
            {"host": "n", "port": 0},
            {"host": "n", "port": True},
            {"host": "n", "port": "8"},
            *({"host": host, "port": 8} for host in hosts),
            7,
        ]
        with pytest.raises(NoEndpointError, match="lists no server"):
            await RegistrySource(url).list_endpoints()
        seen = {"last_seen": -1e300, "metadata": ["m"], "status": None}
        registry.services += [{"host": "::1", "port": 8}, {"host": "n", "port": 8, **seen}]
        registry.services += [{"host": "q", "port": 8, "last_seen": "x", "metadata": {"model": 7}}]
        listed = await RegistrySource(url).list_endpoints()
        assert [(s.url, s.model) for s in listed] == [
            ("http://[::1]:8", None),
            ("http://q:8", None),
        ]
    async with serve(*Model().routes()) as url:
        with pytest.raises(ConfigurationError, match="not an Aegis registry: HTTP 404"):
            await RegistrySource(url).list_endpoints()
    with pytest.raises(ConfigurationError, match="cannot query"):
        await RegistrySource("http://127.0.0.1:9").list_endpoints()


def write_registry_file(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / AEGIS_REGISTRY_FILE).write_text(text)
    return folder / AEGIS_FILE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "head:8471",
        "file:///etc/passwd",
        "http://u:secret@head:8471",
        "http://head:port",
        "http://he ad:8471",
        f"http://{'a' * 5000}",
        "\xff\xfe",
    ],
)
def test_an_address_of_a_registry_that_is_none(tmp_path: Path, text: str) -> None:
    path = write_registry_file(tmp_path, "")
    file = find_registry_file(path)
    assert file is not None
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"aegis_registry_url\.txt: ") as error:
        read_registry_file(file)
    assert "secret" not in error.value.message


async def test_the_registry_is_the_list_until_the_file_is_written(tmp_path: Path) -> None:
    registry = Registry()
    async with serve(*registry.routes()) as url, serve(*Model().routes()) as server:
        path = write_registry_file(tmp_path / "local_runs", f"{url}\n")
        registry.list_url(server, "m")
        for given in (path, path.parent):
            source = FileSource(given, "key")
            (spec,) = await source.list_endpoints()
            assert (spec.url, spec.model, spec.api_key) == (server, "m", "key")
        path.write_text("")
        assert [s.url for s in await FileSource(path).list_endpoints()] == [server]
        path.write_text("a:1\n")
        registry.list_url(f"{server.rpartition(':')[0]}:9")
        assert len(await source.list_endpoints()) == 2  # those that start later are there only
        for given in (path, path.parent):  # a server that is not in the file started later
            found = {s.url for s in await FileSource(given).list_endpoints()}
            assert found == {"http://a:1", *(s.url for s in await source.list_endpoints())}
        other = path.with_name("endpoints.txt")
        other.write_text("a:1\n")
        assert [s.url for s in await FileSource(other).list_endpoints()] == ["http://a:1"]
        (path.parent / AEGIS_REGISTRY_FILE).write_text("http://127.0.0.1:9")
        assert [s.url for s in await FileSource(path).list_endpoints()] == ["http://a:1"]
        (path.parent / AEGIS_REGISTRY_FILE).write_text(f"{url}\n")
        path.parent.chmod(0o777)
        path.unlink()
        assert {s.api_key for s in await FileSource(path, "key").list_endpoints()} == {NO_KEY}


async def test_a_server_that_starts_after_the_file_was_written_joins(tmp_path: Path) -> None:
    registry = Registry()
    async with (
        serve(*registry.routes()) as url,
        serve(*Model().routes()) as first,
        serve(*Model().routes()) as late,
    ):
        path = write_registry_file(tmp_path, url)
        path.write_text(f"{first}\n")
        registry.list_url(first, "m")
        source = FileSource(path)
        listed = await source.list_endpoints()
        assert [s.url for s in listed] == [first]

        async def everybody(specs: list[EndpointSpec]) -> list[EndpointSpec]:
            return specs

        async with (
            Fleet(listed) as fleet,
            follow_source(fleet, source, listed, everybody, every_s=0.01),
        ):
            registry.list_url(late, "m")
            while len(fleet.endpoints) < 2:  # noqa: ASYNC110 - a poll
                await asyncio.sleep(0.01)
        assert {e.spec.url for e in fleet.endpoints if not e.retired} == {first, late}


async def test_a_link_to_a_file_that_is_not_written_yet(tmp_path: Path) -> None:
    registry = Registry()
    async with serve(*registry.routes()) as url, serve(*Model().routes()) as server:
        registry.list_url(server)
        newest = write_registry_file(tmp_path / "run-2", url)
        (tmp_path / AEGIS_FILE).symlink_to(newest)
        assert [s.url for s in await FileSource(tmp_path / AEGIS_FILE).list_endpoints()] == [server]


def test_which_files_a_registry_replaces(tmp_path: Path) -> None:
    path = write_registry_file(tmp_path, "http://head:8471")
    assert (
        find_registry_file(path) == find_registry_file(tmp_path) == tmp_path / AEGIS_REGISTRY_FILE
    )
    assert find_registry_file(tmp_path / "other.txt") == tmp_path / AEGIS_REGISTRY_FILE
    assert find_registry_file(tmp_path / "servers") is None  # a folder that nodes will write to
    (tmp_path / "servers").mkdir()
    assert find_registry_file(tmp_path / "servers") is None
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    for bad in (loop, tmp_path / ("x" * 300 + ".txt"), path / "below.txt"):
        assert find_registry_file(bad) is None
    path.write_text("a:1\n")
    assert find_registry_file(path / "below.txt") is None
    assert find_registry_file(path) is find_registry_file(tmp_path) is None


class Listed:
    """A list that changes when a test says so."""

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.looks = 0

    async def list_endpoints(self) -> list[EndpointSpec]:
        self.looks += 1
        if not self.urls:
            raise ConfigurationError("the list is gone")
        return [EndpointSpec(url) for url in self.urls]

    async def seen(self) -> None:
        """Wait until the list as it is now has been looked at and acted on."""
        before = self.looks
        async with asyncio.timeout(10):
            while self.looks < before + 3:  # noqa: ASYNC110 - a look has no event
                await asyncio.sleep(0.001)


async def test_members_follow_their_list(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    listed, asked = Listed("http://a:1", "http://x:1"), list[str]()

    async def admit(specs: list[EndpointSpec]) -> list[EndpointSpec]:
        asked.extend(spec.url for spec in specs)
        return [spec for spec in specs if "x" not in spec.url.partition("//")[2]]

    def members() -> set[str]:
        return {endpoint.label for endpoint in fleet.endpoints if not endpoint.retired}

    begin = await listed.list_endpoints()
    async with Fleet(begin[:1]) as fleet, follow_source(fleet, listed, begin, admit, 0.001):
        await listed.seen()
        assert (members(), asked) == ({"a:1"}, [])
        listed.urls = ("http://a:1", "http://b:1", "http://x2:1", "http://x:1")
        await listed.seen()
        assert (members(), asked) == ({"a:1", "b:1"}, ["http://b:1", "http://x2:1"])
        listed.urls = ()
        await listed.seen()
        assert members() == {"a:1", "b:1"}
        listed.urls = ("http://b:1",)
        await listed.seen()
        assert members() == {"b:1"}
        listed.urls = ("http://x:1",)
        await listed.seen()
        assert members() == {"b:1"}  # nobody else would be left
    assert caplog.text.count("the list is gone") == 1
    assert "1 joined, 0 left, 2 now" in caplog.text


async def test_a_gateway_says_what_it_has() -> None:
    first = First()
    async with serve(*first.routes()) as url:
        paths = ["sophia/vllm", "metis/api", "polaris/vllm"]
        gateway = Gateway.from_paths(f"{url}/resource_server/", paths, "good")
        sophia, metis, polaris = await gateway.probe_models()
        assert (sophia.label, sophia.models) == ("sophia/vllm", ("org/m",))
        assert metis.models == ("m",)
        assert polaris.error == "the gateway has sophia/vllm, metis/api"
        (refused,) = await Gateway.from_paths(
            f"{url}/resource_server", ["a/b"], "bad"
        ).probe_models()
        assert (
            refused.error
            == "HTTP 401: no such token (log in again (alcf-tokens login), or correct the token)"
        )
        (lost,) = await Gateway.from_paths(url, ["a/b"], "good").probe_models()
        assert "HTTP 404" in (lost.error or "")
    (gone,) = await Gateway.from_paths("http://127.0.0.1:9", ["a/b"], "good").probe_models()
    assert "cannot connect" in (gone.error or "")


async def test_gauges_are_read_where_there_are_any() -> None:
    async with serve(*Model().routes()) as busy, serve(*First().routes()) as silent:
        specs = [EndpointSpec(busy), EndpointSpec(silent), EndpointSpec("http://127.0.0.1:9")]
        assert await read_server_loads(specs) == [ServerLoad(3, 5), ServerLoad(), ServerLoad()]


async def test_answers_of_a_gateway_come_whole() -> None:
    first = First()
    async with serve(*first.routes()) as url:
        gateway = Gateway.from_paths(f"{url}/resource_server", ["metis/api"], "good")
        async with Fleet(gateway.specs, FleetPolicy(whole_answers=True)) as fleet:
            chat = make_chat_fleet(fleet, ModelParams("m"))
            assert [chunk.content async for chunk in chat.astream("hello")] == ["fine"]
    assert first.asked == [("metis", "m")]


async def test_a_registry_that_spells_one_server_twice() -> None:
    registry = Registry()
    for url in ("http://n:1", "http://N:1", "http://n.cluster.example:1", "http://n:2"):
        registry.list_url(url)
    async with serve(*registry.routes()) as url:
        specs = await RegistrySource(url).list_endpoints()
        assert [spec.url for spec in specs] == ["http://n:1", "http://n:2"]
        assert specs[0].spellings == ("http://N:1", "http://n.cluster.example:1")
