"""The section node: valid and invalid settings, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.secrets import MASKED
from fanfold.backends.discovery.resolve import (
    get_host_name,
    has_own_servers,
    make_node_plan,
    shorten_host,
)
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.configs.yaml_text import to_yaml

SERVE = "vllm serve {model} --port {port} --tensor-parallel-size {gpus}"


def loaded(node: dict[str, Any], endpoints: Any = None, **environment: str) -> LoadedConfig:
    data = {
        "task": {"prompt": "x"},
        "model": {"name": "org/m"},
        "endpoints": endpoints or {"hosts": "node7"},
        "node": node,
    }
    return load_config(data, environment=environment)


def test_aurora_packs_twelve_tiles() -> None:
    tiles = ",".join(f"{gpu}.{tile}" for gpu in range(6) for tile in (0, 1))
    accelerators = {"variable": "ZE_AFFINITY_MASK", "ids": tiles}
    settings = loaded({"serve": SERVE, "instances": 3, "accelerators": accelerators})
    plan = make_node_plan(settings.config, Path("s"), "x4616c3s4b0n0.hsn.cm.example", {})
    assert (plan.host, plan.address) == ("x4616c3s4b0n0", "x4616c3s4b0n0.hsn.cm.example")
    assert [server.env["ZE_AFFINITY_MASK"] for server in plan.servers] == [
        "0.0,0.1,1.0,1.1",
        "2.0,2.1,3.0,3.1",
        "4.0,4.1,5.0,5.1",
    ]
    assert plan.servers[2].command[2:] == ("org/m", "--port", "8002", "--tensor-parallel-size", "4")
    assert load_config(yaml.safe_load(to_yaml(settings.plain))).config == settings.config


def test_ids_may_be_numbers() -> None:
    settings = loaded({"accelerators": {"ids": [0.0, 0.1, 3]}})
    assert settings.config.node.accelerators.ids == ["0.0", "0.1", "3"]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"serve": ""}, r"node\.serve: is empty"),
        ({"serve": "serve '"}, "no closing quotation"),
        ({"serve": "serve {ports}"}, r"unknown name \{ports\}"),
        ({"serve": "serve", "instances": 2}, r"need \{port\}"),
        ({"instances": 2, "ports": 65535}, "go beyond 65535"),
        ({"instances": 5, "accelerators": {"count": 12}}, "12 accelerators cannot be divided"),
        ({"accelerators": {"count": 2, "ids": "0"}}, "leave one of them out"),
        ({"accelerators": {"ids": "0,0"}}, "an accelerator twice"),
        ({"accelerators": {"variable": "GPUS"}}, "ZE_AFFINITY_MASK"),
        ({"env": {"A B": "x"}}, r"node\.env"),
        ({"env": {"A": 1}}, "put a number in quotes"),
        ({"ready": "health"}, r"node\.ready"),
        ({"address": "a b"}, r"node\.address"),
        ({"restarts": -1}, r"node\.restarts"),
    ],
)
def test_what_does_not_fit(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        loaded(node)


def test_secrets_are_neither_kept_nor_shown() -> None:
    written = {"HF_TOKEN": "hf_s3cr3t", "API_KEY": "${K}", "PLAIN": "yes", "A_SECRET": "s3cr3t"}
    settings = loaded({"serve": "serve", "env": written}, K="s3cr3t")
    assert settings.plain["node"]["env"] == {
        "HF_TOKEN": MASKED,
        "API_KEY": "${K}",
        "PLAIN": "yes",
        "A_SECRET": MASKED,
    }
    assert "s3cr3t" not in to_yaml(settings.plain)
    again = load_config(settings.plain, environment={"K": "s3cr3t"})
    with pytest.raises(ConfigurationError, match=r"node\.env\.HF_TOKEN: a run folder does not"):
        make_node_plan(again.config, Path("s"), "n", {})
    with pytest.raises(ConfigurationError) as error:
        loaded({"serve": "serve --api-key s3cr3t {nothing}", "env": {"A": ["s3cr3t"]}})
    assert "s3cr3t" not in error.value.message


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({}, r"set node\.serve"),
        ({"serve": "s {gpus}"}, r"set node\.accelerators"),
        ({"serve": "s", "accelerators": {"variable": "CUDA_VISIBLE_DEVICES"}}, "set count or ids"),
    ],
)
def test_what_a_node_lacks(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_node_plan(loaded(node).config, Path("s"), "n", {})


def test_a_model_without_a_name() -> None:
    data = {"task": {"prompt": "x"}, "endpoints": {"hosts": "n"}, "node": {"serve": "s {model}"}}
    with pytest.raises(ConfigurationError, match=r"set model\.name"):
        make_node_plan(load_config(data).config, Path("s"), "n", {})


def test_who_starts_servers(tmp_path: Path) -> None:
    aegis, early = tmp_path / "aegis" / "aegis_endpoints.txt", tmp_path / "early"
    for folder in (aegis.parent, early, tmp_path / "servers"):
        folder.mkdir()
    aegis.write_text("x:8000\n")
    (early / "aegis_registry_url.txt").write_text("http://head:8471\n")
    for endpoints, starts in [
        ({"hosts": "n"}, True),
        ({"urls": ["http://n:8000"]}, True),
        ({"file": str(tmp_path / "servers")}, True),
        ({"file": str(tmp_path / "to-come")}, True),
        ({"file": str(aegis)}, False),
        ({"file": str(aegis.parent)}, False),
        ({"file": str(early)}, False),
        ({"file": str(early / "aegis_endpoints.txt")}, False),
        ({"file": str(early / "servers")}, True),
        ({"aegis_registry": "http://head:8471"}, False),
        ({"simulated": {}}, False),
        ("auto", False),
    ]:
        assert has_own_servers(loaded({"serve": "s"}, endpoints).config) is starts, endpoints
    assert not has_own_servers(loaded({}, {"hosts": "n"}).config)


def test_names_of_nodes() -> None:
    assert shorten_host("Node7.cluster.example") == "node7"
    assert shorten_host("10.0.0.7") == "10.0.0.7"
    assert shorten_host("fe80::1") == "fe80::1"
    assert get_host_name({"SLURMD_NODENAME": "nid1"}) == "nid1"
    assert get_host_name({"SLURMD_NODENAME": "nid1", "FANFOLD_HOST": "x"}) == "x"
    assert get_host_name({})
