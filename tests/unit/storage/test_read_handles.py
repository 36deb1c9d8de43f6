"""Thousands of journal files, and few of them open."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from fanfold.backends.storage.journal import FileHandles, Journal
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import write_journal

FILES = 200


def test_a_ledger_of_many_workers_keeps_few_files_open(tmp_path: Path) -> None:
    for n in range(FILES):
        write_journal(tmp_path / f"0001-node{n}-1.jsonl", [sample(n)])
    with Journal(tmp_path, "r", FILES) as ledger:
        for _ in range(2):
            assert [record["index"] for record in ledger.read_records()] == list(range(FILES))
        assert len(ledger._handles) == 128


async def test_a_file_stays_open_while_somebody_reads_it(tmp_path: Path) -> None:
    """Threads push each other's files out, and still each reads its own."""
    paths = [tmp_path / f"{n}" for n in range(6)]
    for path in paths:
        path.write_bytes(path.name.encode() * 4096)
    handles = FileHandles(most=1)

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(400):
            path = chosen.choice(paths)
            assert handles.read(path, 1, 4095) == path.name.encode() * 4095
        handles.close()

    await asyncio.gather(*(asyncio.to_thread(read, seed) for seed in range(8)))
    assert len(handles) == 0
