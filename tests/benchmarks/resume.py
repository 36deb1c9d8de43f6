"""Resuming: CPU time for each finished item, to index the journal and to read its records back."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Final

from fanfold.backends.storage.journal import Journal
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import write_journal

_RANGE: Final = 64


def measure(items: int) -> None:
    """Print the costs of a journal of so many finished items."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = write_journal(folder / "0001.jsonl", map(sample, range(items)))
        print(f"resume, {items:,} finished items, {path.stat().st_size / items:,.0f} bytes each")
        began = time.process_time()
        with Journal(folder, "r", items) as journal:
            indexed = time.process_time()
            for lo in range(0, items, _RANGE):
                journal.read_answers(lo, min(lo + _RANGE, items))
            read = time.process_time()
        print(f"  index {1e6 * (indexed - began) / items:.2f} us per item")
        print(f"  read back {1e6 * (read - indexed) / items:.2f} us per item")
