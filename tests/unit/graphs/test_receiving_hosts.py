"""The hosts that a run connects to, as ``fanfold check`` lists them."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fanfold.configs.loader import load_config
from fanfold.graphs.cli.check import list_receiving_hosts

GLOBUS = {"kind": "globus_compute", "endpoints": ["11111111-2222-4333-8444-555555555555"]}
URLS = {"urls": ["http://n1:8000/v1", "http://n1:8001/v1", "https://n2.example/v1"]}


def listed(environment: dict[str, str], **sections: Any) -> list[tuple[str, str]]:
    settings = {"task": {"prompt": "x"}, "model": {"name": "llm"}, "endpoints": URLS}
    return list_receiving_hosts(load_config(settings | sections).config, environment)


def hosts(environment: dict[str, str] | None = None, **sections: Any) -> list[str]:
    found = listed(environment or {}, **sections)
    assert all(what for _, what in found)
    return [host for host, _ in found]


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        (URLS, ["n1", "n2.example"]),
        ({"simulated": {"nodes": 1}}, ["127.0.0.1"]),
        ({"hosts": ["a[1-2]"]}, ["a1", "a2"]),
        ({"aegis_registry": "http://head:8471"}, ["head", "(not known yet)"]),
        (
            {"first": {"base_url": "https://gate.example/x", "paths": ["a/b"], "token": "t"}},
            ["gate.example"],
        ),
        ({"first": {}}, ["inference-api.alcf.anl.gov", "auth.globus.org"]),
        (
            {"first": {"base_url": "https://gate.example", "token_command": "cat t"}},
            ["gate.example"],
        ),
        ({"auto": True}, ["(not known yet)"]),
        ({"urls": ["http://[::1]:8000"]}, ["::1"]),
    ],
)
def test_endpoints(endpoints: dict[str, Any], expected: list[str]) -> None:
    assert hosts(endpoints=endpoints) == expected


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "endpoints.txt"
    endpoints = {"file": str(file), "api_key": "k", "least": 2}
    assert hosts(endpoints=endpoints) == ["(not known yet)"]
    file.write_text("n7:8000\nn8:8000\n")
    file.chmod(0o666)
    assert hosts(endpoints=endpoints) == ["n7", "n8"]
    assert not caplog.records  # the list itself says nothing of keys


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (GLOBUS, ["compute.api.globus.org", "auth.globus.org"]),
        ({"kind": "academy", "exchange": {"kind": "redis", "host": "r"}}, ["r"]),
        ({"kind": "academy", "exchange": {"kind": "http", "url": "https://u:p@ex/x"}}, ["ex"]),
        ({"kind": "academy"}, ["127.0.0.1"]),
        ({"kind": "launched", "host": "login1"}, ["login1"]),
        ({"kind": "local", "processes": 2}, []),
    ],
)
def test_backends(backend: dict[str, Any], expected: list[str]) -> None:
    assert hosts(backend=backend) == ["n1", "n2.example", *expected]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LANGSMITH_TRACING": "true"}, ["api.smith.langchain.com"]),
        (
            {"LANGCHAIN_TRACING_V2": "true", "LANGSMITH_ENDPOINT": "https://ls.example"},
            ["ls.example"],
        ),
        ({"LANGSMITH_TRACING": "false"}, []),
    ],
)
def test_tracing(environment: dict[str, str], expected: list[str]) -> None:
    assert hosts(environment) == ["n1", "n2.example", *expected]


def test_what_langsmith_gets() -> None:
    tracing = {"LANGSMITH_TRACING": "true"}
    (said,) = (what for host, what in listed(tracing) if host == "api.smith.langchain.com")
    assert "prompts of up to 200 items" in said
    assert "pasted items" in said
    assert "aggregate" in said
    hidden = tracing | {"LANGSMITH_HIDE_INPUTS": "true", "LANGCHAIN_HIDE_OUTPUTS": "true"}
    (said,) = (what for host, what in listed(hidden) if host == "api.smith.langchain.com")
    assert said == "LangSmith (tracing is on), gets names and times of nodes"


def test_vocabularies() -> None:
    assert "openaipublic.blob.core.windows.net" in hosts(model={"name": "gpt-4o"})


def test_a_file_that_aegis_has_not_written_yet(tmp_path: Path) -> None:
    (tmp_path / "aegis_registry_url.txt").write_text("http://head:8471\n")
    for path in (tmp_path, tmp_path / "aegis_endpoints.txt"):
        assert hosts(endpoints={"file": str(path)}) == ["head", "(not known yet)"]


def test_secrets_of_urls_are_not_shown() -> None:
    settings = {
        "task": {"prompt": "x"},
        "endpoints": {"aegis_registry": "http://u:s3cr3t@head:1"},
        "backend": {"kind": "academy", "exchange": {"kind": "http", "url": "http://u:s3cr3t@h"}},
    }
    assert "s3cr3t" not in str(list_receiving_hosts(load_config(settings).config, {}))


LISTENS = re.compile(
    r"\b(TCPSite|UnixSite|SockSite|start_server|start_unix_server|create_server|HTTPServer)\("
    r"|\.listen\("
)
DESCRIBED = {
    "graphs/run/monitor.py": "`metrics.port`",
    "backends/workers/launched/server.py": "`backend.kind: launched`",
    "backends/workers/academy/exchange.py": "`backend.kind: academy`",
    "backends/simulated/server.py": "the simulated fleet",
}
"""What SECURITY.md calls the ports that a module opens. Engines and model servers open others."""


def test_every_module_that_opens_a_port_is_in_the_list_of_ports() -> None:
    """A new port is a decision: who can connect, with which secret?"""
    root = Path(str(files("fanfold")))
    modules = (
        p for top in ("graphs", "nodes", "backends", "configs") for p in (root / top).rglob("*.py")
    )
    found = {str(path.relative_to(root)) for path in modules if LISTENS.search(path.read_text())}
    assert found == DESCRIBED.keys(), "describe the port in SECURITY.md and here"
    _, _, text = (root / "SECURITY.md").read_text().partition("## Open ports")
    rows = text.partition("\n## ")[0].splitlines()
    for words in DESCRIBED.values():
        assert any(words in row for row in rows if row.startswith("|")), words
