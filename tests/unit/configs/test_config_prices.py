from __future__ import annotations

import re
from importlib.resources import files

import orjson

from fanfold.configs.prices import find_listed_price, find_provider_name, list_priced_hosts


def test_every_entry_reads_and_is_dated() -> None:
    raw = orjson.loads((files("fanfold.configs") / "data" / "prices.json").read_bytes())
    models = [(p, m) for p in raw["providers"] for m in p["models"]]
    assert len(models) == len({(p["name"], m) for p, m in models}) > 20
    for provider, model in models:
        found = find_listed_price(provider["hosts"][0], model)
        assert found is not None
        assert found.model == model
        assert found.source.startswith("https://")
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", found.date)
        assert {type(found.prompt), type(found.completion)} == {float}
        assert 0 < (found.cached_prompt or found.prompt) <= found.prompt <= found.completion


def test_a_date_behind_the_name_changes_nothing() -> None:
    named, dated = (
        find_listed_price("api.openai.com", m) for m in ("gpt-5.4", "gpt-5.4-2026-03-05")
    )
    assert named == dated is not None
    assert find_listed_price("api.openai.com", "gpt-5.4-2026-03-05-mine") is None
    assert find_listed_price("api.openai.com", "gpt-5.4-preview") is None
    assert find_listed_price("api.openai.com", "my-gpt-5.4") is None


def test_a_snapshot_with_a_price_of_its_own_keeps_it() -> None:
    old, new = (
        find_listed_price("api.openai.com", m) for m in ("gpt-4o-2024-05-13", "gpt-4o-2024-11-20")
    )
    assert old is not None
    assert new is not None
    assert (old.prompt, old.cached_prompt, new.prompt) == (5, None, 2.5)


def test_dates_mean_nothing_where_no_snapshots_are_dated() -> None:
    assert find_listed_price("api.groq.com", "openai/gpt-oss-20b") is not None
    assert find_listed_price("api.groq.com", "openai/gpt-oss-20b-2026-01-01") is None


def test_what_a_cache_takes_in_is_priced_high() -> None:
    found = find_listed_price("api.openai.com", "gpt-6-luna")
    assert found is not None
    assert (found.prompt, found.cached_prompt, found.longest_prompt) == (0.125, 0.01, 272_000)


def test_only_the_providers_own_hosts_have_prices() -> None:
    assert "api.openai.com" in list_priced_hosts()
    assert find_provider_name("API.OpenAI.com.") == "OpenAI"
    for stranger in ("node17", "localhost", "api.openai.com.example.org", "xapi.openai.com", ""):
        assert find_provider_name(stranger) is None
        assert find_listed_price(stranger, "gpt-5.4") is None
