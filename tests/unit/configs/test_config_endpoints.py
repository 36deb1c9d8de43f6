from __future__ import annotations

from typing import Any

import pytest
import yaml

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.secrets import MASKED
from fanfold.configs.loader import load_config
from fanfold.configs.yaml_text import to_yaml

TASK: dict[str, Any] = {"task": {"prompt": "x"}}
FIRST: dict[str, Any] = {"paths": "sophia/vllm", "token": "${T}"}


def endpoints(value: Any, **environment: str) -> Any:
    return load_config(TASK | {"endpoints": value}, environment=environment).config.endpoints


def test_auto_may_be_a_word() -> None:
    assert endpoints("auto").auto
    loaded = load_config(TASK, ["endpoints=auto", "endpoints.api_key=EMPTY"])
    assert loaded.config.endpoints.auto
    assert load_config(yaml.safe_load(to_yaml(loaded.plain))).plain == loaded.plain
    with pytest.raises(ConfigurationError, match="endpoints: expected keys"):
        endpoints("automatic")


@pytest.mark.parametrize(
    "value",
    [
        {"urls": ["http://h:1"]},
        {"aegis_registry": "http://h:8471"},
        {"hosts": ["a", "b[1-2]"], "port": 8001, "suffix": ".hsn"},
        {"hosts": "$PBS_NODEFILE", "per_host": 4},
        {"first": {}},
        {"first": FIRST, "models": {"org/m": "m"}, "proxy": False},
        {"simulated": {}},
        {"auto": True},
    ],
)
def test_every_kind_survives_the_run_file(value: dict[str, Any]) -> None:
    loaded = load_config(TASK | {"endpoints": value}, environment={"T": "t"})
    again = load_config(yaml.safe_load(to_yaml(loaded.plain)), environment={"T": "t"})
    assert (again.config, again.plain) == (loaded.config, loaded.plain)


def test_a_text_is_a_list_of_one() -> None:
    assert endpoints({"hosts": "nid[1-3]"}).hosts == ["nid[1-3]"]
    assert endpoints({"first": FIRST}, T="t").first.paths == ["sophia/vllm"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "exactly one of urls, .*found none"),
        ({"auto": False}, "found none"),
        ({"auto": True, "urls": ["http://h:1"]}, "found urls and auto"),
        ({"urls": ["http://h:1"], "port": 8000}, "port goes with hosts, not with urls"),
        ({"hosts": []}, r"endpoints\.hosts"),
        ({"hosts": "a", "port": 0}, r"endpoints\.port"),
        ({"first": FIRST | {"token_command": "x"}}, "token_command, not both"),
        ({"first": {"paths": []}}, r"endpoints\.first\.paths"),
        ({"first": {"sessions": 0}}, r"endpoints\.first\.sessions"),
        ({"first": FIRST | {"requests_per_s": 0}}, "requests_per_s"),
        ({"urls": ["http://h:1"], "refresh_s": 0}, "refresh_s"),
        ({"urls": ["http://h:1"], "models": ["m"]}, r"endpoints\.models"),
    ],
)
def test_what_does_not_fit(value: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        endpoints(value, T="t")


@pytest.mark.parametrize(
    ("token", "kept"), [("${T}", "${T}"), ("s3cr3t", MASKED), ("x${T}", MASKED)]
)
def test_what_is_kept_of_a_token(token: str, kept: str) -> None:
    settings = TASK | {"endpoints": {"first": FIRST | {"token": token}}}
    loaded = load_config(settings, environment={"T": "s3cr3t"})
    assert loaded.plain["endpoints"]["first"]["token"] == kept
    assert "s3cr3t" not in repr(loaded)
    assert "s3cr3t" not in to_yaml(loaded.plain)


def test_a_wrong_token_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as error:
        endpoints({"first": FIRST}, T="two words\nand more")
    assert "endpoints.first.token" in error.value.message
    assert "words" not in error.value.message


@pytest.mark.parametrize(
    "field",
    ["cache_salt", "api_port", "openai_endpoint", "stream_task_id", "streaming_server_host"],
)
def test_fields_that_a_gateway_refuses_are_refused_before_it_does(field: str) -> None:
    settings = TASK | {"model": {"extra_body": {field: "x", "top_k": 3}}}
    with pytest.raises(ConfigurationError, match=rf"gateway refuses requests with {field},"):
        load_config(settings | {"endpoints": {"first": FIRST}}, environment={"T": "t"})
    other = load_config(settings | {"endpoints": {"urls": ["http://h:1"]}}).config
    assert field in other.model.extra_body


@pytest.mark.parametrize(
    "limit",
    [
        *("requests_per_s", "tokens_per_min", "endpoint_requests_per_s"),
        *("endpoint_tokens_per_min", "endpoint_streams", "retry_budget", "affinity"),
    ],
)
def test_limits_are_off_by_default_and_positive(limit: str) -> None:
    good = TASK | {"endpoints": "auto"}
    assert getattr(load_config(good).config.limits, limit) is None
    assert getattr(load_config(good, [f"limits.{limit}=2"]).config.limits, limit) == 2
    with pytest.raises(ConfigurationError, match=rf"limits\.{limit}"):
        load_config(good, [f"limits.{limit}=0"])
