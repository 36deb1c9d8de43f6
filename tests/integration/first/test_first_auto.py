"""``endpoints: auto`` over the FIRST gateway, by a login of the facility's tool."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.auto import choose_endpoints
from fanfold.backends.discovery.connect import open_endpoint_set
from fanfold.backends.discovery.resolve import EndpointSet
from fanfold.configs.loader import load_config
from fanfold.graphs.run.estimate import estimate_run
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.session import RunOptions, execute_run
from fanfold.tests.support.first_gateway import DeploymentSpec, FirstGateway, make_spec

from .login import serve_renewals, store_login

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def home(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("OLLAMA_MODEL", raising=False)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    return empty_home


async def choose(model: str | None = "org/m", **sections: Any) -> EndpointSet:
    settings = {"task": {"prompt": "Say {text}"}, "endpoints": "auto", **sections}
    settings.setdefault("model", {"name": model})
    config = load_config(settings).config
    return await choose_endpoints(config, os.environ, Path.cwd(), ports=(9,))


async def test_a_login_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_login(home, "good")
    async with FirstGateway(make_spec()) as gateway:
        monkeypatch.setenv("inference_base_url", gateway.url)
        chosen = await choose()
        assert f"auto chose FIRST at {gateway.url}: 1 endpoint for org/m" == chosen.reason
        assert chosen.gateway is not None
        assert {call.user for call in gateway.calls} == {None, "user"}  # /status needs no token


async def test_a_login_that_is_due_for_renewal_is_renewed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "old", left_s=-10)
    async with FirstGateway(make_spec()) as gateway, serve_renewals(monkeypatch, "good"):
        monkeypatch.setenv("inference_base_url", gateway.url)
        assert (await choose()).gateway is not None


async def test_the_variables_address_is_used_with_a_login(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "good")
    metis = DeploymentSpec("metis", "api", "org/m", kind="direct")
    async with FirstGateway(make_spec(DeploymentSpec(), metis)) as gateway:
        monkeypatch.setenv("FIRST_API_BASE", f"{gateway.url}/metis/api/v1")
        monkeypatch.setenv("FIRST_MODEL", "org/m")
        chosen = await choose(None)
        assert [spec.label for spec in chosen.specs] == ["metis/api"]
        assert chosen.model == "org/m"


async def test_without_a_login_none_is_started_and_the_advice_is_shown(home: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"FIRST: alcf-tokens: .*alcf-tokens login"):
        await choose()
    assert not list(home.rglob("tokens.json"))


async def test_without_the_tool_first_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alcf_tokens.auth", None)
    with pytest.raises(ConfigurationError) as error:
        await choose()
    assert "FIRST:" not in error.value.message


async def test_a_gateway_that_does_not_answer_is_one_of_the_places_that_were_tried(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "good")
    monkeypatch.setenv("inference_base_url", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError) as error:
        await choose()
    assert "auto found no endpoints" in error.value.message
    assert "FIRST at http://127.0.0.1:9: http://127.0.0.1:9/v1: cannot" not in error.value.message
    assert "FIRST at http://127.0.0.1:9: http://127.0.0.1:9: cannot" in error.value.message


async def test_fields_that_the_gateway_refuses_are_refused_before_it_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "good")
    async with FirstGateway(make_spec()) as gateway:
        monkeypatch.setenv("inference_base_url", gateway.url)
        monkeypatch.setattr("fanfold.backends.discovery.auto.PORTS", (9,))
        model = {"name": "org/m", "extra_body": {"cache_salt": "x", "top_k": 1}}
        settings = {"task": {"prompt": "Say {text}"}, "endpoints": "auto", "model": model}
        config = load_config(settings).config
        with pytest.raises(ConfigurationError, match="gateway refuses requests with cache_salt,"):
            async with open_endpoint_set(config, {}):
                raise AssertionError
        assert gateway.count("chat/completions") == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"url": "/v1/chat/completions", "salt": True}, "gateway refuses requests with cache_salt"),
        ({"url": "/v1/completions", "salt": True}, "gateway refuses requests with cache_salt"),
        ({"url": "/score"}, "a FIRST gateway has no /score; it has /v1/chat/completions, "),
    ],
)
async def test_requests_that_the_gateway_refuses_are_refused_before_it_does(
    home: Path, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], message: str
) -> None:
    """A check, a run and a resumed run name the request; nothing is sent."""
    store_login(home, "good")
    plain = {"model": "org/m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
    bad = {"model": "org/m", "messages": plain["messages"], "prompt": "a", "text_1": "a"}
    if line.get("salt"):
        bad["cache_salt"] = "x"
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": plain},
        {"custom_id": "b", "method": "POST", "url": line["url"], "body": bad},
    ]
    (home / "in.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    async with FirstGateway(make_spec()) as gateway:
        monkeypatch.setenv("inference_base_url", gateway.url)
        monkeypatch.setattr("fanfold.backends.discovery.auto.PORTS", (9,))
        settings = {
            "input": {"path": "in.jsonl", "format": "openai_batch"},
            "endpoints": "auto",
            "model": {"name": "org/m"},
        }
        loaded = load_config(settings)
        with pytest.raises(ConfigurationError, match=f"request 'b': .*{message}"):
            await estimate_run(loaded)
        with pytest.raises(ConfigurationError, match=f"request 'b': .*{message}"):
            await prepare_run(loaded, home / "run")
        assert not (home / "run").exists()
        # a job finds its endpoints when it starts
        ready = await prepare_run(loaded, home / "run", defer_endpoints=True)
        console = Console(quiet=True)
        with pytest.raises(ConfigurationError, match=f"request 'b': .*{message}"):
            await execute_run(ready, RunOptions(quiet=True), console)
        assert gateway.count("chat/completions") == 0
