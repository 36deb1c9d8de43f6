from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.resolve import check_endpoint_set, expand_hosts, list_endpoint_specs
from fanfold.configs.loader import load_config


def specs(section: Any) -> list[str]:
    config = load_config({"task": {"prompt": "x"}, "endpoints": section}).config.endpoints
    check_endpoint_set(config, section if isinstance(section, dict) else {})
    return [spec.url for spec in list_endpoint_specs(config, section)]


def test_hosts_become_urls() -> None:
    section = {"hosts": ["n[1-2].x", "n1.x"], "port": 9000, "per_host": 2, "suffix": ".hsn"}
    assert specs(section) == [f"http://n{n}.hsn:{p}" for n in (1, 2) for p in (9000, 9001)]
    assert specs({"hosts": "n1"}) == ["http://n1:8000"]


def test_what_an_entry_of_hosts_may_be(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("b\na\nb\n")
    environment = {"FILE": str(file), "LIST": "n[01-02]", "ONE": "x"}
    assert list(expand_hosts(str(file), environment)) == ["b", "a"]
    assert list(expand_hosts("$FILE", environment)) == ["b", "a"]
    assert list(expand_hosts("$LIST", environment)) == ["n01", "n02"]
    assert list(expand_hosts("$ONE", environment)) == ["x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$NOT_SET", "NOT_SET is not set"),
        ("/nowhere/at/all", "No such file"),
        ("n[1-", "brackets"),
        ("a b", "blanks"),
    ],
)
def test_hosts_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        specs({"hosts": text})
    assert "endpoints.hosts" in error.value.message


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"aegis_registry": "head:8471"}, r"endpoints\.aegis_registry.*full URL"),
        ({"aegis_registry": "http://u:p@head:8471"}, "no user or password"),
        ({"first": {"paths": ["sophia"], "token": "t"}}, r"endpoints\.first\.paths.*'sophia'"),
        ({"first": {"paths": ["a/b"], "token": "t", "base_url": "x"}}, r"first\.base_url"),
        ({"first": {"paths": ["a/b"], "token": "*" * 10}}, r"endpoints\.first\.token.*again"),
        ({"first": {"paths": ["a/b"], "token_command": "'"}}, "invalid command line"),
    ],
)
def test_what_can_be_said_without_asking(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        specs(section)


def test_only_gateways_are_behind_proxies_unless_said() -> None:
    first = {"first": {"paths": ["a/b"], "token": "t"}}
    for section, proxied in (
        (first, True),
        (first | {"proxy": False}, False),
        ({"urls": ["http://h:1"]}, False),
        ({"urls": ["http://h:1"], "proxy": True}, True),
    ):
        config = load_config({"task": {"prompt": "x"}, "endpoints": section}).config.endpoints
        assert [spec.proxied for spec in list_endpoint_specs(config, section)] == [proxied]
