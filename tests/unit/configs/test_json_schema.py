"""The JSON Schema of a configuration file accepts what the loader accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

import fanfold
from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.describe import iter_access
from fanfold.configs.json_schema import make_schema, write_schema
from fanfold.configs.loader import load_config
from fanfold.configs.preset_files import (
    copy_preset,
    preset_names,
    read_preset,
    read_settings_schema,
)

ROOT = Path(fanfold.__file__).parent
SCHEMA = make_schema()
VALIDATOR = jsonschema_rs.validator_for(SCHEMA)
BASE: dict[str, Any] = {"task": {"prompt": "Say {text}"}, "endpoints": {"urls": ["http://n:1"]}}


def set_key(key: str, value: Any) -> dict[str, Any]:
    """Return good settings with one key set."""
    data: dict[str, Any] = json.loads(json.dumps(BASE))
    if key.startswith("task.images."):
        data["task"]["images"] = {"columns": ["figure"]}
    node = data
    *parents, last = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return data


def find_problems(data: Any) -> list[str]:
    return [f"{list(one.instance_path)}: {one.message}" for one in VALIDATOR.iter_errors(data)]


def iter_page_settings() -> Iterator[Any]:
    """Yield the complete configurations of the documentation."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            data = yaml.safe_load(block)
            if isinstance(data, dict) and "endpoints" in data and {"task", "stages"} & data.keys():
                yield pytest.param(data, id=f"{page.stem}-{data.get('name')}")


def test_the_shipped_file_is_up_to_date() -> None:
    assert read_settings_schema() == write_schema(), "run 'make reference'"


@pytest.mark.parametrize("name", preset_names())
def test_presets_fit_and_name_the_schema(name: str, tmp_path: Path) -> None:
    assert find_problems(yaml.safe_load(read_preset(name))) == []
    copy_preset(name, tmp_path / "mine.yaml")
    (named,) = re.findall(
        r"^# yaml-language-server: \$schema=(\S+)$",
        (tmp_path / "mine.yaml").read_text(),
        re.MULTILINE,
    )
    assert json.loads((tmp_path / named).read_text()) == SCHEMA
    (tmp_path / named).write_text("mine")
    copy_preset(name, tmp_path / "other.yaml")
    assert (tmp_path / named).read_text() == "mine"


@pytest.mark.parametrize("data", list(iter_page_settings()))
def test_settings_of_the_documentation_fit(data: Any) -> None:
    assert find_problems(data) == []


@pytest.mark.parametrize("key", [key for key, _ in iter_access()])
def test_every_setting_is_described_and_may_be_a_variable(key: str) -> None:
    *parents, last = key.split(".")
    shown: Any = SCHEMA
    for name in parents:
        shown = shown["properties"][name]
        options = [shown, *shown.get("anyOf", [])]
        (place,) = [one["$ref"] for one in options if one.get("$ref", "").endswith("Config")]
        shown = SCHEMA["$defs"][place.rpartition("/")[2]]
    assert shown["properties"][last]["description"]
    problems = find_problems(set_key(key, "${SOME_NAME}"))
    taken = {"reduce", "evaluate", "stages", "messages", "extra_body", "models", "faults", "env"}
    lists = {"warn_at", "user_endpoint_config", "urls", "allowed_media_domains"}
    if last in taken | lists or key in {"backend.endpoints", "task.images.columns"}:
        return  # a list or a mapping, of which only the values may be variables
    assert problems == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("endpoints", "auto"),
        ("task.schema", "answer.json"),
        ("task.examples", "few.jsonl"),
        ("task.images", ["figure"]),
        ("evaluate", {"gold": "a", "field": "b"}),
        ("cache", False),
        ("endpoints", {"hosts": "node[1-4]"}),
        ("endpoints", {"first": {"paths": "sophia/vllm"}}),
        ("node.accelerators.ids", "0,1"),
        ("node.accelerators.ids", [0, 1]),
        ("limits.streams", "${STREAMS}"),
        ("limits.hedge", "${HEDGE}"),
        ("reduce", [{"op": "top_k", "field": "score", "k": "${K}"}]),
        ("budget.reserve_for_reduce", {"usd": 1}),
    ],
)
def test_what_a_file_may_say_is_accepted(key: str, value: Any) -> None:
    assert find_problems(set_key(key, value)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits.stream", 3),
        ("limits.streams", 0),
        ("limits.streams", "many"),
        ("model.temperature", 3),
        ("backend.kind", "slurm"),
        ("reduce", [{"op": "median", "field": "x"}]),
        ("reduce", [{"op": "top_k", "field": "x", "size": 3}]),
        ("endpoints", "automatic"),
        ("stages", [{"name": "One"}]),
        ("stages", [{"name": "one", "map": {"promt": "x"}}]),
        ("name", "a b"),
    ],
)
def test_what_the_loader_refuses_is_refused(key: str, value: Any) -> None:
    data = set_key(key, value)
    assert find_problems(data)
    with pytest.raises(ConfigurationError):
        load_config(data)


def test_task_and_endpoints_may_be_elsewhere() -> None:
    stages = {"stages": [{"name": "one", "endpoints": "auto", "map": {"prompt": "x"}}]}
    assert find_problems(stages) == []
    batch = {"input": {"format": "openai_batch", "path": "b.jsonl"}, "endpoints": "auto"}
    assert find_problems(batch) == []
    for key in BASE:
        assert find_problems({name: one for name, one in BASE.items() if name != key})
