"""Form fields of settings: what they show, and which of them count."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from fanfold.backends.budget.limits import SETTING_UNITS
from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.budget import BudgetConfig
from fanfold.configs.describe import describe_setting, find_setting, setting_schema
from fanfold.configs.models import LimitsConfig, RunConfig
from fanfold.configs.preset_files import preset_names
from fanfold.graphs.bound_graph import BoundSettings
from fanfold.graphs.context import RunContext
from fanfold.graphs.map_reduce import build_bound_graph, get_run_graph
from fanfold.nodes.batch.approve import ANSWER_SCHEMA

OWN: dict[str, Any] = {
    "task": {"prompt": "What is {x}?"},
    "endpoints": {"urls": ["http://127.0.0.1:9/v1"]},
    "limits": {"streams": 9},
}
FORM: dict[str, Any] = (
    build_bound_graph(trust_context=True).compile().get_context_jsonschema() or {}
)["properties"]
KEYS = {f.name: f.metadata["key"] for f in fields(RunContext) if "key" in f.metadata}


def test_every_field_has_a_description_and_a_default() -> None:
    assert FORM.keys() == {f.name for f in fields(RunContext)}
    assert all(field["description"] and "default" in field for field in FORM.values())
    assert FORM["preset"]["enum"] == preset_names()


@pytest.mark.parametrize("name", KEYS)
def test_fields_show_what_the_settings_say(name: str) -> None:
    """Types, bounds and choices are those of the configuration, whatever the field's own hint."""
    of = setting_schema(KEYS[name])
    told = ("anyOf", "type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    assert {k: v for k, v in FORM[name].items() if k in told} == {
        k: v for k, v in of.items() if k in told
    }
    assert FORM[name]["description"] == describe_setting(KEYS[name])


@pytest.mark.parametrize(("section", "model"), [("limits", LimitsConfig), ("budget", BudgetConfig)])
def test_all_limits_can_be_filled_in(section: str, model: type[BaseModel]) -> None:
    names = {f"{section}.{name}" for name in model.model_fields}
    assert names - {"budget.reserve_for_reduce"} <= set(KEYS.values())  # of pipelines, no limit


def test_defaults_are_those_of_the_settings() -> None:
    for name, key in KEYS.items():
        found = find_setting(key)
        if not found.is_required():
            assert FORM[name]["default"] == found.get_default(call_default_factory=True), name


def test_only_what_differs_from_its_default_counts() -> None:
    config = RunContext(config=OWN, streams=256, max_tokens=64, reduce=[{"op": "count"}]).loaded
    assert config.config.limits.streams == 9
    assert config.config.model.max_tokens == 64
    assert [stage.op for stage in config.config.reduce] == ["count"]
    back = RunContext(config=OWN, streams=64, overrides=["limits.streams=256"])
    assert back.loaded.config.limits.streams == 256


def test_emptied_fields_count_as_left_alone() -> None:
    given = RunContext(config="", model="", dataset="", endpoints="", api_key="", out="")
    assert given.changed_fields() == {}
    assert given.loaded.preset == "quickstart"


def test_endpoints_and_key_are_said_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    urls = "http://a:1/v1,http://b:1/v1"
    loaded = RunContext(preset="data_annotation", endpoints=urls, api_key="${MY_KEY}").loaded
    assert loaded.config.endpoints.urls == urls.split(",")
    assert loaded.config.endpoints.simulated is None
    assert loaded.config.endpoints.api_key.get_secret_value() == "sesame"
    assert loaded.plain["endpoints"]["api_key"] == "${MY_KEY}"


def test_a_pause_asks_for_what_the_form_caps() -> None:
    limits = {key for key, _ in SETTING_UNITS.values()}
    assert ANSWER_SCHEMA["properties"].keys() == limits | {"number"}
    for name in limits:
        asked = ANSWER_SCHEMA["properties"][name]
        capped = FORM[name]["anyOf"][0]
        assert (asked["type"], asked["exclusiveMinimum"]) == (capped["type"], 0)


def test_a_key_that_is_typed_in_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="name a variable") as caught:
        _ = RunContext(config=OWN, api_key="sk-123").loaded
    assert "sk-123" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"streams": 0}, r"limits\.streams: .*greater than or equal to 1"),
        ({"on_limit": "wait"}, r"budget\.on_limit: .*'pause' or 'stop'"),
        ({"preset": "molecules"}, r"no preset 'molecules' \(there are"),
        ({"overrides": ["limit.streams=1"]}, "unknown key 'limit'; did you mean 'limits'"),
    ],
)
def test_wrong_values_are_named_by_their_key(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        _ = RunContext(**wrong).loaded


def test_what_is_handed_over_goes_on_top_of_what_is_bound() -> None:
    bound = RunContext(config=OWN, overrides=["model.seed=1"], streams=8)
    of = BoundSettings(bound)
    assert of.resolve(None) is of.resolve(RunContext()) is bound
    given = RunContext(max_tokens=64, overrides=["model.seed=2"])
    config = of.resolve(given).loaded.config
    assert (config.limits.streams, config.model.max_tokens, config.model.seed) == (8, 64, 2)
    assert of.resolve(given) is of.resolve(RunContext(max_tokens=64, overrides=["model.seed=2"]))
    other = RunContext(preset="data_annotation")
    assert of.resolve(other) is other


def test_what_stands_alone() -> None:
    """Settings that were loaded already may hold a key, which the run's folder does not keep."""
    assert RunContext(config=OWN).stands_alone
    assert RunContext.from_loaded(RunContext(config=OWN).loaded).stands_alone
    assert not RunContext(streams=8, overrides=["model.seed=1"]).stands_alone


def test_runs_share_a_compiled_graph_and_nothing_else() -> None:
    savers = InMemorySaver(), InMemorySaver()
    one, other = map(get_run_graph, savers)
    assert one.nodes["shard"] is other.nodes["shard"]
    assert (one.checkpointer, other.checkpointer) == savers
    context = RunContext.from_loaded(RunContext(config=OWN).loaded)
    assert BoundSettings(RunContext()).resolve(context) is context
    again = RunContext.from_loaded(context.loaded)
    assert BoundSettings(RunContext()).resolve(again)._runs is not context._runs


@pytest.mark.parametrize(
    "theirs", [{"model": "theirs"}, {"prompt": "theirs", "tokens": 5}, {"config": {}, "user": "me"}]
)
def test_a_parents_own_context_is_not_taken_for_fanfolds(theirs: dict[str, Any]) -> None:
    bound = RunContext(config=OWN)
    assert BoundSettings(bound).resolve(theirs) is bound
    assert BoundSettings(bound).resolve(SimpleNamespace(**theirs)) is bound


def settings_of(model: type[BaseModel], before: str = "") -> list[str]:
    """Return the dotted keys of all settings, those of sections within sections left aside."""
    keys = list[str]()
    for name, about in model.model_fields.items():
        section = about.annotation
        key = f"{before}{about.alias or name}"
        if not before and isinstance(section, type) and issubclass(section, BaseModel):
            keys += settings_of(section, f"{key}.")
        else:
            keys.append(key)
    return keys


def test_every_setting_can_be_filled_in() -> None:
    shown = set(KEYS.values())
    for one in fields(RunContext):
        if section := one.metadata.get("section"):
            properties = FORM[one.name]["anyOf"][0]["properties"]
            assert all(about["description"] for about in properties.values())
            shown |= {f"{section}.{name}" for name in properties}
    of_pipelines = {"stages", "budget.reserve_for_reduce", "input.split"}  # those of a file
    assert set(settings_of(RunConfig)) - shown == of_pipelines | {"input.path", "endpoints.api_key"}


def test_options_of_a_section_join_what_other_fields_say() -> None:
    context = RunContext(backend="parsl", backend_options={"silence_s": 30}, node={"instances": 2})
    assert context.to_assignments() == [
        'backend.kind="parsl"',
        "backend.silence_s=30",
        "node.instances=2",
    ]
    loaded = RunContext(config=OWN, backend_options={"silence_s": 30}).loaded
    assert loaded.config.backend.silence_s == 30


def test_no_secret_is_typed_into_options() -> None:
    written = {"first": {"base_url": "https://gateway", "token": "s3cret"}}
    with pytest.raises(ConfigurationError, match="environment") as caught:
        RunContext(endpoint_options=written).to_assignments()
    assert "s3cret" not in caught.value.message
    written["first"]["token"] = "${TOKEN}"
    assert RunContext(endpoint_options=written).to_assignments()
