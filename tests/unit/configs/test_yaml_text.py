"""Settings as YAML: sections are rendered one by one, and read back as one mapping."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fanfold.configs.loader import load_config
from fanfold.configs.preset_files import preset_names
from fanfold.configs.yaml_text import _BlockDumper, to_yaml


@pytest.mark.parametrize("name", preset_names())
def test_sections_together_are_the_settings(name: str) -> None:
    plain = load_config(name).plain
    text = to_yaml(plain)
    assert yaml.safe_load(text) == plain
    whole = yaml.dump(plain, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True)
    assert text == whole


@pytest.mark.parametrize("plain", [{}, {"a": {}}, {"a b: c": [], "-": "x\ny\n", "#": None}])
def test_odd_settings_are_read_back(plain: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(plain)) == plain
