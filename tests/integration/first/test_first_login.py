"""The login of the FIRST gateway, with the facility's real tool and a fabricated token store."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError, MissingExtraError, RunStoppedError
from fanfold.backends.discovery.login import LoginToken, read_login_token
from fanfold.backends.discovery.resolve import make_gateway_set
from fanfold.configs.endpoints import FirstConfig
from fanfold.tests.support.first_gateway import FirstGateway, TokenSpec, make_spec

from .login import serve_renewals, store_login

pytestmark = pytest.mark.integration


@pytest.fixture
def home(empty_home: Path) -> Path:
    return empty_home


async def test_the_token_of_a_login_is_used(home: Path) -> None:
    store_login(home, "good")
    assert await LoginToken("endpoints.first", {"FIRST_API_KEY": "other"})() == "good"


async def test_without_a_login_the_variable_is_used(home: Path) -> None:
    assert home
    assert await LoginToken("endpoints.first", {"FIRST_API_KEY": "mine"})() == "mine"
    with pytest.raises(RunStoppedError, match="FIRST_API_KEY is not a token") as error:
        await LoginToken("endpoints.first", {"FIRST_API_KEY": "two words"})()
    assert "two words" not in error.value.message


async def test_without_either_the_advice_of_the_tool_is_shown(home: Path) -> None:
    assert home
    with pytest.raises(RunStoppedError) as error:
        await LoginToken("endpoints.first", {})()
    for words in ('"alcf-tokens login"', "FIRST_API_KEY", "endpoints.first.token"):
        assert words in error.value.message


async def test_without_the_tool_the_extra_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert home
    monkeypatch.setitem(sys.modules, "alcf_tokens.auth", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fanfold\[first\]'"):
        read_login_token()
    with pytest.raises(RunStoppedError, match=r"fanfold\[first\]"):
        await LoginToken("endpoints.first", {})()
    assert await LoginToken("endpoints.first", {"FIRST_API_KEY": "mine"})() == "mine"


async def test_an_expired_token_is_renewed_by_the_tool(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "old", left_s=-10)
    async with serve_renewals(monkeypatch, "new") as renewals:
        token = LoginToken("endpoints.first", {})
        assert set(await asyncio.gather(*(token() for _ in range(10)))) == {"new"}
        assert renewals.asked == 1


async def test_a_login_that_is_too_old_is_named_without_the_token(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "old-secret", left_s=-10)
    async with serve_renewals(monkeypatch):
        with pytest.raises(RunStoppedError, match="log in again: alcf-tokens login") as error:
            await LoginToken("endpoints.first", {})()
    assert "secret" not in error.value.message


async def test_the_tool_is_asked_again_when_the_token_is_old(home: Path) -> None:
    now = 0.0
    store_login(home, "first")
    token = LoginToken("endpoints.first", {}, max_age_s=100.0, clock=lambda: now)
    assert await token() == "first"
    store_login(home, "second")
    assert await token() == "first"
    now = 101.0
    assert await token() == "second"


async def test_an_old_token_is_kept_if_no_new_one_can_be_fetched(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    file = store_login(home, "first-secret")
    token = LoginToken("endpoints.first", {}, max_age_s=100.0, clock=lambda: now)
    assert await token() == "first-secret"
    file.unlink()
    now = 101.0
    assert await token() == "first-secret"
    assert "alcf-tokens login" in caplog.text
    assert "secret" not in caplog.text


async def test_a_refused_token_is_renewed_before_its_time_and_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store_login(home, "revoked-secret")
    spec = make_spec(tokens={"fresh-secret": TokenSpec()})
    async with serve_renewals(monkeypatch, "fresh-secret") as renewals, FirstGateway(spec) as first:
        gateway = make_gateway_set(FirstConfig(base_url=first.url), None).gateway
        assert gateway is not None
        (found,) = await gateway.probe_models()
        assert found.models == ("org/m",)
        assert renewals.asked == 1
        first.tokens.clear()
        first._refused_tokens.clear()
        lost = make_gateway_set(FirstConfig(base_url=first.url, paths=["sophia/vllm"]), None)
        with pytest.raises(ConfigurationError, match="log in again: alcf-tokens login"):
            await lost.probe()
    assert "fresh-secret" not in caplog.text
    assert "revoked-secret" not in caplog.text


async def test_maintenance_is_reported_before_a_login_is_asked_for(home: Path) -> None:
    assert home
    async with FirstGateway(make_spec(maintenance=("sophia",))) as first:
        endpoint_set = make_gateway_set(FirstConfig(base_url=first.url), None)
        with pytest.raises(ConfigurationError, match="under maintenance: sophia"):
            await endpoint_set.probe()
        assert [call.path for call in first.calls] == ["/resource_server/status"]
        first.maintenance.clear()
        with pytest.raises(ConfigurationError, match="alcf-tokens login"):
            await endpoint_set.probe()


async def test_the_variable_of_the_facilitys_tools_names_the_gateway(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_login(home, "good")
    async with FirstGateway(make_spec()) as first:
        monkeypatch.setenv("inference_base_url", f"{first.url}/")
        (found,) = await make_gateway_set(FirstConfig(), None).probe()
        assert found.label == "sophia/vllm"
        monkeypatch.setenv("inference_base_url", "ftp://x")
        with pytest.raises(ConfigurationError, match="inference_base_url"):
            make_gateway_set(FirstConfig(), None)


async def test_a_command_that_fails_is_named() -> None:
    async with FirstGateway(make_spec()) as first:
        given = FirstConfig(base_url=first.url, token_command="false")
        with pytest.raises(ConfigurationError, match=r"first\.token_command.* exit status 1"):
            await make_gateway_set(given, None).probe()
