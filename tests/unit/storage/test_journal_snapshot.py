"""The saved index of a journal: what is read with it is what the journal's files say."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import JournalDelta, JournalSource, is_unchanged
from fanfold.backends.storage.journal_snapshot import SNAPSHOT_FILE, read_snapshot
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import journal_lines, write_journal

ITEMS = 6
NAMES = ("0000.jsonl", "0001.jsonl", "0001-n1-7-aa.jsonl", "0002.jsonl", "0002-n1-7-bb.jsonl")

records = st.builds(
    sample, st.integers(0, ITEMS - 1), st.sampled_from(["done", "failed"]), st.integers(0, 9)
)
parts = st.lists(st.lists(records, max_size=4), min_size=len(NAMES), max_size=len(NAMES))


def describe(journal: Journal) -> tuple[Any, ...]:
    """Return all that a journal says about a run."""
    return (
        list(journal.read_records()),
        journal.count_items(),
        journal.count_failures(),
        journal.usage_by_session,
        journal.extents(),
        journal.duplicates,
        [journal.get_last_session(index) for index in range(ITEMS)],
    )


def read(folder: Path, *, plainly: bool) -> Any:
    """Return what a journal says, or its error, with or without the saved index."""
    if plainly:
        (folder / SNAPSHOT_FILE).unlink(missing_ok=True)
    try:
        with Journal(folder, "r", ITEMS) as journal:
            return describe(journal)
    except JournalError as error:
        return error.message


def save(folder: Path) -> None:
    with Journal(folder, "r", ITEMS) as journal:
        journal.save_snapshot(0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(before=parts, after=parts, late=st.integers(0, len(NAMES)))
def test_what_was_saved_and_what_came_later_is_the_whole_journal(
    tmp_path: Path, before: list[Any], after: list[Any], late: int
) -> None:
    """Also if files come later whose names are between those that were saved."""
    folder = tmp_path / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    whole = dict[Path, bytes]()
    for number, name in enumerate(NAMES):
        lines = journal_lines(folder / name, [*before[number], *after[number]])
        whole[folder / name] = b"".join(lines)
        if number != late:
            (folder / name).write_bytes(b"".join(lines[: 1 + len(before[number])]))
    save(folder)
    found = read_snapshot(folder, "r", ITEMS)
    assert found is not None
    assert len(found.files) == len(NAMES) - (late < len(NAMES))
    for path, data in whole.items():
        path.write_bytes(data)
    with_it, without = read(folder, plainly=False), read(folder, plainly=True)
    assert with_it[:5] == without[:5]
    assert with_it[6] == without[6]


def damage(folder: Path, chance: random.Random) -> None:
    """Do to a journal file what a disk or a user might do."""
    path = folder / chance.choice(NAMES[1:4])
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    kind = chance.randrange(6)
    if kind == 0:
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        lines = bytes(data).splitlines(keepends=True)
        del lines[chance.randrange(len(lines))]
        data = bytearray(b"".join(lines))
    elif kind == 3:
        data[place:place] = b"\n"
    elif kind == 4:
        shutil.copyfile(path, folder / "0003.jsonl")
    else:
        data = bytearray(b"".join(journal_lines(path, [sample(1)], run="other")))
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_named_as_without_the_saved_index(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for name in NAMES:
        write_journal(tmp_path / name, [sample(chance.randrange(ITEMS)) for _ in range(3)])
    save(tmp_path)
    damage(tmp_path, chance)
    assert read(tmp_path, plainly=False) == read(tmp_path, plainly=True)


@pytest.mark.parametrize("cut", [0, 3, 40, -3])
def test_a_damaged_saved_index_is_ignored(tmp_path: Path, cut: int) -> None:
    write_journal(tmp_path / "0001.jsonl", [sample(1), sample(2, "failed")])
    save(tmp_path)
    path = tmp_path / SNAPSHOT_FILE
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    assert read_snapshot(tmp_path, "r", ITEMS) is None
    assert read(tmp_path, plainly=False) == read(tmp_path, plainly=True)
    flipped = bytearray(data)
    flipped[cut] ^= 1
    path.write_bytes(flipped)
    assert read_snapshot(tmp_path, "r", ITEMS) is None


def test_what_is_no_file_is_ignored(tmp_path: Path) -> None:
    """To open a pipe could wait forever."""
    write_journal(tmp_path / "0001.jsonl", [sample(1)])
    os.mkfifo(tmp_path / SNAPSHOT_FILE)
    with Journal(tmp_path, "r", ITEMS) as journal:
        assert journal.count_items().done == 1


def test_the_index_of_another_run_is_ignored(tmp_path: Path) -> None:
    write_journal(tmp_path / "0001.jsonl", [sample(1)])
    save(tmp_path)
    assert read_snapshot(tmp_path, "r", ITEMS) is not None
    assert read_snapshot(tmp_path, ("new", "r"), ITEMS) is not None  # of a copied folder
    assert read_snapshot(tmp_path, "other", ITEMS) is None
    assert read_snapshot(tmp_path, "r", ITEMS + 1) is None


def test_a_torn_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "0001-n1-7-aa.jsonl"
    lines = journal_lines(path, [sample(1), sample(2)])
    path.write_bytes(b"".join(lines)[:-9])
    save(tmp_path)
    found = read_snapshot(tmp_path, "r", ITEMS)
    assert found is not None
    one, source = found.files[0], JournalSource(path, "r")
    assert is_unchanged(source, one.end, one.line, one.crc)  # with the torn line behind it
    path.write_bytes(b"".join(lines))
    assert is_unchanged(source, one.end, one.line, one.crc)
    with Journal(tmp_path, "r", ITEMS) as journal:
        assert journal.count_items().done == 2


async def test_a_session_saves_what_it_wrote_and_read(tmp_path: Path) -> None:
    """Items that failed earlier have failed in the saved index, also while they are open again."""
    write_journal(tmp_path / "0001.jsonl", [sample(n, "failed") for n in range(4)])
    journal = Journal(tmp_path, "r", ITEMS)
    journal.start_session("test", 0.001)
    assert journal.reopen_failed() == 4
    journal.put(sample(0))
    journal.put(sample(5, "failed"))
    write_journal(tmp_path / "0002-n1-7-aa.jsonl", [sample(1)])
    journal.refresh(JournalDelta())
    await journal.aclose()
    journal.save_snapshot(0)
    found = read_snapshot(tmp_path, "r", ITEMS)
    assert found is not None
    assert [one.name for one in found.files] == ["0001.jsonl", "0002.jsonl", "0002-n1-7-aa.jsonl"]
    with_it = read(tmp_path, plainly=False)
    assert (with_it[1].done, with_it[1].failed, with_it[1].open) == (2, 3, 1)
    without = read(tmp_path, plainly=True)
    assert with_it[:5] == without[:5]
    with Journal(tmp_path, "r", ITEMS) as again:
        again.start_session("test", 0.001)
        assert again.session_number == 3


def test_small_journals_have_no_saved_index(tmp_path: Path) -> None:
    write_journal(tmp_path / "0001.jsonl", [sample(1)])
    with Journal(tmp_path, "r", ITEMS) as journal:
        journal.save_snapshot()
    assert not (tmp_path / SNAPSHOT_FILE).exists()
