"""Damaged files of a run: refused with file and line, or harmless."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fanfold.backends.budget.cost import group_usage
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.money import Amount
from fanfold.backends.storage.journal import Journal
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import write_journal

ITEMS = 12
NAMES = ("0001", "0001-node7-42-abcdef", "0002")


class Seen(NamedTuple):
    """What a reader sees of a run."""

    records: list[dict[str, Any]]
    requests: int
    nano_usd: int
    spent: Amount
    held_ms: int


def make_run(home: Path) -> None:
    """Write the files of a run: three journal files, and spend logs of a session and a lease."""
    (home / "journal").mkdir()
    for place, name in enumerate(NAMES):
        found = [
            sample(index, "failed" if index % 5 == 4 else "done", {"x": index, "s": "é\n" * index})
            | {"nano_usd": 100 + index, "raw": None if index % 2 else "said"}
            for index in range(4 * place, 4 * place + 4)
        ]
        write_journal(home / "journal" / f"{name}.jsonl", found)
    shelf = SpendLogs(home / "budget", "r")
    for life in (1, 2):
        book = shelf.create(shelf.session_path(life))
        book.write({"level": {"tokens": 1000 * life, "nano_usd": 10**6}}, sync=True)
        book.write({"held": {"node_ms": 1000, "idle_ms": 10, "nano_usd": 50}}, sync=False)
        lease = {"lease": f"{life}.0-4.0", "amount": {"tokens": 300}, "until": 100.5}
        book.write(lease | {"booked": True}, sync=True)
        if life == 2:
            book.write({"settled": Amount(9, 700, 5000, 1000).to_json()}, sync=True)
        book.close()
    book = shelf.create(shelf.lease_path("1.0-4.0"))
    book.write({"until": 90.0}, sync=True)
    book.write({"level": {"tokens": 200}}, sync=True)
    book.close()


def look(home: Path) -> Seen:
    """Read everything that results, counts and spending are made of."""
    with Journal(home / "journal", "r", ITEMS) as ledger:
        records = list(ledger.read_records())
        amounts = {life: spent.amount for life, spent in ledger.usage_by_session.items()}
        total = ledger.total_usage()
    for key in (None, "endpoint"):
        again = group_usage(home / "journal", "r", ITEMS, key, "m").total
        assert again == total
    shelf = SpendLogs(home / "budget", "r")
    held = shelf.total_node_time().node_ms
    return Seen(records, total.requests, total.nano_usd, shelf.total_spent(amounts, now=1e9), held)


def files_of(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*.jsonl"))


def outcome(home: Path, damaged: Path) -> Seen | None:
    """Return what is seen, or None where it is refused; then file and line are named."""
    try:
        return look(home)
    except JournalError as error:
        message = error.message
    assert str(damaged) in message
    assert ", line " in message
    return None


@pytest.fixture
def home(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    make_run(run)
    return run


def is_prefix(seen: Seen, whole: Seen) -> bool:
    """Say whether nothing is seen that was not written."""
    return all(record in whole.records for record in seen.records)


def flip_bits(home: Path, cases: Iterator[tuple[Path, int]]) -> int:
    """Flip single bits, one at a time; return how many were refused."""
    whole, refused = look(home), 0
    for path, bit in cases:
        data = path.read_bytes()
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        seen = outcome(home, path)
        assert seen is None or seen == whole, (path.name, bit)
        refused += seen is None
        path.write_bytes(data)
    return refused


def some_bits(home: Path, count: int) -> Iterator[tuple[Path, int]]:
    chance, files = random.Random(7), files_of(home)
    sizes = [8 * path.stat().st_size for path in files]
    for _ in range(count):
        (path,) = chance.choices(files, sizes)
        yield path, chance.randrange(8 * path.stat().st_size)


def test_a_flipped_bit_is_refused(home: Path) -> None:
    assert flip_bits(home, some_bits(home, 150)) == 150


def test_a_flipped_bit_of_a_last_line_or_a_line_end_is_refused(home: Path) -> None:
    path = home / "journal" / "0002.jsonl"
    data = path.read_bytes()
    ends = [8 * at + bit for at, byte in enumerate(data) if byte == 10 for bit in range(8)]
    last = range(8 * (data.rindex(b"\n", 0, -1) + 1), 8 * len(data), 29)
    cases = [(path, bit) for bit in (*ends, *last)]
    assert flip_bits(home, iter(cases)) == len(cases)


@pytest.mark.long
def test_each_of_10_000_flipped_bits_is_refused(home: Path) -> None:
    assert flip_bits(home, some_bits(home, 10_000)) == 10_000


def cut_at(home: Path, path: Path, sizes: Iterator[int]) -> None:
    """Cut a file: whole lines before the cut count, and nothing else is seen."""
    whole, data = look(home), path.read_bytes()
    for size in sizes:
        path.write_bytes(data[:size])
        seen = look(home)
        assert is_prefix(seen, whole)
        if path.parent.name == "journal":
            before = sum(name.read_bytes().count(b"\n") for name in files_of(home)[-3:])
            present = sum(
                1 for name in NAMES if (home / "journal" / f"{name}.jsonl").stat().st_size
            )
            complete = path.read_bytes().count(b"\n") > 0
            assert len(seen.records) == before - present + (size > 0 and not complete)
        path.write_bytes(data)


def test_a_cut_file_is_what_a_crash_leaves(home: Path) -> None:
    for path in files_of(home):
        size = path.stat().st_size
        cut_at(home, path, iter(sorted({0, 1, size - 1, *range(5, size, 97)})))


@pytest.mark.long
def test_a_file_may_be_cut_at_each_byte(home: Path) -> None:
    for path in files_of(home):
        cut_at(home, path, iter(range(path.stat().st_size)))


def copy_as_next(path: Path) -> Path:
    target = path.with_name("0003.jsonl")
    shutil.copy(path, target)
    return target


def copy_as_worker(path: Path) -> Path:
    target = path.with_name("0002-node9-1-aaaaaa.jsonl")
    shutil.copy(path, target)
    return target


def rename_next(path: Path) -> Path:
    return path.rename(path.with_name("0009.jsonl"))


def rename_aside(path: Path) -> Path:
    return path.rename(path.with_name(path.name + ".bak"))


def rename_ending(path: Path) -> Path:
    return path.rename(path.with_suffix(".json"))


def swap(path: Path) -> Path:
    other = next(p for p in sorted(path.parent.glob("0*.jsonl")) if p != path)
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return path


def swap_with_budget(path: Path) -> Path:
    other = path.parent.parent / ("budget" if path.parent.name == "journal" else "journal")
    one, two = path.read_bytes(), (other / "0001.jsonl").read_bytes()
    (path.parent / "0001.jsonl").write_bytes(two)
    (other / "0001.jsonl").write_bytes(one)
    return path.parent.parent / "journal" / "0001.jsonl"


def append_other(path: Path) -> Path:
    other = next(p for p in sorted(path.parent.glob("0*.jsonl")) if p != path)
    path.write_bytes(path.read_bytes() + other.read_bytes())
    return path


def append_itself(path: Path) -> Path:
    path.write_bytes(2 * path.read_bytes())
    return path


def edited(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], Path]:
    def edit(path: Path) -> Path:
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
        return path

    return edit


def line_of_another(path: Path) -> Path:
    other = next(p for p in sorted(path.parent.glob("0*.jsonl")) if p != path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = other.read_bytes().splitlines(keepends=True)[1]
    path.write_bytes(b"".join(lines))
    return path


HARMFUL: dict[str, Callable[[Path], Path]] = {
    "copied as the next session's": copy_as_next,
    "copied as a worker's": copy_as_worker,
    "renamed": rename_next,
    "renamed aside": rename_aside,
    "renamed to another ending": rename_ending,
    "swapped": swap,
    "swapped with a spend log": swap_with_budget,
    "another appended": append_other,
    "appended to itself": append_itself,
    "line repeated": edited(lambda lines: [*lines[:2], *lines[1:]]),
    "lines reordered": edited(lambda lines: [lines[0], lines[2], lines[1], *lines[3:]]),
    "line removed": edited(lambda lines: [lines[0], *lines[2:]]),
    "header removed": edited(lambda lines: lines[1:]),
    "header repeated": edited(lambda lines: [lines[0], *lines]),
    "line of another file": line_of_another,
    "line ends converted": edited(lambda lines: [one[:-1] + b"\r\n" for one in lines]),
    "byte order mark": edited(lambda lines: [b"\xef\xbb\xbf", *lines]),
    "zeros within": edited(lambda lines: [lines[0], b"\0" * len(lines[1]), *lines[2:]]),
    "zeros at the end": edited(lambda lines: [*lines, b"\0" * 512]),
    "empty line": edited(lambda lines: [*lines, b"\n"]),
    "blank in a line": edited(lambda lines: [lines[0], lines[1].replace(b":", b": "), *lines[2:]]),
    "capital checksum": edited(
        lambda lines: [lines[0], lines[1][:-11] + lines[1][-11:].upper(), *lines[2:]]
    ),
}


@pytest.mark.parametrize("kind", ["journal", "budget"])
@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_edited_is_refused(home: Path, name: str, kind: str) -> None:
    path, whole = home / kind / "0001.jsonl", look(home)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = HARMFUL[name](path)
    if name == "copied as a worker's" and kind == "budget":
        with pytest.raises(
            JournalError,
            match=r"line 1: the file is budget/0001\.jsonl of this run under another name",
        ):
            look(home)
        return
    if name == "capital checksum" and lines[1][-11:].upper() == lines[1][-11:]:
        assert look(home) == whole  # it had digits only
        return
    assert outcome(home, damaged) is None


@pytest.mark.parametrize("kind", ["journal", "budget"])
@pytest.mark.parametrize("name", ["0001.jsonl.bak", "copy", "0001.jsonl~", ".0001.swp"])
def test_a_copy_under_a_name_that_is_not_read_is_harmless(home: Path, kind: str, name: str) -> None:
    whole = look(home)
    shutil.copy(home / kind / "0001.jsonl", home / kind / name)
    assert look(home) == whole


@pytest.mark.long
def test_random_edits_are_refused_or_harmless(home: Path) -> None:
    """Lines of all files are mixed at random; what is read was written, once."""
    whole, chance = look(home), random.Random(3)
    contents = {path: path.read_bytes() for path in files_of(home)}
    lines = [line for data in contents.values() for line in data.splitlines(keepends=True)]
    for _ in range(2_000):
        path = chance.choice(list(contents))
        own = contents[path].splitlines(keepends=True)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(own) + 1)
            match chance.randrange(3):
                case 0:
                    own.insert(at, chance.choice(lines))
                case 1:
                    del own[at : at + 1]
                case 2:
                    chance.shuffle(own)
        path.write_bytes(b"".join(own))
        seen = outcome(home, path)
        assert seen is None or is_prefix(seen, whole)
        assert seen is None or seen.requests <= whole.requests
        path.write_bytes(contents[path])
