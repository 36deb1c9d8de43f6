from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.budget.price import Price, read_price
from fanfold.backends.budget.pricing import (
    explain_no_price,
    find_model_price,
    find_token_prices,
)
from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.money import TokenPrices
from fanfold.configs.models import RunConfig

OPENAI = "https://api.openai.com/v1"


def config(endpoints: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    data = {"task": {"prompt": "x"}, "endpoints": endpoints or {"urls": [OPENAI]}}
    return RunConfig.model_validate(data | sections)


def test_the_list_holds_for_the_provider_itself() -> None:
    found = find_model_price(config(), "gpt-5.4-mini-2026-03-17", simulated=False)
    assert found is not None
    assert (found.prompt, found.cached_prompt, found.completion) == (0.75, 0.075, 4.5)
    assert found.token_prices == TokenPrices.from_usd(0.75, 0.075, 4.5)
    assert find_token_prices(config(), "gpt-5.4-mini", simulated=False) == found.token_prices
    assert str(found) == (
        "$0.75 prompt, $0.075 cached, $4.5 completion per million tokens (fanfold's list of "
        f"{found.date} for OpenAI, https://developers.openai.com/api/docs/pricing)"
    )


@pytest.mark.parametrize(
    ("endpoints", "model"),
    [
        ({"urls": ["http://node17:8000/v1"]}, "gpt-5.4"),
        ({"urls": [OPENAI, "http://node17:8000/v1"]}, "gpt-5.4"),
        ({"urls": ["https://proxy.example.org/openai/v1"]}, "gpt-5.4"),
        ({"hosts": ["api.openai.com"]}, "gpt-5.4"),
        ({"auto": True}, "gpt-5.4"),
        ({"aegis_registry": "http://head:8471"}, "gpt-5.4"),
        ({"first": {"paths": ["a/b"], "token": "t"}}, "openai/gpt-oss-120b"),
        ({"urls": [OPENAI]}, "openai/gpt-oss-120b"),
        ({"simulated": {}}, "gpt-5.4"),
    ],
)
def test_what_others_serve_has_no_listed_price(endpoints: dict[str, Any], model: str) -> None:
    simulated = "simulated" in endpoints
    assert find_model_price(config(endpoints), model, simulated) is None
    assert explain_no_price(config(endpoints), model, simulated)
    with pytest.raises(ConfigurationError, match=r"budget\.usd is set.*unknown.*model\.price"):
        find_model_price(config(endpoints, budget={"usd": 1}), model, simulated)
    with pytest.raises(ConfigurationError):
        find_token_prices(config(endpoints, budget={"usd": 1}), model, simulated)
    assert find_token_prices(config(endpoints), model, simulated) is None
    assert find_model_price(config(endpoints, budget={"tokens": 1}), model, simulated) is None


def test_workers_own_nodes_have_no_listed_price() -> None:
    backend = {"kind": "parsl", "node_endpoints": True}
    assert find_model_price(config(backend=backend), "gpt-5.4", simulated=False) is None


def test_another_service_tier_has_another_price() -> None:
    def asked(tier: str) -> Price | None:
        model = {"extra_body": {"service_tier": tier}}
        return find_model_price(config(model=model), "gpt-5.4", simulated=False)

    assert asked("default") is not None
    assert asked("priority") is asked("flex") is None


def test_an_endpoints_file_names_its_hosts(tmp_path: Path) -> None:
    file = tmp_path / "e.txt"
    file.write_text(f"{OPENAI}\n")
    assert find_model_price(config({"file": str(file)}), "gpt-4.1", simulated=False) is not None
    file.write_text(f"{OPENAI}\nhttp://node17:8000/v1\n")
    assert find_model_price(config({"file": str(file)}), "gpt-4.1", simulated=False) is None


def test_what_is_billed_is_the_id_that_is_served() -> None:
    endpoints = {"urls": ["https://api.groq.com/openai/v1"], "models": {"openai/gpt-oss-120b": "g"}}
    found = find_model_price(config(endpoints), "g", simulated=False)
    assert found is not None
    assert found.prompt == 0.15
    two = {"urls": [OPENAI], "models": {"gpt-5.4": "g", "gpt-5.4-mini": "g"}}
    found = find_model_price(config(two), "g", simulated=False)
    assert found is not None
    assert found.prompt == 2.5  # the dearer one


def test_the_settings_own_price_comes_first() -> None:
    given = {"price": {"prompt": 1, "completion": 2}}
    found = find_model_price(config(model=given), "gpt-5.4", simulated=False)
    assert found == Price(1, None, 2)
    assert str(found) == "$1 prompt, $2 completion per million tokens (model.price)"
    kinds: list[dict[str, Any]] = [{"urls": ["http://n:1"]}, {"simulated": {}}]
    for endpoints in kinds:
        simulated = "simulated" in endpoints
        found = find_model_price(config(endpoints, model=given, budget={"usd": 1}), "m", simulated)
        assert found == Price(1, None, 2, simulated=simulated)
    assert str(found).endswith("(model.price), SIMULATED")


def test_nodes_paid_by_time() -> None:
    given = {"price": {"node_hour": 3.6}}
    found = find_model_price(
        config({"urls": ["http://n:1"]}, model=given, budget={"usd": 1}), "m", simulated=False
    )
    assert found == Price(node_hour=3.6)
    assert found is not None
    assert found.token_prices == TokenPrices(node=1_000_000)
    assert str(found) == "$3.6 per node-hour (model.price)"
    both = find_model_price(config(model=given), "gpt-4.1", simulated=False)
    assert both is not None
    assert (both.prompt, both.node_hour, both.provider) == (2, 3.6, "OpenAI")


def test_provenance_keeps_it() -> None:
    found = find_model_price(config(), "gpt-6-sol", simulated=False)
    assert found is not None
    kept = orjson.loads(orjson.dumps({"price": found.to_json()}))
    assert read_price(kept) == found
    assert read_price({"price": None}) is read_price({}) is None
