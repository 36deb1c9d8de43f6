"""Files of batches: requests, answers, and records of what was submitted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.batch.files import (
    BatchFolder,
    BatchOutput,
    BatchRecord,
    LineRecord,
    check_batch_settings,
    describe_open_batches,
    digest_body,
    encode_request,
    make_custom_id,
    read_output,
    summarize_batches,
    write_requests,
)
from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.backends.core.types import Usage
from fanfold.configs.backend import BackendConfig

RECORD = BatchRecord(1, 1, "/c/a.jsonl", "/c/a.out", "ab", 2, 100)
LINES = [LineRecord(n, 1, bytes([n]) * 16, Usage(3, 4)) for n in range(2)]
COUNTS = st.integers(0, 2**40)


def line_of(custom_id: Any, status: Any = 200, **changes: Any) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": {"n": 1}}
    line = {"id": "x", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line | changes).encode()


@given(index=COUNTS, attempt=st.integers(1, 10**6), body=st.dictionaries(st.text(), COUNTS))
def test_a_request_finds_its_answer(index: int, attempt: int, body: dict[str, int]) -> None:
    name = make_custom_id("r1", index, attempt)
    sent = json.loads(encode_request(name, body))
    assert sent == {
        "custom_id": f"r1:map:{index}:{attempt}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }
    output = BatchOutput()
    output.add(line_of(sent["custom_id"]), "r1", {(index, attempt): None})
    assert output.answers == {(index, attempt): (200, b'{"n":1}')}


def test_the_digest_ignores_the_order_of_fields_only() -> None:
    assert digest_body({"a": 1, "b": 2}) == digest_body({"b": 2, "a": 1})
    assert digest_body({"a": 1, "b": 2}) != digest_body({"a": 1, "b": 3})


@pytest.mark.parametrize(
    "name",
    [
        "r1:map:1:2",  # another request of the item
        "r1:map:2:1",
        "r2:map:1:1",
        "r1:reduce:1:1",
        "xr1:map:1:1",
        "r1:map:1:1 ",
        "r1:map:-1:1",
        "r1:map:\u0661:1",  # a digit of another script
        "r1:map:" + "9" * 5000 + ":1",
        None,
        7,
        ["r1:map:1:1"],
    ],
)
def test_lines_of_others_are_counted_and_ignored(name: Any) -> None:
    output = BatchOutput()
    output.add(line_of(name), "r1", {(1, 1): None})
    assert (output.answers, output.foreign) == ({}, 1)


@pytest.mark.parametrize("line", [b"{", b"[" * 9000, b"7", b"null", b'"r1:map:1:1"', b"\xff\x00"])
def test_lines_that_are_no_lines_are_counted_and_ignored(line: bytes) -> None:
    output = BatchOutput()
    output.add(line, "r1", {(1, 1): None})
    assert (output.answers, output.foreign) == ({}, 1)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"response": None, "error": {"message": "m"}}, 500),
        ({"response": None, "error": None}, 500),
        ({"response": {"status_code": 400, "body": None}, "error": {"message": "m"}}, 400),
        ({"response": {"status_code": 200, "body": {}}, "error": {"message": "m"}}, 500),
        ({"response": {"status_code": "200", "body": {}}}, 500),
        ({"response": {"status_code": True, "body": {}}}, 500),
        ({"response": {"status_code": 10**30, "body": {}}}, 500),
        ({"response": "x"}, 500),
    ],
)
def test_lines_without_an_answer_are_errors(changes: dict[str, Any], status: int) -> None:
    output = BatchOutput()
    output.add(line_of("r1:map:1:1", **changes), "r1", {(1, 1): None})
    assert output.answers[1, 1][0] == status


def test_of_several_lines_the_first_good_one_counts() -> None:
    output, wanted = BatchOutput(), {(1, 1): None}
    for n, status in enumerate((500, 200, 200, 400)):
        response = {"status_code": status, "body": {"n": n}}
        output.add(line_of("r1:map:1:1", response=response), "r1", wanted)
    assert output.answers == {(1, 1): (200, b'{"n":1}')}


def test_all_files_of_the_folder_are_read_but_no_endless_lines(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(line_of("r1:map:0:1") + b"\n" + b"x" * 5000 + b"\n")
    last = line_of("r0:map:1:1")[:-1]  # the file ends in the middle of a line
    (tmp_path / "sub" / "b.jsonl").write_bytes(line_of("r0:map:2:1") + b"\n\n" + last)
    (tmp_path / "c.json").write_bytes(line_of("r1:map:1:1"))
    wanted = dict.fromkeys([(0, 1), (1, 1), (2, 1)])
    output = read_output(tmp_path, ["r1", "r0"], wanted, 1000)
    assert output.files == 2
    assert sorted(output.answers) == [(0, 1), (2, 1)]
    assert output.foreign == 2
    assert read_output(tmp_path / "none", ["r1"], wanted, 1000).files == 0


def test_records_are_kept(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "batches")
    assert (folder.read(), folder.next_number()) == ([], 1)
    folder.write_lines(1, LINES)
    assert folder.read() == []  # written, but never submitted
    assert folder.next_number() == 2
    folder.write(RECORD)
    done = replace(
        RECORD, state="collected", batch_id="b", answered=1, missing=1, spent={"tokens": 5}
    )
    assert folder.read() == [RECORD]
    folder.write(done)
    assert folder.read() == [done]
    assert folder.read_lines(done) == LINES


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"state": "lost"},
        {"lines": -1},
        {"lines": None},
        {"number": "1"},
        {"input_file": ""},
        {"state": "submitted", "batch_id": None},
        {"batch_id": 5},
        {"spent": {"tokens": -5}},
        {"other": 1},
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = BatchFolder(tmp_path)
    folder.write_lines(1, LINES)
    folder.write(RECORD)
    path = tmp_path / "0001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(JournalError, match=r"0001\.json: the record of a batch is damaged"):
        folder.read()


@pytest.mark.parametrize("text", [b"", b"[1]\n", b'[0,1,"zz",1,1]\n' * 2, b"x\n" * 2])
def test_damaged_requests_are_refused(tmp_path: Path, text: bytes) -> None:
    folder = BatchFolder(tmp_path)
    folder.write_lines(1, LINES)
    folder.lines_path(1).write_bytes(text)
    with pytest.raises(JournalError, match=r"0001\.lines"):
        folder.read_lines(RECORD)


def test_a_refused_batch_takes_only_its_own_file_along(tmp_path: Path) -> None:
    cluster, other = tmp_path / "cluster", tmp_path / "other.jsonl"
    cluster.mkdir()
    other.write_text("x")
    folder = BatchFolder(tmp_path / "batches")
    folder.write_lines(1, LINES)
    file = write_requests(cluster, "r1", 1, [b"{}\n"])
    original = write_requests(cluster, "r0", 1, [b"{}\n"])  # of the run that r1 is a copy of
    for path in (file.path, other, original.path):
        record = replace(RECORD, input_file=str(path), state="refused")
        folder.write(record)
        folder.discard(record, cluster, "r1")
        assert folder.read() == []
    assert other.exists()
    assert original.path.exists()
    assert not file.path.exists()


def test_no_two_files_have_one_name(tmp_path: Path) -> None:
    made = [write_requests(tmp_path, "r1", 1, [b"a\n", b"b\n"]) for _ in range(5)]
    assert len({file.path for file in made} | {file.output_folder for file in made}) == 10
    assert len({file.sha256 for file in made}) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl"] * 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigurationError, match=r"backend\.dir"):
            check_batch_settings(BackendConfig(kind="batch", dir=str(tmp_path)))
        with pytest.raises(ConfigurationError, match=r"backend\.dir: .* cannot be written"):
            write_requests(tmp_path, "r1", 1, [b"a\n"])
    finally:
        tmp_path.chmod(0o700)


def test_messages_about_open_batches() -> None:
    posted = replace(RECORD, number=2)
    sent = replace(RECORD, state="submitted", batch_id="b", lines=1000, most_tokens=50_000)
    done = replace(sent, number=3, state="collected", answered=900, failed=60, missing=40)
    assert describe_open_batches([done, replace(RECORD, state="refused")]) == []
    first, doubt = describe_open_batches([sent, posted, done])
    assert first.startswith("2 batches with 1,002 requests cannot be recalled")
    assert "up to 50,100 tokens" in first
    assert doubt == "batch 2: it is not known whether the service has it (/c/a.jsonl)"
    assert summarize_batches([sent, posted, done]) == {
        "submitted": 1,
        "in_doubt": 1,
        "collected": 1,
        "requests": 2002,
        "answered": 900,
        "failed": 60,
        "missing": 40,
    }
