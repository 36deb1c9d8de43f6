from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanfold.backends.budget.cost import group_usage
from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import (
    JournalDelta,
    JournalSource,
    index_lines,
    make_record_key,
    parse_answer,
    scan_lines,
)
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import chained, journal_lines, write_journal

ITEMS = 6
NAME = "0001.jsonl"

texts = st.text(st.characters(codec="utf-8"), max_size=12)
outputs = st.one_of(texts, st.dictionaries(texts, st.one_of(texts, st.floats(-1e9, 1e9))))
records = st.builds(sample, st.integers(0, ITEMS - 1), st.sampled_from(["done", "failed"]), outputs)


def lines_of(found: list[dict[str, Any]]) -> list[bytes]:
    return journal_lines(Path(NAME), found)


def resealed(lines: list[bytes]) -> bytes:
    """Return lines with checksums that fit, as nobody but an editor of the file makes them."""
    objects = (orjson.loads(line) for line in lines)
    plain = (orjson.dumps({k: v for k, v in one.items() if k != "crc"}) for one in objects)
    return b"".join(chained(*plain))


def write(folder: Path, content: bytes) -> Path:
    path = folder / "0001.jsonl"
    path.write_bytes(content)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(found=st.lists(records, max_size=5), data=st.data())
def test_any_cut_keeps_the_whole_lines_before_it(
    tmp_path: Path, found: list[dict[str, Any]], data: st.DataObject
) -> None:
    lines = lines_of(found)
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path = write(tmp_path, whole[:cut])
    complete = whole[:cut].count(b"\n") - 1
    read = list(scan_lines(JournalSource(path, ("r",))))
    assert [line.record for line in read] == found[: max(complete, 0)]
    for line in read:
        assert whole[line.start : line.start + line.length] == lines[line.number - 1]
    with Journal(tmp_path, "r", ITEMS) as ledger:
        counts = dict[int, dict[str, Any]]()  # an answer before a failure, else the first
        for record in found[: max(complete, 0)]:
            other = counts.setdefault(record["index"], record)
            if (record["status"], other["status"]) == ("done", "failed"):
                counts[record["index"]] = record
        assert list(ledger.read_records()) == [counts[index] for index in sorted(counts)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    found=st.lists(records, min_size=1, max_size=5),
    garbage=st.one_of(
        st.binary(min_size=1, max_size=20).filter(lambda b: b"\n" not in b),
        st.sampled_from([b"", b"[]", b"null", b"{}", b'{"index":true}', b'{"index":0}', b"\0" * 9]),
    ),
    data=st.data(),
)
def test_any_strange_line_is_named(
    tmp_path: Path, found: list[dict[str, Any]], garbage: bytes, data: st.DataObject
) -> None:
    lines = lines_of(found)
    at = data.draw(st.integers(0, len(lines)))
    lines.insert(at, garbage + b"\n")
    path = write(tmp_path, b"".join(lines))
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path, "r", ITEMS)
    assert caught.value.message.startswith(f"{path}, line {at + 1}: ")


def test_a_strange_line_far_down_is_named(tmp_path: Path) -> None:
    """Lines are checked many at a time; the message names one."""
    lines = lines_of([sample(n % ITEMS) for n in range(700)])
    lines[600] = orjson.dumps(sample(0) | {"requests": "2"})
    path = write(tmp_path, resealed(lines))
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path, "r", ITEMS)
    assert caught.value.message.startswith(f"{path}, line 601: ")


def test_many_lines_add_up(tmp_path: Path) -> None:
    write(tmp_path, b"".join(lines_of([sample(n % ITEMS) for n in range(700)])))
    with Journal(tmp_path, "r", ITEMS) as ledger:
        assert (ledger.total_usage().requests, ledger.total_usage().prompt_tokens) == (1_400, 7_000)
        assert ledger.count_items().done == ITEMS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": ITEMS}, "has index 6, this run has 6 items"),
        ({"index": -1}, "has index -1"),
        ({"index": "0"}, "not a record of an item"),
        ({"status": "odd"}, "unknown status"),
        ({"status": ["done"]}, "unknown status"),
        ({"requests": "2"}, "requests is '2', not an integer"),
        ({"requests": -1}, "requests is -1, not an integer from 0"),
        ({"prompt_tokens": 2**63}, "prompt_tokens is 9223372036854775808, not"),
        ({"completion_tokens": 1.5}, "completion_tokens is 1.5"),
        ({"nano_usd": True}, "nano_usd is True"),
        ({"shares": [{"nano_usd": -5}]}, "nano_usd is -5"),
        ({"shares": 7}, "shares is not a list"),
    ],
)
def test_a_value_out_of_range_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = write_journal(tmp_path / NAME, [sample(0), sample(1), sample(0) | change, sample(2)])
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path, "r", ITEMS)
    assert caught.value.message.startswith(f"{path}, line 4: ")
    assert words in caught.value.message
    with pytest.raises(JournalError, match="line 4"):
        group_usage(tmp_path, "r", ITEMS, None, "m")


def test_the_largest_count_is_one(tmp_path: Path) -> None:
    write_journal(tmp_path / NAME, [sample(0) | {"prompt_tokens": 2**63 - 1}])
    with Journal(tmp_path, "r", ITEMS) as ledger:
        assert ledger.total_usage().prompt_tokens == 2**63 - 1


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"v": 1}, "line 1: journal version 1, this fanfold reads 2"),
        ({"v": 3}, "line 1: journal version 3, this fanfold reads 2"),
        ({"run": "other"}, "line 1: belongs to run 'other', not to 'r'"),
        ({"kind": "budget"}, r"line 1: the file is budget/0001\.jsonl of this run under another"),
        ({"name": "0007"}, r"line 1: the file is journal/0007\.jsonl of this run under another"),
        ({"v": None}, "line 1: journal version None"),
    ],
)
def test_a_foreign_header_is_refused(tmp_path: Path, header: dict[str, Any], words: str) -> None:
    lines = lines_of([sample(0)])
    first = orjson.loads(lines[0]) | header
    write(tmp_path, resealed([orjson.dumps(first), *lines[1:]]))
    with pytest.raises(JournalError, match=words):
        Journal(tmp_path, "r", ITEMS)


def test_the_files_of_the_run_that_was_copied_are_read(tmp_path: Path) -> None:
    write_journal(tmp_path / NAME, [sample(0)], "before")
    write_journal(tmp_path / "0002.jsonl", [sample(1)], "r")
    with pytest.raises(JournalError, match="belongs to run 'before', not to 'r'"):
        Journal(tmp_path, "r", ITEMS)
    with Journal(tmp_path, ("r", "before"), ITEMS) as ledger:
        assert ledger.count_items().done == 2


def test_an_older_journal_says_its_version(tmp_path: Path) -> None:
    write(tmp_path, b'{"v":1,"run":"r"}\n')
    with pytest.raises(JournalError, match="line 1: journal version 1, this fanfold reads 2"):
        Journal(tmp_path, "r", ITEMS)


@pytest.mark.parametrize("torn", [b"", b'{"index":1,'])
def test_zeros_after_a_power_loss_come_with_the_way_out(tmp_path: Path, torn: bytes) -> None:
    whole = b"".join(lines_of([sample(0)]))
    path = write(tmp_path, whole + torn + b"\0" * 4096)
    with pytest.raises(JournalError, match=r"line 3: 4,096 NUL bytes") as caught:
        Journal(tmp_path, "r", ITEMS)
    assert f"truncate -s {len(whole)} {path}" in caught.value.message
    path.write_bytes(path.read_bytes()[: len(whole)])
    with Journal(tmp_path, "r", ITEMS) as ledger:
        assert ledger.count_items().done == 1


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, output in ((9999, "old"), (10000, "new")):
        write_journal(tmp_path / f"{number:04}.jsonl", [sample(0, output=output)])
    with Journal(tmp_path, "r", ITEMS) as ledger:
        assert ledger.read_record(0)["output"] == "new"


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path / "copy.jsonl", [])
    with pytest.raises(JournalError, match=r"copy\.jsonl: not a journal file"):
        Journal(tmp_path, "r", ITEMS)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "0001.jsonl").mkdir()
    with pytest.raises(JournalError, match=r"0001\.jsonl: cannot be read: not a regular file"):
        Journal(tmp_path, "r", ITEMS)


@pytest.mark.parametrize(
    "zeros", [b"\0" * 30, b"\0" * 30 + b'"}\n'], ids=["at the end", "before more"]
)
def test_zeros_in_a_file_that_is_written_to_are_no_damage_yet(tmp_path: Path, zeros: bytes) -> None:
    """A network file system shows them for a moment; after the session ended they are real."""
    with Journal(tmp_path, "r", ITEMS) as ledger:
        ledger.start_session("test", 0.001)
        path = tmp_path / "0001-node1-7.jsonl"
        lines = journal_lines(path, [sample(0), sample(1)])
        path.write_bytes(b"".join(lines[:2]) + zeros)
        ledger.refresh(JournalDelta())
        assert ledger.count_items().done == 1
        with pytest.raises(JournalError, match="line 3"):
            Journal(tmp_path, "r", ITEMS)
        path.write_bytes(b"".join(lines))
        ledger.refresh(JournalDelta())
        assert ledger.count_items().done == 2


def test_a_reader_follows_files_of_all_sessions(tmp_path: Path) -> None:
    """Also the coordinator's own, a torn line that becomes whole, and files that appear later."""
    path = tmp_path / NAME
    lines = journal_lines(path, [sample(n) for n in range(3)])
    path.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    with Journal(tmp_path, "r", ITEMS) as journal:
        assert journal.count_items().done == 1
        journal.follow()
        assert journal.count_items().done == 1
        path.write_bytes(b"".join(lines))
        write_journal(tmp_path / "0001-node1-7.jsonl", [sample(3)])
        write_journal(tmp_path / "0002.jsonl", [sample(4, "failed")])
        journal.follow()
        counts = journal.count_items()
        assert (counts.done, counts.failed, counts.open) == (4, 1, 1)
        with Journal(tmp_path, "r", ITEMS) as again:
            assert again.count_items() == counts
            assert again.total_usage() == journal.total_usage()


def outline(source: JournalSource, *, fast: bool, live: bool, end: int | None) -> list[Any]:
    """Return number, start, length and key of each line, and the error that ended the reading."""
    found: list[Any] = []
    try:
        if fast:
            for some in index_lines(source, live=live, end=end):
                number, start = some.number - len(some.keys) + 1, some.start
                for key, length in zip(some.keys, some.lengths, strict=True):
                    found.append((number, start, length, key))
                    number, start = number + 1, start + length
                assert start == some.end
                assert source.path.read_bytes()[: some.end].endswith(b'%08x"}\n' % some.crc)
        else:
            for line in scan_lines(source, live=live):
                if end is not None and line.start >= end:
                    break
                found.append((line.number, line.start, line.length, make_record_key(line.record)))
    except JournalError as error:
        found.append(error.message)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    found=st.lists(records, max_size=6),
    damage=st.tuples(
        st.floats(0, 1),
        st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=2),
        st.integers(0, 6),
    ),
    live=st.booleans(),
    share=st.none() | st.floats(0, 1),
)
def test_the_index_of_lines_is_that_of_their_records(
    tmp_path: Path,
    found: list[dict[str, Any]],
    damage: tuple[float, list[tuple[float, int]], int],
    live: bool,
    share: float | None,
) -> None:
    """Whole, cut off, changed or with a line twice: the same lines, and the same error."""
    cut, changed, doubled = damage
    lines = lines_of(found)
    lines[doubled:doubled] = lines[doubled : doubled + (doubled < 3)]
    content = bytearray(b"".join(lines))
    for place, byte in changed:
        content[int(place * len(content))] = byte
    content = content[: round(cut * len(content))] if cut < 0.5 else content
    source = JournalSource(write(tmp_path, bytes(content)), ("r",))
    end = None if share is None else round(share * len(content))
    slow = outline(source, fast=False, live=live, end=end)
    assert outline(source, fast=True, live=live, end=end) == slow


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 5_000, 400_000]), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    lo=st.integers(0, 8),
)
def test_a_range_of_records_is_read_like_each_of_them(
    tmp_path: Path, sizes: list[int], order: Any, lo: int
) -> None:
    """Near to each other or far apart, in two files, with items between that have not ended."""
    made = [sample(index, "done", "x" * size) for index, size in enumerate(sizes)]
    order.shuffle(made)
    half = len(made) // 2
    write_journal(tmp_path / "0001.jsonl", made[:half])
    write_journal(tmp_path / "0002.jsonl", made[half:-1])
    total = len(sizes)
    lo = min(lo, total)
    with Journal(tmp_path, "r", total) as ledger:
        found = ledger.read_answers(lo, total)
        whole = [
            ledger.read_record(index) if ledger.is_finished(index) else None
            for index in range(lo, total)
        ]
        assert list(map(pick_answer, found)) == list(map(pick_answer, whole))
        open_item = made[-1]["index"]
        assert ledger.find_open(lo, total) == (open_item if open_item >= lo else total)
        if made[half:-1]:
            path = tmp_path / "0002.jsonl"
            path.write_bytes(path.read_bytes().replace(b'"output":"x', b'"output":"y', 1))
            with pytest.raises(JournalError, match="changed while the run was using it"):
                ledger.read_answers(0, total)


def pick_answer(record: dict[str, Any] | None) -> tuple[Any, ...] | None:
    if record is None:
        return None
    return tuple(record[key] for key in ("status", "output", "error_class"))


NAMES = st.sampled_from(["output", "error_class", "index", "a", ',"output":1,"error_class":null,'])
VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | NAMES | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
)


@given(output=VALUES, name=st.text(max_size=9) | NAMES, index=st.integers(0, 99))
def test_an_answer_is_found_whatever_it_contains(output: Any, name: str, index: int) -> None:
    """Also if it, or the id, looks like the parts of a record."""
    record = {**sample(index, "done", output), "id": name}
    answer = parse_answer(orjson.dumps(record), index)
    assert answer is None or pick_answer(answer) == pick_answer(record)
    assert answer is not None or "error_class" in str(output)
    assert parse_answer(orjson.dumps(record), index + 1) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"index":1,"status":"done"}',
        b'{"x":{"a":0,"output":1},"index":1,"output":2,"error_class":null}',
        b'{"stage":"","index":1,"output":,"error_class":null}',
    ],
)
def test_a_line_with_other_content_is_read_whole(line: bytes) -> None:
    assert parse_answer(line, 1) is None
