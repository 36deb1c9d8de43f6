from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs import resolve
from fanfold.configs.resolve import endpoint_settings, resolve_config

URL = "http://127.0.0.1:9/v1"
OWN: dict[str, Any] = {
    "task": {"prompt": "{text}"},
    "input": {"dataset": "records"},
    "endpoints": {"urls": [URL]},
}


def test_a_preset_says_that_it_is_simulated() -> None:
    loaded, notices = resolve_config("data_annotation")
    assert loaded.config.endpoints.simulated is not None
    assert "SIMULATED FLEET" in notices[0]
    assert resolve_config("data_annotation", endpoints=URL)[1] == []
    assert resolve_config(OWN)[1] == []


@pytest.mark.parametrize("endpoints", ["simulated", URL])
def test_an_own_input_needs_a_word_on_endpoints(endpoints: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.csv")
    with pytest.raises(ConfigurationError, match="--endpoints"):
        resolve_config("data_annotation", input_path=path)
    with pytest.raises(ConfigurationError, match="--endpoints"):
        resolve_config("data_annotation", [f"input={{path: {path}}}"])
    loaded, _ = resolve_config("data_annotation", input_path=path, endpoints=endpoints)
    assert (loaded.config.input.path, loaded.config.input.dataset) == (path, None)


def test_no_settings_are_the_quickstart() -> None:
    loaded, notices = resolve_config(None)
    assert loaded.preset == "quickstart"
    assert notices


def test_without_rdkit_twenty_molecules_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "find_spec", lambda _: None)
    stages = resolve_config("molecular_screening")[0].config.stages or []
    small = stages[1].cascade.small.endpoints if stages[1].cascade else None
    assert isinstance(small, dict)
    assert small["simulated"]["responder"] == "schema"
    loaded, notices = resolve_config("quickstart")
    assert loaded.config.input.dataset == "molecules"
    assert loaded.config.endpoints.simulated is not None
    assert loaded.config.endpoints.simulated.responder == "schema"
    assert notices[1] == resolve.NO_RDKIT
    assert len(resolve_config("data_annotation")[1]) == 1


def test_options_count_more_than_overrides() -> None:
    loaded, _ = resolve_config(OWN, ["input.limit=5", "endpoints.urls=[http://x:1]"], None, 2, URL)
    assert loaded.config.input.limit == 2
    assert loaded.config.endpoints.urls == [URL]


def test_endpoints_need_not_stand_in_the_file() -> None:
    bare = {k: v for k, v in OWN.items() if k != "endpoints"}
    assert resolve_config(bare, endpoints=f"{URL}, {URL}2")[0].config.endpoints.urls == [
        URL,
        f"{URL}2",
    ]


def test_what_endpoints_may_be(tmp_path: Path) -> None:
    file = tmp_path / "e.txt"
    file.touch()
    assert endpoint_settings(str(file), None)["endpoints.file"] == str(file)
    assert endpoint_settings(str(tmp_path), None)["endpoints.file"] == str(tmp_path)
    assert endpoint_settings("simulated", {"nodes": 3})["endpoints.simulated"] == {"nodes": 3}
    assert endpoint_settings("simulated", None)["endpoints.simulated"] == {}
    for wrong in ("simulatd", "", ",", "host:80"):
        with pytest.raises(ConfigurationError, match="neither"):
            endpoint_settings(wrong, None)
