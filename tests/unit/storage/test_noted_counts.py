"""Counts that a session notes for lists of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.run_folder import (
    RunFolder,
    read_noted_counts,
    write_noted_counts,
)

COUNTS = {"done": 3, "failed": 1, "usd": 0.5}


@pytest.mark.parametrize("usd", [0.5, 2, None])
def test_what_is_noted_is_read(tmp_path: Path, usd: float | None) -> None:
    folder = RunFolder(tmp_path)
    assert read_noted_counts(folder) is None
    write_noted_counts(folder, COUNTS | {"usd": usd})
    found = read_noted_counts(folder)
    assert found is not None
    assert {key: found[key] for key in COUNTS} == COUNTS | {"usd": usd}


@pytest.mark.parametrize("change", [{"done": "3"}, {"failed": -1}, {"usd": "much"}, {"usd": True}])
def test_other_values_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    noted = {"v": 1, "noted": "2026-01-01", **COUNTS, **change}
    folder.noted_counts.write_bytes(orjson.dumps(noted))
    with pytest.raises(JournalError, match=r"has no counts; remove it"):
        read_noted_counts(folder)
