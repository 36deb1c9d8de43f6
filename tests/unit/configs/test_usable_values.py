"""Values of the right form that cannot be used are refused where they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fanfold import RunContext
from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.run_folder import create_folder, is_vacant, open_folder
from fanfold.configs.loader import load_config

BASE: dict[str, Any] = {
    "name": "t",
    "task": {"prompt": "Judge {x}"},
    "endpoints": {"urls": ["http://127.0.0.1:1/v1"]},
}


@pytest.mark.parametrize(
    "key",
    [
        "limits.walltime_s",
        "limits.request_timeout_s",
        "limits.drain_s",
        "limits.fleet_wait_s",
        "endpoints.refresh_s",
        "endpoints.wait_s",
        "backend.silence_s",
        "node.timeout_s",
    ],
)
def test_no_duration_is_longer_than_a_clock(key: str) -> None:
    load_config(BASE, [f"{key}=86400"])
    with pytest.raises(ConfigurationError, match=key.replace(".", r"\.")):
        load_config(BASE, [f"{key}=1e300"])


@pytest.mark.parametrize(
    "given",
    [
        "limits.streams=4",
        {"limits.streams": 4},
        [1],
        [None],
        None,
        [{"limits.streams": 4}],
        4,
        b"limits.streams=4",
        ["limits.streams=4", ["model.seed=1"]],
    ],
    ids=repr,
)
def test_overrides_of_another_form_are_refused_with_the_right_one(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"overrides: .*\['limits\.streams=64'"):
        load_config(BASE, given)
    with pytest.raises(ConfigurationError, match=r"overrides: .*\['limits\.streams=64'"):
        _ = RunContext(preset="data_annotation", overrides=given).loaded


def test_overrides_are_yaml() -> None:
    given = [
        "model.price={prompt: 1, completion: 2}",
        "model.seed=null",
        "limits.streams=4",
        "task.schema=null",
        "reduce=[{op: count}]",
    ]
    config = load_config(BASE, given).config
    assert config.model.price is not None
    assert (config.model.price.completion, config.model.seed) == (2, None)
    assert (config.limits.streams, config.reduce[0].op) == (4, "count")


def test_a_folder_whose_path_is_no_text_is_refused(tmp_path: Path) -> None:
    odd = tmp_path / "a\udcff"
    odd.mkdir()
    for use in (is_vacant, open_folder):
        with pytest.raises(ConfigurationError, match=r"a\\udcff.* UTF-8"):
            use(odd)
        with pytest.raises(ConfigurationError, match=r"a\\udcff.* UTF-8"):
            use(odd / "run")


@pytest.mark.parametrize("name", ["a:b", "a b", "a%20b", "a?b=c", "a#b", "é", "-x", "a;b", "a'b"])
def test_a_folder_may_have_any_text_as_its_name(name: str, tmp_path: Path) -> None:
    assert is_vacant(tmp_path / name)
    with create_folder(tmp_path / name) as folder:
        assert folder.path.is_dir()
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("name", ["~no-such-user", "~no-such-user/in.csv", "~t"])
def test_a_tilde_before_no_user_is_part_of_a_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"name: t\ntask: {{prompt: 'Judge {{x}}'}}\ninput: {{path: '{name}'}}\n"
        "endpoints: {urls: ['http://127.0.0.1:1/v1']}\n"
    )
    loaded = load_config(tmp_path / "c.yaml")
    assert loaded.config.input.path == str(tmp_path / name)


def test_a_pipe_in_the_journal_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0001.jsonl")
    with pytest.raises(JournalError, match=r"0001\.jsonl.* not a regular file"):
        Journal(tmp_path, "one", 3)
