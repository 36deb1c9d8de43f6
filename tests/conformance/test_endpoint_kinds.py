"""Every kind of endpoints completes a run of a few items."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from fanfold import build_graph
from fanfold.backends.core.errors import ConfigurationError, RunStoppedError
from fanfold.backends.discovery import auto
from fanfold.backends.discovery.connect import choice_logger
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.configs.endpoints import AEGIS_FILE, AEGIS_REGISTRY_FILE
from fanfold.configs.resolve import endpoint_settings

from .standins import First, Model, Registry, serve

pytestmark = pytest.mark.integration

ITEMS = [{"text": f"word {n}"} for n in range(5)]


class Site:
    """What is running somewhere: servers, a registry, a gateway."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.models: list[Model] = []
        self.registry, self.first = Registry(), First()

    async def model(self, *ids: str) -> str:
        model = Model(list(ids) or ["m"])
        self.models.append(model)
        return await self._stack.enter_async_context(serve(*model.routes()))

    async def registered(self) -> str:
        return await self._stack.enter_async_context(serve(*self.registry.routes()))

    async def gateway(self) -> str:
        url = await self._stack.enter_async_context(serve(*self.first.routes()))
        return f"{url}/resource_server"

    @property
    def asked(self) -> int:
        return sum(len(model.asked) for model in self.models)


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.chdir(tmp_path)
    for name in ("FIRST_API_KEY", "FIRST_API_BASE", "FIRST_MODEL", "OLLAMA_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    async with AsyncExitStack() as stack:
        yield Site(stack)


async def ran(endpoints: Any, count: int = 0, **sections: Any) -> dict[str, Any]:
    items = [{"text": f"word {n}"} for n in range(count)] or ITEMS
    settings = {"task": {"prompt": "Say {text}"}, "endpoints": endpoints, **sections}
    settings.setdefault("reduce", [{"op": "count"}])
    end: dict[str, Any] = await build_graph(settings).ainvoke({"items": items})
    assert (end["progress"]["done"], end["progress"]["failed"]) == (len(items), 0)
    return end


async def test_urls(site: Site) -> None:
    urls = [await site.model(), await site.model()]
    assert not (await ran({"urls": urls}))["progress"]["simulated"]
    assert site.asked == 5


@pytest.mark.parametrize("form", ["aegis", "swarm", "urls"])
async def test_file(site: Site, form: str) -> None:
    url = await site.model()
    host, _, port = url.partition("//")[2].partition(":")
    text = {"aegis": f"{host}:{port}", "swarm": f"{host}\t{port}\tmodel=m\tgpu=a", "urls": url}
    Path("list.txt").write_text(f"# nodes\n{text[form]}\n")
    await ran({"file": "list.txt"})
    assert site.asked == 5


async def test_aegis_registry(site: Site) -> None:
    site.registry.list_url(await site.model(), "m")
    site.registry.list_url(await site.model("other"), "other")
    await ran({"aegis_registry": await site.registered()}, model={"name": "m"})
    assert [len(model.asked) for model in site.models] == [5, 0]


@pytest.mark.parametrize("given", ["local_runs/aegis_endpoints.txt", "local_runs"])
async def test_aegis_starts_with_the_first_healthy_server(
    site: Site, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second, other = await site.model(), await site.model(), await site.model("other")
    site.registry.list_url(first, "m", "starting")
    site.registry.list_url(second, "m", "starting")
    site.registry.list_url(other, "other")
    Path("local_runs").mkdir()
    Path("local_runs/aegis_registry_url.txt").write_text(f"{await site.registered()}\n")

    async def start() -> None:
        while "waiting up to" not in caplog.text:  # noqa: ASYNC110 - a run has no event for it
            await asyncio.sleep(0.01)
        site.registry.list_url(first, "m")
        while not site.models[0].asked:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        assert not site.models[1].asked
        site.registry.list_url(first, "m", "unhealthy")
        site.registry.list_url(second, "m")
        Path("local_runs/aegis_endpoints.txt").write_text(f"{first.partition('//')[2]}\n")

    starting = asyncio.create_task(start())
    end = await build_graph(
        {
            "task": {"prompt": "Say {text}"},
            "model": {"name": "m"},
            "endpoints": {"file": given, "refresh_s": 0.01, "wait_s": 60},
            "limits": {"requests_per_s": 400, "streams": 4},
        }
    ).ainvoke({"items": [{"text": f"word {n}"} for n in range(400)]})
    await starting
    assert (end["progress"]["done"], end["progress"]["failed"]) == (400, 0)
    assert [bool(model.asked) for model in site.models] == [True, True, False]
    assert "is not written yet; listed by Aegis' registry http://127.0.0.1:" in caplog.text


@pytest.mark.parametrize("listed", ["registry", "file"])
async def test_workers_use_only_the_servers_of_their_model(site: Site, listed: str) -> None:
    servers = {await site.model(): "m", await site.model("other"): "other"}
    Path("local_runs").mkdir()
    for url, model in servers.items():
        site.registry.list_url(url, model)
    if listed == "registry":
        Path("local_runs/aegis_registry_url.txt").write_text(await site.registered())
    else:
        lines = [f"{url}\tmodel={model}\n" for url, model in servers.items()]
        Path("local_runs/aegis_endpoints.txt").write_text("".join(lines))
    await ran(
        {"file": "local_runs/aegis_endpoints.txt"},
        count=40,
        model={"name": "m"},
        backend={"kind": "local", "processes": 2},
    )
    assert [len(model.asked) for model in site.models] == [40, 0]


@pytest.mark.parametrize("how", ["name", "slurm", "variable", "file"])
async def test_hosts(site: Site, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int((await site.model()).rpartition(":")[2])
    Path("nodes").write_text("127.0.0.1\n127.0.0.1\n")
    monkeypatch.setenv("PBS_NODEFILE", str(Path("nodes").resolve()))
    hosts = {"name": "127.0.0.1", "slurm": "127.0.0.[1]", "variable": "$PBS_NODEFILE"}
    await ran({"hosts": hosts.get(how, "./nodes"), "port": port})
    assert site.asked == 5


@pytest.mark.parametrize("written", ["token", "token_command"])
async def test_first(site: Site, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "good")
    secrets = {"token": "${A_TOKEN}", "token_command": "echo good"}
    first = {
        "base_url": await site.gateway(),
        "paths": ["sophia/vllm", "metis/api"],
        written: secrets[written],
        "requests_per_s": 200,
    }
    end = await ran({"first": first, "models": {"org/m": "m"}}, model={"name": "m"})
    assert set(site.first.asked) == {("sophia", "org/m"), ("metis", "m")}
    kept = (Path(end["results"]["folder"]) / "run.yaml").read_text()
    assert "good" not in kept.replace("echo good", "")


async def test_simulated(site: Site) -> None:
    assert (await ran({"simulated": {"nodes": 2, "time_scale": 50}}))["progress"]["simulated"]
    assert (site.asked, site.first.asked) == (0, [])


async def test_auto_takes_a_registry_first_and_says_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=choice_logger.name)
    site.registry.list_url(await site.model())
    Path("aegis_registry_url.txt").write_text(await site.registered() + "\n")
    Path("endpoints.txt").write_text("http://127.0.0.1:9\n")
    await ran("auto")
    assert "auto chose the registry in aegis_registry_url.txt: 1 endpoint for m" in caplog.text


async def test_auto_goes_on_to_the_next_place(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=choice_logger.name)
    Path("aegis_registry_url.txt").write_text("http://127.0.0.1:9\n")
    Path("endpoints.txt").write_text("not an endpoint\n")
    monkeypatch.setattr(auto, "PORTS", (9,))
    monkeypatch.setenv("OLLAMA_HOST", (await site.model("m", "n")).partition("//")[2])
    await ran("auto", model={"name": "n"})
    assert "auto chose Ollama at" in caplog.text
    assert site.models[0].asked == ["n"] * 5


async def test_auto_takes_first_when_its_variables_are_set(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "PORTS", (9,))
    monkeypatch.setenv("FIRST_API_KEY", "good")
    monkeypatch.setenv("FIRST_API_BASE", f"{await site.gateway()}/sophia/vllm/v1")
    monkeypatch.setenv("FIRST_MODEL", "org/m")
    await ran("auto", limits={"requests_per_s": 200})
    assert site.first.asked == [("sophia", "org/m")] * 5


async def test_auto_never_takes_a_simulated_fleet_nor_what_is_paid(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not site.models
    monkeypatch.setattr(auto, "PORTS", (9,))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-pays")
    async with SimulatedFleet(SimulationSpec.fast(nodes=1)) as fleet:
        Path("endpoints.txt").write_text(f"{fleet.urls[0]}\n")
        with pytest.raises(ConfigurationError) as error:
            await ran("auto")
    told = error.value.message
    assert "the file endpoints.txt: a simulated fleet" in told
    assert "this host, ports 9 to 9: no model server answers" in told
    assert "endpoints.urls" in told
    assert "OPENAI_API_KEY is set" in told
    assert "sk-somebody-pays" not in told


async def test_deployments_may_call_the_model_differently(site: Site) -> None:
    urls = [await site.model("m"), await site.model("org/m-v2"), await site.model("other")]
    # the balancer chooses at random between equal endpoints: enough items for both
    await ran({"urls": urls, "models": {"org/m-v2": "m"}}, count=60, model={"name": "m"})
    assert {name for model in site.models for name in model.asked} == {"m", "org/m-v2"}


async def test_nodes_join_and_leave_during_a_run(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old, new, other = await site.model(), await site.model(), await site.model("other")
    file = Path("list.txt")
    file.write_text(old)

    async def change() -> None:
        while not site.models[0].asked:  # noqa: ASYNC110 - a run has no event for its begin
            await asyncio.sleep(0.001)
        file.write_text(f"{new}\n{other}\n")

    items = [{"text": f"word {n}"} for n in range(400)]
    settings = {
        "task": {"prompt": "Say {text}"},
        "model": {"name": "m"},
        "endpoints": {"file": "list.txt", "refresh_s": 0.01},
        "limits": {"requests_per_s": 400, "streams": 4},
    }
    changing = asyncio.create_task(change())
    end = await build_graph(settings).ainvoke({"items": items})
    await changing
    assert (end["progress"]["done"], end["progress"]["failed"]) == (400, 0)
    assert site.models[0].asked
    assert site.models[1].asked
    assert not site.models[2].asked
    assert "it serves other, not m" in caplog.text


@pytest.mark.parametrize("renewable", [True, False])
async def test_a_token_that_expires_is_fetched_anew_once(site: Site, renewable: bool) -> None:
    script, now, calls = Path("token.py"), Path("now").resolve(), Path("calls").resolve()
    script.write_text(f"print(open({str(now)!r}).read()); open({str(calls)!r}, 'a').write('x')")
    now.write_text("good")
    first = {
        "base_url": await site.gateway(),
        "paths": "metis/api",
        "token_command": f"{sys.executable} {script.resolve()}",
        "requests_per_s": 500,
    }

    async def expire() -> None:
        while not site.first.asked:  # noqa: ASYNC110 - a run has no event for its begin
            await asyncio.sleep(0.001)
        now.write_text("newer")
        site.first.good = {"newer"} if renewable else set()

    expiring = asyncio.create_task(expire())
    settings = {"task": {"prompt": "Say {text}"}, "endpoints": {"first": first}}
    graph, items = build_graph(settings), [{"text": str(n)} for n in range(60)]
    if renewable:
        end = await graph.ainvoke({"items": items})
        assert (end["progress"]["done"], end["progress"]["failed"]) == (60, 0)
    else:
        with pytest.raises(RunStoppedError, match="no endpoint is left"):
            await graph.ainvoke({"items": items})
    await expiring
    assert calls.read_text() == "xx"  # when the run was prepared, and when it was refused


async def test_the_gateways_quota_is_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "good")
    site.first.refusals = [(429, {"detail": "Too many requests."})]
    first = {
        "base_url": await site.gateway(),
        "paths": ["metis/api"],
        "token": "${A_TOKEN}",
        "requests_per_s": 200,
    }
    await ran({"first": first})


def threads() -> Executor:
    return ThreadPoolExecutor(2)


@pytest.mark.parametrize("kind", ["urls", "first"])
async def test_keys_do_not_travel_to_workers(site: Site, kind: str) -> None:
    """A key that is written out is refused before anything is sent, whatever it opens."""
    kinds: dict[str, dict[str, Any]] = {
        "urls": {"urls": [await site.model()], "api_key": "good"},
        "first": {
            "first": {"base_url": await site.gateway(), "paths": "metis/api", "token": "good"}
        },
    }
    backend = {"kind": "executor", "factory": f"{__name__}:threads"}
    where = {"urls": "endpoints.api_key", "first": "endpoints.first.token"}[kind]
    with pytest.raises(ConfigurationError, match=f"^{re.escape(where)} is written out"):
        await ran(kinds[kind], backend=backend)
    assert (site.asked, site.first.asked) == (0, [])


def test_an_option_may_name_a_file_that_aegis_has_not_written_yet(tmp_path: Path) -> None:
    file, link = tmp_path / "run" / AEGIS_FILE, tmp_path / "local.txt"
    file.parent.mkdir()
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(ConfigurationError, match="nor a file or folder"):
            endpoint_settings(str(path), None)
    (file.parent / AEGIS_REGISTRY_FILE).write_text("http://head:8471\n")
    for path in (file, link):
        assert endpoint_settings(str(path), None)["endpoints.file"] == str(path)
    with pytest.raises(ConfigurationError, match="nor a file or folder"):
        endpoint_settings(str(file.parent / "servers"), None)
