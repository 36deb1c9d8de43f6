"""Section ``stages``: what is refused, and the settings of each stage as those of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.base import Access
from fanfold.configs.describe import iter_access
from fanfold.configs.loader import load_config, load_stage
from fanfold.configs.yaml_text import to_yaml

SETTINGS: dict[str, Any] = {
    "input": {"dataset": "abstracts"},
    "task": {"system": "Be brief.", "repairs": 3},
    "model": {"name": "large", "max_tokens": 100},
    "limits": {"streams": 8},
    "endpoints": {"simulated": {"nodes": 2}},
    "stages": [
        {"name": "screen", "map": {"prompt": "{title}"}, "model": {"name": "small"}},
        {"name": "best", "where": "output == a", "map": {"prompt": "{abstract} {screen}"}},
        {"name": "all", "from": "screen", "reduce": {"op": "summarize", "prompt": "Sum"}},
    ],
}
REAL = {"endpoints": {"urls": ["http://node0:8000/v1"]}}


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    change(settings)
    return settings


def merge_into_documents(settings: dict[str, Any]) -> None:
    """Give a stage the name of the one that ``input.split.merge`` adds."""
    settings["input"]["split"] = {"column": "abstract", "merge": "vote"}
    settings["stages"][1]["name"] = "documents"


def test_a_stage_has_the_defaults_of_the_top_level() -> None:
    loaded = load_config(SETTINGS)
    screen, best, summary = (load_stage(loaded, n).config for n in range(3))
    assert (screen.model.name, best.model.name) == ("small", "large")
    assert screen.model.max_tokens == best.model.max_tokens == 100
    assert (screen.task.system, screen.task.prompt) == ("Be brief.", "{title}")
    assert best.task.repairs == 3
    assert (screen.input.dataset, best.input.dataset, summary.input.dataset) == (
        "abstracts",
        None,
        None,
    )
    assert screen.stages is None


def test_run_yaml_is_a_valid_configuration(tmp_path: Path) -> None:
    loaded = load_config(SETTINGS)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(loaded.plain))
    assert load_config(file).plain == loaded.plain


def test_requests_cannot_set_stages() -> None:
    closed = {key: access for key, access in iter_access() if key.startswith("stages")}
    assert closed == {"stages": Access.CLOSED}


def test_settings_without_stages_name_none() -> None:
    plain = load_config("data_annotation").plain
    assert "stages" not in plain
    assert "reserve_for_reduce" not in plain["budget"]


def test_secrets_of_a_stage_are_masked_and_variables_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    for key, kept in (("sk-written", "**********"), ("${MY_KEY}", "${MY_KEY}"), ("EMPTY", "EMPTY")):
        own = {"urls": ["http://node1:8000/v1"], "api_key": key}
        settings = copy.deepcopy(SETTINGS) | REAL
        settings["stages"][0]["endpoints"] = own
        loaded = load_config(settings)
        assert loaded.plain["stages"][0]["endpoints"]["api_key"] == kept
        assert "secret" not in to_yaml(loaded.plain)


def test_files_of_a_stage_are_inlined(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {}}')
    settings = changed(lambda d: d["stages"][0]["map"].update(schema="schema.json"))
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(settings))
    assert load_config(file).plain["stages"][0]["map"]["schema"]["type"] == "object"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["stages"][0].update(nam=1), "did you mean 'name'"),
        (lambda d: d["stages"][0].update(name="Big"), "stages.0.name"),
        (lambda d: d["stages"][0].update(name="input"), "already means something else"),
        (lambda d: d["stages"][1].update(name="screen"), "occurs twice"),
        (merge_into_documents, "split.merge adds a stage of this name"),
        (lambda d: d["stages"][0].update(map=None), "nothing to do"),
        (lambda d: d["stages"][0].update(where="output == a"), "leave them out"),
        (lambda d: d["stages"][2].update({"from": "later"}), "not an earlier stage"),
        (lambda d: d["stages"][2].update(map={"prompt": "x"}), "both map and the operator"),
        (lambda d: d["stages"][2]["reduce"].update(op="sumarize"), "did you mean 'summarize'"),
        (lambda d: d["stages"][2]["reduce"].update(statements=0), "reduce.statements"),
        (lambda d: d["stages"][0].update(reduce=[{"op": "cont"}]), "did you mean 'count'"),
        (lambda d: d["stages"][0]["map"].update(promt="x"), "stage 'screen'"),
        (lambda d: d["stages"][0].update(limits={"streams": 0}), "stage 'screen': limits.streams"),
        (lambda d: d.update(reduce=[{"op": "count"}]), "aggregators belong to a stage"),
        (lambda d: d.update(stages=[]), "stages"),
    ],
)
def test_mistakes_are_named(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_config(changed(change))
    assert text in error.value.message


LABEL = {
    "prompt": "{title}",
    "schema": {
        "type": "object",
        "properties": {
            "topic": {"enum": ["a", "b"]},
            "ok": {"type": ["boolean", "null"]},
            "score": {"type": "number"},
            "text": {"type": "string"},
            "tags": {"type": "array", "items": {"enum": ["x"]}},
        },
    },
}
CASCADE: dict[str, Any] = {"field": "topic", "small": {"model": {"name": "small"}}}


def cascaded(**changes: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    cascade = copy.deepcopy(CASCADE) | changes
    settings["stages"] = [{"name": "label", "map": LABEL, "cascade": cascade}]
    return settings


@pytest.mark.parametrize(
    "changes", [{}, {"field": "ok"}, {"field": "score", "tolerance": 0.1}, {"samples": 3}]
)
def test_a_cascade_compares_enums_booleans_and_numbers(changes: dict[str, Any]) -> None:
    loaded = load_config(cascaded(**changes))
    assert loaded.config.stages is not None
    assert loaded.config.stages[0].operator is not None
    assert not loaded.config.stages[0].reduces


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"field": "topc"}, "did you mean 'topic'"),
        ({"field": "text"}, "not an enum, a boolean or a number"),
        ({"field": "tags[]"}, "outside of lists"),
        ({"field": "input.title"}, "not a field of the answer"),
        ({"field": "score"}, "set tolerance"),
        ({"tolerance": 0.5}, "leave out tolerance"),
        ({"target": 1.0}, "cascade.target"),
        ({"samples": 1}, "cascade.samples"),
        ({"small": {}}, "give model.name"),
        ({"smal": 1}, "did you mean 'small'"),
    ],
)
def test_a_cascade_that_cannot_work_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_config(cascaded(**changes))
    assert text in error.value.message


def test_a_cascade_needs_a_map_of_its_own() -> None:
    for change in (
        {"map": None, "reduce": {"op": "rank", "prompt": "x"}},
        {"reduce": [{"op": "count"}]},
    ):
        settings = cascaded()
        settings["stages"][0] |= change
        with pytest.raises(ConfigurationError, match="cascade needs map"):
            load_config(settings)


def test_secrets_and_files_of_the_small_model(tmp_path: Path) -> None:
    own = {"urls": ["http://node1:8000/v1"], "api_key": "sk-secret"}
    plain = load_config(cascaded(small={"endpoints": own}) | REAL).plain
    assert plain["stages"][0]["cascade"]["small"]["endpoints"]["api_key"] == "**********"
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(cascaded(small={"endpoints": {"file": "small.txt"}}) | REAL))
    found = load_config(file).plain["stages"][0]["cascade"]["small"]["endpoints"]["file"]
    assert found == str(tmp_path / "small.txt")


def test_simulated_and_real_endpoints_are_not_mixed() -> None:
    own = {"urls": ["http://node1:8000/v1"]}
    with pytest.raises(ConfigurationError, match=r"stages\.0\.cascade\.small\.endpoints are real"):
        load_config(cascaded(small={"endpoints": own}))
    with pytest.raises(ConfigurationError, match=r"stages\.1\.endpoints are a simulated fleet"):
        load_config(changed(lambda d: d["stages"][1].update(endpoints={"simulated": {}})) | REAL)
    assert load_config(cascaded(small={"endpoints": own}) | REAL)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ({"prompt": "{title}", "certainty": "topic"}, "task.certainty"),
        ({**LABEL, "certainty": "topics"}, "did you mean 'topic'"),
        ({**LABEL, "certainty": "input.title"}, "task.certainty"),
        ({**LABEL, "certainty": "topic", "graph": "a.b:c"}, "leave out task.graph"),
    ],
)
def test_certainty_needs_a_field_of_the_answer(task: dict[str, Any], text: str) -> None:
    settings = {name: SETTINGS[name] for name in ("input", "endpoints")} | {"task": task}
    with pytest.raises(ConfigurationError) as error:
        load_config(settings)
    assert text in error.value.message
