"""Endpoints that a worker finds on its own node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import BackendError, ConfigurationError
from fanfold.backends.discovery.node_local import find_node_specs, ready_endpoints
from fanfold.configs.loader import LoadedConfig, load_config

HOST = "node7.cluster.example"


def loaded(endpoints: dict[str, Any], **backend: Any) -> LoadedConfig:
    backend = {"kind": "parsl", "node_endpoints": True} | backend
    return load_config({"task": {"prompt": "x"}, "endpoints": endpoints, "backend": backend})


def found(settings: LoadedConfig, **environment: str) -> list[str]:
    specs = find_node_specs(settings.config, settings.plain["endpoints"], environment, HOST)
    return [spec.url for spec in specs]


def test_the_explicit_setting_comes_first() -> None:
    settings = loaded({"urls": ["http://127.0.0.1:8000"]})
    urls = found(settings, FANFOLD_ENDPOINTS="http://a:1, http://b:2", PORT="9")
    assert urls == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize("name", ["node7", HOST, "NODE7", "node7-hsn0", "localhost", "127.0.0.1"])
def test_own_entries(name: str, tmp_path: Path) -> None:
    file = tmp_path / "endpoints.txt"
    file.write_text(f"{name}:8001\nnode77:8000\nnode7-2:8000\nothernode7:8000\n{name}:8002\n")
    urls = found(loaded({"file": str(file)}), PORT="9")
    assert [url.partition("800")[2][:1] for url in urls] == ["1", "2"]


def test_the_registry_comes_before_the_port(tmp_path: Path) -> None:
    (tmp_path / "node7").write_text("127.0.0.1:8123\n")
    settings = loaded({"urls": ["http://node1:8000"]}, registry=str(tmp_path))
    assert "8123" in found(settings, PORT="9")[0]
    (tmp_path / "node7").unlink()
    assert "127.0.0.1:9" in found(settings, PORT="9")[0]
    assert "127.0.0.1:8" in found(settings, PORT="9", FANFOLD_PORT="8")[0]


def test_nothing_says_where() -> None:
    with pytest.raises(
        BackendError, match=f"{HOST}: the endpoints of this node are not configured"
    ):
        found(loaded({"urls": ["http://node1:8000"]}))


async def test_the_coordinator_asks_nobody() -> None:
    settings = loaded({"urls": ["http://127.0.0.1:9"]})
    with pytest.raises(ConfigurationError, match=r"set model\.name"):
        async with ready_endpoints(settings.config, settings.plain["endpoints"]):
            raise AssertionError
    async with ready_endpoints(settings.config, settings.plain["endpoints"], "m") as up:
        assert (up.specs, up.model, up.simulated) == ((), "m", False)
