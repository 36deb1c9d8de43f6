"""The pages that follow from the code are up to date, and complete."""

from __future__ import annotations

import pytest

from fanfold.configs.describe import iter_access

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
