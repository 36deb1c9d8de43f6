from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.sources import FileSource, follow_source, read_endpoints_file
from fanfold.backends.fleet.endpoint import EndpointSpec
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
