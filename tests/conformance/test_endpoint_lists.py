"""Lists of endpoints that change: a file, and Aegis' registry, which comes and goes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.parsing import ServerLoad
from fanfold.backends.discovery.connect import make_chat_fleet
from fanfold.backends.discovery.gateway import Gateway
from fanfold.backends.discovery.sources import FileSource, RegistrySource, follow_source
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.fleet.server_load import read_server_loads

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
        registry.list_url(f"http://n:{port}", "m")
    both = list(registry.services)
    async with serve(*registry.routes()) as url:
        source = RegistrySource(url, patience=3)
        assert [(s.url, s.model) for s in await source.list_endpoints()] == [
            ("http://n:1", "m"),
            ("http://n:2", "m"),
        ]
        for listed in (both[:1], both[:1], both, both[:1], both[:1]):
            registry.services = listed
            assert len(await source.list_endpoints()) == 2
        assert [s.url for s in await source.list_endpoints()] == ["http://n:1"]


async def test_what_is_no_registry() -> None:
    registry = Registry()
    async with serve(*registry.routes()) as url:
        with pytest.raises(ConfigurationError, match="lists no server"):
            await RegistrySource(url).list_endpoints()
        registry.services = [{"host": 5}, {"host": "n", "port": 0}, {"host": "::1", "port": 8}, 7]
        assert [s.url for s in await RegistrySource(url).list_endpoints()] == ["http://[::1]:8"]
    async with serve(*Model().routes()) as url:
        with pytest.raises(ConfigurationError, match="not an Aegis registry: HTTP 404"):
            await RegistrySource(url).list_endpoints()
    with pytest.raises(ConfigurationError, match="cannot query"):
        await RegistrySource("http://127.0.0.1:9").list_endpoints()


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
