"""Writes that fail: exit 1, the number of safe items, and a resume with free space."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.graphs.run.run_result import RunResult
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S, Command, get_command_server

pytestmark = pytest.mark.integration

LIMITED = """
import resource, sys
from fanfold.graphs.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
main()
"""


async def test_a_journal_that_hits_a_limit(lab_of: LabMaker) -> None:
    """The system refuses files above a size, as it refuses all on a full disk."""
    async with lab_of(items=600, ttft_s=0.0, tpot_s=0.0) as lab:
        lab.config["shard"] = {"items": None}  # few checkpoints, so that the journal is first
        aggregate = await lab.undisturbed()
        await lab.begin()
        lab.fleet.reset()
        said = lab.home / "said.txt"
        with said.open("wb") as errors:
            command = Command(("resume", str(lab.out), "--quiet"), LIMITED.format(size=160_000))
            process = await get_command_server().start(command, stderr=errors.fileno())
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 1
        lab.life_ended()
        safe = lab.journal_lines()
        assert 0 < safe < 600
        text = said.read_text()
        assert f"{safe} of 600 items are safe" in text
        assert "Traceback" not in text
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


async def failing(lab: Lab) -> str:
    with pytest.raises(JournalError) as caught:
        await lab.live()
    lab.life_ended()
    return caught.value.message


async def test_checkpoints_that_cannot_be_written(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab_of(items=60, ttft_s=0.0, tpot_s=0.0) as lab:
        aggregate = await lab.undisturbed()
        await lab.begin()

        async def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patched:
            patched.setattr("langgraph.checkpoint.sqlite.aio.AsyncSqliteSaver.aput_writes", full)
            message = await failing(lab)
        assert "database or disk is full" in message
        assert f"{lab.journal_lines()} of 60 items are safe" in message
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


@pytest.mark.parametrize(
    "name", ["results.parquet", "failures.jsonl", "aggregate.json", "provenance.json"]
)
async def test_results_that_cannot_be_written(
    lab_of: LabMaker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab_of(items=30, ttft_s=0.0, tpot_s=0.0) as lab:
        aggregate = await lab.undisturbed()
        await lab.begin()
        replace, done = Path.replace, lab.journal_lines

        def full(self: Path, target: Path) -> Path:
            if Path(target).name == name and done() == 30:
                raise OSError(28, "No space left on device")
            return replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", full)
            message = await failing(lab)
        assert name in message
        assert "30 of 30 items are safe" in message
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_the_first_error_is_the_one_told(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, so the end of this session cannot be recorded either."""
    async with lab_of(items=30, ttft_s=0.0, tpot_s=0.0) as lab:
        await lab.begin()
        replace, lives = Path.replace, 0

        def full(self: Path, target: Path) -> Path:
            nonlocal lives
            lives += Path(target).name == "provenance.json"
            if lives > 1 or Path(target).name == "results.parquet":
                raise OSError(28, "No space left on device")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", full)
        message = await failing(lab)
        assert "results.parquet" in message
        assert "30 of 30 items are safe" in message


async def test_a_fresh_life_after_each_failure(lab_of: LabMaker) -> None:
    """Results carry each item once however many journal files there are."""
    async with lab_of(items=30, ttft_s=0.0, tpot_s=0.0) as lab:
        aggregate = await lab.undisturbed()
        await lab.begin()
        result: RunResult = await lab.live()
        assert result.exit_code == 0
        lab.life_ended()
        again: RunResult = await lab.live()
        assert (again.exit_code, again.aggregate) == (0, aggregate)
        names = sorted(p.name for p in (lab.out / "journal").iterdir())
        assert names == ["0001.jsonl", "extents.json", "lock"]
        lab.assert_whole(aggregate, again=0)
