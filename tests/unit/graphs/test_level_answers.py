"""The answers of a level: read from its journal, and missed when a file of it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.journal_writer import JournalWriter
from fanfold.backends.storage.run_folder import RunFolder, create_folder
from fanfold.graphs.run.pipeline import LevelAnswers
from fanfold.graphs.run.stage_folder import is_finished
from fanfold.tests.unit.graphs.coordinator_lab import record

COUNT = 600
"""More than are read together."""
FAILED = 7


@pytest.fixture
async def level(tmp_path: Path) -> RunFolder:
    """Return the folder of a level that has ended; one question has failed."""
    folder = RunFolder(tmp_path / "1")
    with create_folder(folder.path) as made:
        about = {"run": "r", "level": "leaves", "input": {"items": COUNT}}
        made.write_provenance(about | {"sessions": [{"outcome": "finished"}]})
        writer = JournalWriter(made.journal / "0001.jsonl", {"run": "r", "session": "s"}, 0.0)
        for index in range(COUNT):
            more = {"status": "failed", "error_class": "TimeoutError"} if index == FAILED else {}
            writer.write(record(index) | more)
        await writer.close()
    return folder


async def test_answers_in_order(level: RunFolder) -> None:
    assert is_finished(level)
    answers = LevelAnswers(level)
    found = list(answers)
    assert [one.record["index"] for one in found] == list(range(COUNT))
    assert [at for at, one in enumerate(found) if not one.is_done] == [FAILED]
    assert found[300] == answers[300] == answers[300:301][0]
    answers.close()


async def test_answers_that_are_gone(level: RunFolder) -> None:
    (level.journal / "0001.jsonl").unlink()
    answers = LevelAnswers(level)
    with pytest.raises(JournalError, match="the answer to question 1 is gone"):
        list(answers)
    answers.close()
