"""Secrets are masked wherever settings are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.secrets import (
    MASKED,
    is_secret,
    mask_arguments,
    mask_command,
    mask_data,
    mask_url,
)
from fanfold.backends.discovery.resolve import make_node_plan
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.configs.preset_files import preset_names
from fanfold.configs.serialize import find_lost_secrets, mask_settings
from fanfold.configs.yaml_text import to_yaml
from fanfold.graphs.run.prepare import describe_session

KEY = "s3cr3t-value"


@pytest.mark.parametrize(
    "name",
    [
        *("password", "PASSWORD", "db_password", "api_key", "apiKey", "APIKey", "X-Auth-Token"),
        *("hf_token", "HF_TOKEN", "client-secret", "ClientSecret", "auth", "Authorization", "key"),
        *("endpoints.api_key", "node.env.OPENAI_API_KEY2", "apikey", "awsSecretAccessKey"),
        "proxy-authorization",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "tokens_per_min", "maxTokens", "keyboard", "monkey", "tokenizer", "author"),
        *(
            "keys",
            "hotkeys",
            "secretary",
            "authority",
            "endpoints",
            "key.name",
            "",
            "passwords_file",
        ),
        "limits.endpoint_tokens_per_min",
    ],
)
def test_names_of_others(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{KEY}@host:1/v1", f"https://me:{MASKED}@host:1/v1"),
        (f"postgresql://u:{KEY}@h/d?sslmode=on", f"postgresql://u:{MASKED}@h/d?sslmode=on"),
        (f"http://u:{KEY}@h/?token={KEY}", f"http://u:{MASKED}@h/?token={MASKED}"),
        (f"redis://:{KEY}@h", f"redis://:{MASKED}@h"),
        (f"https://h/p?a=1&api_key={KEY}&b=2", f"https://h/p?a=1&api_key={MASKED}&b=2"),
        (f"https://h/p?key={KEY}#x", f"https://h/p?key={MASKED}#x"),
        ("https://me:${PW}@host", "https://me:${PW}@host"),
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("mail me@host: now", "mail me@host: now"),
        ("https://h/p?max_tokens=5", "https://h/p?max_tokens=5"),
    ],
)
def test_urls(text: str, shown: str) -> None:
    assert mask_url(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        f"vllm serve m --api-key {KEY} --port 1",
        f"vllm serve m --api-key={KEY} --port 1",
        f"env HF_TOKEN={KEY} serve",
        f"sh -c 'API_KEY={KEY} serve'",
        f"curl -H 'Authorization: Bearer {KEY}' http://h",
        f'curl -H "X-Api-Key: {KEY}" http://h',
        f"get --token '{KEY}'",
        f"serve https://u:{KEY}@h/x",
    ],
)
def test_commands(text: str) -> None:
    shown = mask_command(text)
    assert KEY not in shown
    assert MASKED in shown
    assert mask_command(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve {model} --port {port} --max-model-len 8192 --tokenizer x",
        "vllm serve m --api-key ${VLLM_KEY}",
        "python get_token.py --scope a=b",
        "mpiexec -n {workers} -x FANFOLD_COORDINATOR_TOKEN -x A=b",
    ],
)
def test_commands_without_secrets_are_unchanged(text: str) -> None:
    assert mask_command(text) == text


@pytest.mark.parametrize(
    "words",
    [
        ["run", "c.yaml", "--set", f"endpoints.api_key={KEY}"],
        ["run", "c.yaml", f"--set=endpoints.first.token={KEY}"],
        ["run", "--set", f"node.env={{HF_TOKEN: {KEY}, A: b}}"],
        ["run", "--set", f'model.extra_body={{"apiKey": "{KEY}"}}'],
        ["run", "--set", f"node.serve=vllm serve --api-key {KEY}"],
        ["run", "--checkpointer", f"postgresql://me:{KEY}@host/db"],
        ["run", "--endpoints", f"http://h/v1?key={KEY}"],
    ],
)
def test_the_command_in_provenance(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert KEY not in " ".join(mask_arguments(words))
    monkeypatch.setattr(sys, "argv", ["/bin/fanfold", *words])
    kept = describe_session(RunFolder(tmp_path))["command"]
    assert KEY not in json.dumps(kept)
    assert kept[:2] == ["fanfold", "run"]


def loaded(**sections: Any) -> LoadedConfig:
    settings = {
        "task": {"prompt": "{q} key: value token=1 http://u:p@h"},
        "endpoints": {"urls": ["http://n:1"]},
    }
    return load_config(settings | sections, environment={"K": KEY})


WRITTEN: dict[str, dict[str, Any]] = {
    "model.extra_body.api_key": {"model": {"extra_body": {"api_key": KEY}}},
    "model.extra_body.a.0.authToken": {"model": {"extra_body": {"a": [{"authToken": KEY}]}}},
    "node.env.MY_SECRET": {"node": {"env": {"MY_SECRET": KEY}}},
    "node.serve": {"node": {"serve": f"vllm serve m --api-key {KEY}"}},
    "backend.command": {"backend": {"kind": "launched", "command": f"env A_TOKEN={KEY} mpiexec"}},
    "endpoints.api_key": {"endpoints": {"urls": ["http://n:1"], "api_key": KEY}},
    "endpoints.first.token": {"endpoints": {"first": {"paths": ["a/b"], "token": KEY}}},
    "endpoints.first.token_command": {
        "endpoints": {"first": {"paths": ["a/b"], "token_command": f"get --password {KEY}"}}
    },
    "endpoints.aegis_registry": {"endpoints": {"aegis_registry": f"http://u:{KEY}@head:1"}},
    "backend.exchange.url": {
        "backend": {"kind": "academy", "exchange": {"kind": "http", "url": f"http://u:{KEY}@h"}}
    },
    "backend.exchange.password": {
        "backend": {"kind": "academy", "exchange": {"kind": "redis", "password": KEY}}
    },
}


@pytest.mark.parametrize("path", WRITTEN)
def test_run_yaml_keeps_no_secret(path: str) -> None:
    settings = loaded(**WRITTEN[path])
    text = to_yaml(settings.plain)
    assert KEY not in text
    assert list(find_lost_secrets(settings.plain)) == [path]
    assert "key: value token=1 http://u:p@h" in text  # a prompt is a prompt
    assert KEY not in repr(settings)


@pytest.mark.parametrize("name", preset_names())
def test_run_yaml_of_presets_is_unchanged(name: str) -> None:
    settings = load_config(name)
    before = settings.config.model_dump(mode="json", by_alias=True)
    before["endpoints"]["api_key"] = "EMPTY"
    assert mask_settings(before) == before
    assert to_yaml(settings.plain) == to_yaml(mask_settings(settings.plain))
    assert MASKED not in to_yaml(settings.plain)


def test_what_names_no_secret_is_unchanged() -> None:
    schema = {
        "type": "object",
        "properties": {"token": {"type": "string"}, "key": {"enum": ["a"]}},
        "dependentRequired": {"token": ["key"]},
    }
    settings = loaded(
        task={"prompt": "{key}", "schema": schema},
        endpoints={"urls": ["http://n:1"], "models": {"my-key": "llm"}, "api_key": "${K}"},
        model={"name": "llm", "extra_body": {"key": "${K}", "min_tokens": 3, "token": 5}},
        node={"serve": "serve --api-key ${K}", "env": {"A_TOKEN": "${K}"}},
    )
    assert MASKED not in to_yaml(settings.plain)
    assert KEY not in to_yaml(settings.plain)


def test_nested_headers() -> None:
    headers = {
        "X-Auth-Token": KEY,
        "Accept": "a",
        "Cookie": KEY,
        "n": {"list": [{"pass_key": KEY}]},
    }
    shown = mask_data({"headers": headers})
    assert KEY not in str(shown)
    assert shown["headers"]["Accept"] == "a"


def test_servers_want_a_lost_secret_again() -> None:
    again = load_config(loaded(**WRITTEN["node.serve"]).plain)
    with pytest.raises(ConfigurationError, match=r"node\.serve: a run folder does not store"):
        make_node_plan(again.config, Path("s"), "n", {})


@pytest.mark.parametrize(
    ("sections", "overrides"),
    [
        ({"limits": {"streams": 0}, "model": {"extra_body": {"api_key": KEY}}}, []),
        ({"endpoints": {"urls": ["http://n:1"], "api_key": [KEY]}}, []),
        ({"backend": {"exchange": {"kind": "http", "port": f"http://u:{KEY}@n:1"}}}, []),
        ({"model": {"api_key": KEY}}, []),
        ({"limits": {"streams": f"--api-key {KEY}"}}, []),
        ({}, [f"endpoints.api_key={{{KEY}: [}}"]),
        ({}, [f"node.serve=serve --token {KEY}: x: ["]),
    ],
)
def test_errors_show_none(sections: dict[str, Any], overrides: list[str]) -> None:
    settings = {"task": {"prompt": "x"}, "endpoints": {"urls": ["http://n:1"]}} | sections
    with pytest.raises(ConfigurationError) as caught:
        load_config(settings, overrides)
    assert KEY not in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        f'bash -c "vllm serve m --api-key {KEY}"',
        f"vllm serve m -H 'X-Api-Key:{KEY}'",
        f"{{HF_TOKEN: a b {KEY}}}",
        f"{{HF_TOKEN: !!str {KEY}}}",
        f'{{token: "hun\\" {KEY}"}}',
        f"{{api_key : {KEY}}}",
        f"--token=a\\ {KEY}",
        f"--api-key --{KEY}",
        f"--api_key:{KEY}",
        f"password:{KEY}",
        f"password = {KEY}",
        f"KEY=${KEY[1:]}pass {KEY}",
        f"curl -u user:{KEY}",
        f"curl --user=user:{KEY}",
        *(f"Authorization:{scheme} {KEY}" for scheme in ("Bearer", "Basic", "Token", "Digest")),
        f'["--api-key", "{KEY}"]',
        f'{{\\"api_key\\": \\"{KEY}\\"}}',
        f"model.extra_body.auth.value={KEY}",
        f"serve --api-key ${{K}} --hf-token {KEY}",
        f"--api-key ${{K}}{KEY}",
        f"bearer {KEY}",
    ],
)
def test_a_secret_is_masked_to_the_end(text: str) -> None:
    shown = mask_command(text)
    assert KEY not in shown
    assert shown.endswith(MASKED)
    assert mask_command(shown) == shown
    assert KEY not in str(loaded(model={"extra_body": {"user": [text]}}).plain)


def test_only_variables_in_braces_are_shown() -> None:
    assert mask_command("serve --api-key $hunter2") == f"serve --api-key {MASKED}"
    assert mask_data({"HF_TOKEN": "$hunter2"}) == {"HF_TOKEN": MASKED}
    assert mask_data({"HF_TOKEN": "Bearer ${K}"}) == {"HF_TOKEN": "Bearer ${K}"}


@pytest.mark.parametrize(
    "extra",
    [
        {"auth": {"value": KEY}},
        {"key": {"a": [{"b": KEY}]}},
        {"headers": [f"Authorization: Bearer {KEY}"]},
        {"a": {"ARGS": f"--api-key {KEY}"}},
        {"a": ["--api-key", KEY]},
    ],
)
def test_texts_below_secret_keys(extra: dict[str, Any]) -> None:
    assert KEY not in to_yaml(loaded(model={"extra_body": extra}).plain)


@pytest.mark.parametrize(
    "words",
    [
        ["--token", f"--{KEY}"],
        ["Authorization:", "Token", KEY],
        ["password", "=", KEY],
        ["-u", f"user:{KEY}"],
        ["--set", f'model.extra_body.user=bash -c "vllm --api-key {KEY}"'],
        ["--set", f'model.extra_body.h=["X-Api-Key:{KEY}"]'],
    ],
)
def test_secrets_in_several_words(words: list[str]) -> None:
    shown = list(mask_arguments([*words, "--limit", "3"]))
    assert KEY not in " ".join(shown)
    assert shown[-2:] == ["--limit", "3"]


def test_an_override_that_is_no_yaml_shows_no_secret() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config({"task": {"prompt": "x"}}, [f"model.temperature={{token : {KEY}"])
    assert KEY not in caught.value.message
