"""One server under several spellings is one endpoint, in every kind of list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.discovery.node_local import find_node_specs
from fanfold.backends.discovery.resolve import list_endpoint_specs
from fanfold.backends.fleet.endpoint import EndpointSpec, describe_spellings, merge_spellings
from fanfold.configs.loader import load_config


def listed(section: Mapping[str, Any]) -> list[EndpointSpec]:
    config = load_config({"task": {"prompt": "x"}, "endpoints": section}).config.endpoints
    return list_endpoint_specs(config, section)


SAME = [
    ("http://node7:8000", "http://node7:8000/"),
    ("http://node7:8000", "http://node7:8000/v1"),
    ("http://node7:8000/v1", "http://node7:8000/v1//"),
    ("http://node7:8000/v1", "http://node7:8000//v1"),
    ("http://node7:8000", "HTTP://NODE7:8000"),
    ("http://node7:8000", "http://node7.:8000"),
    ("http://node7:8000", "http://node7:08000"),
    ("http://node7:8000", "http://node7.cluster.example:8000"),
    ("http://node7.cluster.example:8000", "http://Node7:8000/v1"),
    ("http://node7", "http://node7:80/v1"),
    ("https://api.example", "https://API.example:443/v1/"),
    ("http://localhost:8000", "http://127.0.0.1:8000"),
    ("http://[::1]:8000", "http://[0:0:0:0:0:0:0:1]:8000"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_spellings_of_one_server(first: str, second: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "list", tmp_path / "servers"
    file.write_text(f"# a comment\n{first}\tmax_in_flight=4\n{second}\n")
    folder.mkdir()
    (folder / "a").write_text(f"{first}\n")
    (folder / "b").write_text(f"{second}\n")
    kinds: list[dict[str, Any]] = [
        {"urls": [first, second]},
        {"file": str(file)},
        {"file": str(folder)},
    ]
    lists = [listed(kind) for kind in kinds]
    config = load_config({"task": {"prompt": "x"}, "endpoints": {"urls": ["http://other"]}}).config
    environment = {"FANFOLD_ENDPOINTS": f"{first},{second}"}
    lists.append(find_node_specs(config, {}, environment, "here"))
    for specs in lists:
        assert [spec.url for spec in specs] == [first]
        text = (describe_spellings(specs[0]) or "").lower()
        assert first.lower() in text
        assert second.lower() in text
    assert lists[1][0].max_in_flight == 4


@pytest.mark.parametrize(
    "urls",
    [
        ["http://node7:8000", "http://node7:8001"],
        ["http://node7:8000", "https://node7:8000"],
        ["http://node7:8000", "http://node8:8000"],
        ["http://node7.a.example:8000", "http://node7.b.example:8000"],
        ["http://node7:8000", "http://node7.a.example:8000", "http://node7.b.example:8000"],
        ["http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10:8000"],
        ["http://gw.example/a/v1", "http://gw.example/b/v1", "http://gw.example/a/v2"],
        ["http://gw.example/a/v1", "http://gw.example/A/v1"],
    ],
)
def test_servers_that_only_look_alike(urls: list[str]) -> None:
    specs = listed({"urls": urls})
    assert [spec.url for spec in specs] == urls
    assert not any(map(describe_spellings, specs))


def test_hosts_are_compared_with_their_suffix() -> None:
    section = {"hosts": ["n1", "N1.login.example", "n2"], "suffix": ".hsn", "per_host": 2}
    assert [spec.url for spec in listed(section)] == [
        f"http://n{n}.hsn:{port}" for n in (1, 2) for port in (8000, 8001)
    ]
    without = {"hosts": ["n[1-2]", "n1.cluster.example", "N2"]}
    assert [spec.url for spec in listed(without)] == ["http://n1:8000", "http://n2:8000"]


def test_models_of_one_server_are_kept_apart(tmp_path: Path) -> None:
    file = tmp_path / "list"
    file.write_text("n:1\tmodel=a\nN:1\tmodel=b\nn:1/\tmodel=a\n".replace("n:1/", "http://n:1/"))
    specs = listed({"file": str(file)})
    assert [(spec.model, spec.spellings) for spec in specs] == [
        ("a", ("http://n:1/",)),
        ("b", ()),
    ]
    assert len(merge_spellings(specs, by_model=False)) == 1


def test_a_url_from_a_variable_stays_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER", "http://secret-host:1")
    plain = {"urls": ["http://secret-host:1/v1", "${SERVER}"]}
    config = load_config({"task": {"prompt": "x"}, "endpoints": plain}).config.endpoints
    (spec,) = list_endpoint_specs(config, plain)
    assert describe_spellings(spec) == "http://secret-host:1/v1 is also listed as ${SERVER}"


def test_the_same_text_twice() -> None:
    (spec,) = listed({"urls": ["http://n:1", "http://n:1"]})
    assert describe_spellings(spec) == "http://n:1 is listed more than once"
