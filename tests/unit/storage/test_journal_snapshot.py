"""The saved index of a journal: what is read with it is what the journal's files say."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
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


COLUMNS = (("B", 1), ("i", 4), ("q", 8), ("i", 4))
"""Type and bytes of a value in each column of a saved index."""


def rewrite(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Change a saved index, with checksums that fit."""
    first, _, rest = path.read_bytes().partition(b"\n")
    about, columns = orjson.loads(first.partition(b" ")[2]), bytearray(rest)
    change(about, columns)
    about["crc"] = zlib.crc32(columns)
    head = orjson.dumps(about)
    path.write_bytes(b"%08x %b\n" % (zlib.crc32(head), head) + columns)


def set_value(column: int, item: int, value: int) -> Callable[[dict[str, Any], bytearray], None]:
    """Return a change of a value of a column."""
    kind, size = COLUMNS[column]

    def change(_about: dict[str, Any], columns: bytearray) -> None:
        at = ITEMS * sum(size for _, size in COLUMNS[:column]) + item * size
        columns[at : at + size] = array(kind, [value]).tobytes()

    return change


def set_key(*path: Any, value: Any) -> Callable[[dict[str, Any], bytearray], None]:
    """Return a change of the head."""

    def change(about: dict[str, Any], _columns: bytearray) -> None:
        inner: Any = about
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_value(0, 2, 3),  # a state without an error class
        set_value(0, 2, 255),
        set_value(0, 5, 1),  # an answer without a record
        set_value(1, 1, 2),  # a file that does not exist
        set_value(1, 1, -1),
        set_value(2, 1, -(2**40)),
        set_value(2, 1, 2**40),
        set_value(3, 1, -5),
        set_value(3, 1, 2**31 - 1),
        set_key("classes", value={}),
        set_key("classes", value={"a": 2, "b": 2}),
        set_key("classes", value={str(n): n + 2 for n in range(300)}),
        set_key("classes", value=[2]),
        set_key("files", value=[]),
        set_key("files", 0, "name", value=7),
        set_key("files", 0, "name", value="../0001.jsonl"),
        set_key("files", 0, "name", value="0009.jsonl"),
        set_key("files", 0, "end", value=-1),
        set_key("files", 0, "end", value="9"),
        set_key("files", 0, "line", value=None),
        set_key("usage", value=[[1, {"requests": "3"}]]),
        set_key("usage", value=[["1", {}]]),
        set_key("usage", value=[[[], {}]]),
        set_key("usage", value=None),
        set_key("duplicates", value=-1),
    ],
)
def test_a_crafted_saved_index_is_ignored(
    tmp_path: Path, change: Callable[[dict[str, Any], bytearray], None]
) -> None:
    write_journal(tmp_path / "0001.jsonl", [sample(1), sample(2, "failed")])
    write_journal(tmp_path / "0002.jsonl", [sample(3)])
    save(tmp_path)
    expected = read(tmp_path, plainly=False)
    rewrite(tmp_path / SNAPSHOT_FILE, change)
    assert read(tmp_path, plainly=False) == expected


values = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 600), st.sampled_from([0, 1, 2, 3])
)
odd_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_saved_index_ends_in_another_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_journal(folder / "0001.jsonl", [sample(1), sample(2, "failed")])
    write_journal(folder / "0002.jsonl", [sample(3)])
    save(folder)
    path = folder / SNAPSHOT_FILE
    kind = data.draw(st.sampled_from(["bytes", "columns", "head", "items"]))
    if kind == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=200)))
    elif kind == "columns":
        for _ in range(data.draw(st.integers(1, 4))):
            column, item = data.draw(st.integers(0, 3)), data.draw(st.integers(0, ITEMS - 1))
            value = data.draw(values)
            rewrite(path, set_value(column, item, value % 256 if column == 0 else value))
    else:
        about = orjson.loads(path.read_bytes().partition(b"\n")[0].partition(b" ")[2])
        name = "items" if kind == "items" else data.draw(st.sampled_from(sorted(about)))
        odd: Any = data.draw(st.integers(0, 2**60) if kind == "items" else odd_json)
        rewrite(path, set_key(name, value=odd))
    read(folder, plainly=False)  # raises nothing but a JournalError, which it returns


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
