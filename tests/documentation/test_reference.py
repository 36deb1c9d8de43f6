"""The pages that follow from the code are up to date, and complete."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import yaml

from fanfold.backends.inputs.formats import DATASETS
from fanfold.backends.simulated.responders import RESPONDERS
from fanfold.configs.describe import iter_access
from fanfold.graphs.cli.app import app

from .reference import PAGES, ROOT, write_commands, write_settings


@pytest.mark.parametrize("name", PAGES)
def test_the_file_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == PAGES[name](), "run 'make reference'"


def test_every_setting_is_listed() -> None:
    page = write_settings()
    missing = [key for key, _ in iter_access() if f"| `{key}` |" not in page]
    assert missing == ["reduce", "stages"]  # they have sections of their own


def test_no_option_lacks_its_help() -> None:
    assert [line for line in write_commands().splitlines() if line.endswith("|  |")] == []


def test_the_help_of_simulate_names_every_responder() -> None:
    options: dict[str | None, Any] = {one.name: one for one in app.commands["simulate"].params}
    assert [name for name in RESPONDERS if name not in options["responder"].help] == []


@pytest.mark.parametrize(
    ("key", "names"),
    [("input.dataset", DATASETS), ("endpoints.simulated.responder", tuple(RESPONDERS))],
)
def test_a_setting_names_all_that_it_can_be(key: str, names: tuple[str, ...]) -> None:
    (line,) = (one for one in write_settings().splitlines() if one.startswith(f"| `{key}` |"))
    assert [name for name in names if f"`{name}`" not in line] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
