"""Counts of a run that ``fanfold ls`` shows: what is read, and what is damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.run_folder import RunFolder, read_noted_counts, write_noted_counts

COUNTS = {"done": 3, "failed": 1, "usd": 0.5}


@pytest.mark.parametrize("usd", [None, 0, 0.5])
def test_counts_are_read_as_written(usd: float | None, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_noted_counts(folder) is None
    write_noted_counts(folder, COUNTS | {"usd": usd})
    found = read_noted_counts(folder)
    assert found is not None
    assert found | COUNTS | {"usd": usd} == found


@pytest.mark.parametrize(
    "change",
    [{"usd": "1"}, {"usd": {}}, {"usd": True}, {"usd": -1}, {"done": -1}, {"noted": None}],
)
def test_other_values_are_damage(change: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_noted_counts(folder, COUNTS)
    known = orjson.loads(folder.noted_counts.read_bytes())
    folder.noted_counts.write_bytes(orjson.dumps(known | change))
    with pytest.raises(JournalError, match="has no counts; remove it"):
        read_noted_counts(folder)
