from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.secrets import MASKED
from fanfold.configs.loader import load_config, override_settings
from fanfold.configs.preset_files import copy_preset, preset_names, read_preset
from fanfold.configs.raw_settings import read_settings
from fanfold.configs.yaml_text import to_yaml

GOOD: dict[str, Any] = {
    "input": {"path": "in.csv"},
    "task": {"prompt": "Say {text}"},
    "endpoints": {"simulated": {}},
}


def test_defaults() -> None:
    config = load_config(GOOD).config
    assert (config.name, config.task.repairs, config.model.temperature) == ("run", 1, 0.0)
    assert (config.limits.streams, config.limits.attempts) == (256, 4)
    assert config.limits.request_timeout_s == 600
    assert (config.backend.kind, config.backend.processes) == ("local", 1)
    assert config.endpoints.api_key.get_secret_value() == "EMPTY"
    assert (config.shard.items, config.journal.fsync_s) == (None, 0.05)


@pytest.mark.parametrize(
    ("written", "cache"), [("off", "off"), ("run", "run"), ("/x/y", "/x/y"), ("false", "off")]
)
def test_what_cache_may_be(written: str, cache: str) -> None:
    """YAML reads a bare ``off`` as false."""
    loaded = load_config(GOOD, [f"cache={written}"])
    assert loaded.config.cache == cache
    assert load_config(yaml.safe_load(to_yaml(loaded.plain))).config == loaded.config


def test_a_cache_s_path_is_taken_from_the_files_folder(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"cache": "answers"}))
    assert load_config(file).config.cache == str(tmp_path / "answers")
    assert load_config(file, ["cache=../a"]).config.cache == str(tmp_path / "../a")


def test_drawn_answers_are_reused_only_by_an_explicit_yes() -> None:
    warm = GOOD | {"model": {"temperature": 0.5}}
    assert load_config(warm).config.cache == "off"
    with pytest.raises(ConfigurationError, match=r"temperature 0\.5 differ.*cache_sampled: true"):
        load_config(warm, ["cache=run"])
    assert load_config(warm, ["cache=run", "cache_sampled=true"]).config.cache_sampled


def test_the_given_settings_stay_as_they_are() -> None:
    before = copy.deepcopy(GOOD)
    load_config(GOOD, ["input.limit=3", "task.prompt=x"], {"endpoints.simulated": {"nodes": 2}})
    assert before == GOOD


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    settings = GOOD | {"task": {"prompt": "{text}", "schema": "schema.json"}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    loaded = load_config(file)
    assert loaded.config.input.path == str(tmp_path / "in.csv")
    assert loaded.config.task.answer_schema == {"type": "object"}
    (tmp_path / "schema.json").unlink()
    again = load_config(yaml.safe_load(to_yaml(loaded.plain)))
    assert again.plain == loaded.plain


@pytest.mark.parametrize("name", preset_names())
def test_plain_settings_say_the_same(name: str) -> None:
    loaded = load_config(name)
    assert loaded.preset == name
    again = load_config(yaml.safe_load(to_yaml(loaded.plain)))
    assert (again.config, again.plain) == (loaded.config, loaded.plain)


@given(st.text(min_size=1).filter(lambda t: "{" not in t and "}" not in t and "$" not in t))
def test_any_prompt_survives_the_run_file(prompt: str) -> None:
    loaded = load_config(GOOD | {"task": {"prompt": prompt}})
    assert load_config(yaml.safe_load(to_yaml(loaded.plain))).config.task.prompt == prompt


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("${KEY}", "${KEY}"),
        ("${KEY}${KEY}", "${KEY}${KEY}"),
        ("${KEY}-plain-${KEY}", MASKED),
        ("plain", MASKED),
        ("$${KEY}", MASKED),
        ("EMPTY", "EMPTY"),
        ("${NONE}", "${NONE}"),
    ],
)
def test_what_is_kept_of_a_key(written: str, kept: str) -> None:
    settings = GOOD | {"endpoints": {"urls": ["http://${HOST}:1"], "api_key": written}}
    environment = {"KEY": "s3cr3t", "HOST": "h", "NONE": "EMPTY"}
    loaded = load_config(settings, environment=environment)
    assert loaded.plain["endpoints"]["api_key"] == kept
    assert loaded.plain["endpoints"]["urls"] == ["http://${HOST}:1"]
    assert loaded.config.endpoints.urls == ["http://h:1"]
    assert "s3cr3t" not in repr(loaded)


@pytest.mark.parametrize("key", ["", " x", "x\n", "a\nb", "schlüssel"])
def test_keys_that_fit_no_header(key: str) -> None:
    settings = GOOD | {"endpoints": {"urls": ["http://h:1"], "api_key": "${K}"}}
    with pytest.raises(ConfigurationError, match=r"endpoints\.api_key") as error:
        load_config(settings, environment={"K": key})
    assert not key.strip() or key not in error.value.message


def test_several_findings_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        load_config(GOOD | {"limits": {"streams": 0, "atempts": 1}, "naem": "x"})
    assert len(error.value.message.splitlines()) == 3


def test_peek_checks_nothing() -> None:
    raw = override_settings(read_settings({"a": 1}), ["b.c=2"])
    data, preset = raw.data, raw.preset
    assert (data, preset) == ({"a": 1, "b": {"c": 2}}, None)
    assert read_settings("data_annotation").preset == "data_annotation"


@pytest.mark.parametrize("name", preset_names())
def test_a_copy_says_the_same_but_for_endpoints(name: str, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    copy_preset(name, target)
    mine, shipped = yaml.safe_load(target.read_text()), yaml.safe_load(read_preset(name))
    assert mine.pop("endpoints") == {"urls": [], "api_key": "EMPTY"}
    assert shipped.pop("endpoints").keys() == {"simulated"}
    assert mine == shipped
    with pytest.raises(ConfigurationError, match="exists already"):
        copy_preset(name, target)


@pytest.mark.parametrize(
    ("password", "kept"), [("${P}", "${P}"), ("x${P}", MASKED), ("s3", MASKED)]
)
def test_what_is_kept_of_a_password(password: str, kept: str) -> None:
    exchange = {"kind": "redis", "password": password}
    backend = {"kind": "academy", "exchange": exchange}
    loaded = load_config(GOOD | {"backend": backend}, environment={"P": "s3"})
    assert loaded.plain["backend"]["exchange"]["password"] == kept


def test_another_kind_of_backend_leaves_out_the_keys_of_the_former(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As ``run.yaml`` holds them, every default included; what is said anew still counts."""
    own = {"kind": "academy", "slots": 3, "workers": 5, "silence_s": 60}
    kept = load_config(GOOD | {"backend": own}).plain
    changed = load_config(kept, ["backend.kind=local"]).config.backend
    assert (changed.kind, changed.slots, changed.silence_s) == ("local", 1, 60)
    (told,) = caplog.messages
    assert told.startswith("backend.kind is local in place of academy: backend.")
    assert "backend.slots" in told
    assert "backend.workers" in told
    assert "exchange" not in told
    caplog.clear()
    changed = load_config(kept, ["backend.kind=parsl", "backend.workers=4"]).config.backend
    assert (changed.kind, changed.workers) == ("parsl", 4)
    with pytest.raises(ConfigurationError, match="'slots' is for kind academy, not for local"):
        load_config(kept, ["backend.kind=local", "backend.slots=2"])
    caplog.clear()
    assert load_config(kept, ["backend={kind: local}"]).config.backend.kind == "local"
    assert load_config(kept, ["backend.kind=academy"]).config.backend.slots == 3
    with pytest.raises(ConfigurationError, match=r"backend\.kind"):
        load_config(kept, ["backend.kind=nope"])
    assert caplog.messages == []
