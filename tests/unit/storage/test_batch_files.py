"""Output in OpenAI's batch format: whatever happens to the files, they agree with the journal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.batch_files import BatchFiles, make_line
from fanfold.backends.storage.journal import Journal
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import write_journal

RUN = "0123456789abcdef"
ABOUT = {"run": RUN}
COPY = "fedcba9876543210"
ITEMS = 6


def record(index: int, status: str) -> dict[str, Any]:
    error = ("RequestRefusedError", "no", '{"status_code":400,"code":null}')
    return {
        **sample(index),
        "index": index,
        "id": f"r-{index}",
        "status": status,
        "output": {"id": f"c-{index}", "choices": []} if status == "done" else None,
        **dict(
            zip(
                ("error_class", "error", "raw"),
                error if status == "failed" else (None, None, None),
                strict=True,
            )
        ),
    }


@contextmanager
def opened(folder: Path, split: bool = True) -> Iterator[BatchFiles]:
    errors = folder / "errors" if split else None
    with Journal(folder, (RUN,), ITEMS) as journal:
        yield BatchFiles(journal, ABOUT, ITEMS, folder / "out", errors)


def listed(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [orjson.loads(line) for line in lines]


states = st.lists(st.sampled_from(["done", "failed", "open"]), min_size=ITEMS, max_size=ITEMS)


def write_run(folder: Path, ends: list[str]) -> None:
    ended = [record(index, end) for index, end in enumerate(ends) if end != "open"]
    write_journal(folder / "0001.jsonl", ended, RUN)


def check(folder: Path, ends: list[str], split: bool) -> None:
    """Check that the files contain each item that has ended once, in the right file."""
    out, errors = listed(folder / "out"), listed(folder / "errors")
    done = {f"r-{n}" for n, end in enumerate(ends) if end == "done"}
    failed = {f"r-{n}" for n, end in enumerate(ends) if end == "failed"}
    named = sorted(line["custom_id"] for line in out)
    assert named == sorted(done if split else done | failed)
    if split:
        assert sorted(line["custom_id"] for line in errors) == sorted(failed)


@given(
    ends=states,
    before=states,
    split=st.booleans(),
    was_split=st.booleans(),
    cut=st.integers(0, 3000),
    spoil=st.none() | st.tuples(st.integers(200, 3000), st.integers(1, 500)),
    twice=st.booleans(),
)
def test_files_of_any_earlier_state_are_repaired(  # noqa: PLR0913 - hypothesis draws each
    *,
    ends: list[str],
    before: list[str],
    split: bool,
    was_split: bool,
    cut: int,
    spoil: tuple[int, int] | None,
    twice: bool,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, before)
        with opened(folder, was_split) as files:
            files.open()
            files.close()
        output = folder / "out"
        data = output.read_bytes() if output.exists() else b""
        if twice:
            data += data
        if spoil is not None and spoil[0] < len(data):
            at, lost = spoil
            data = data[:at] + bytes(lost) + data[at + lost :]
        output.write_bytes(data[: len(data) - cut] if cut < len(data) else data)
        write_run(folder, ends)
        with opened(folder, split) as files:
            files.open()
            files.close()
        check(folder, ends, split)
        if not split:  # the lines of failed items moved
            (folder / "errors").unlink(missing_ok=True)
        whole = output.read_bytes()
        with opened(folder, split) as files:
            files.open()
            files.close()
        assert output.read_bytes() == whole


def test_a_record_that_is_replaced_replaces_its_line(tmp_path: Path) -> None:
    write_run(tmp_path, ["failed", *["open"] * (ITEMS - 1)])
    with opened(tmp_path) as files:
        files.open()
    write_journal(tmp_path / "0001-node-1.jsonl", [record(0, "done")], RUN)
    with opened(tmp_path) as files:
        files.write([0])
        assert [line["custom_id"] for line in listed(tmp_path / "out")] == ["r-0"]
        files.write([0])
        files.close()
    assert [line["custom_id"] for line in listed(tmp_path / "out")] == ["r-0"]
    assert listed(tmp_path / "errors") == []


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b'{"id":"batch_req_x"}\n', b"\0\0"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    write_run(tmp_path, ["done"] * ITEMS)
    (tmp_path / "out").write_bytes(content)
    with opened(tmp_path) as files, pytest.raises(ConfigurationError, match="something else"):
        files.open()
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("raw", [None, "", "text…", "[1]", '{"status_code": "400"}'])
def test_a_failure_without_a_status_has_no_response(raw: str | None) -> None:
    line = orjson.loads(make_line(record(3, "failed") | {"raw": raw}, RUN))
    assert line["response"] is None
    assert line["error"] == {"code": "request_refused", "message": "no"}
    assert line["id"] == f"batch_req_{RUN}_3"


def test_a_completion_without_an_id_has_a_request_id() -> None:
    line = orjson.loads(make_line(record(3, "done") | {"output": {"id": 7}}, RUN))
    assert line["response"] == {"status_code": 200, "request_id": line["id"], "body": {"id": 7}}


def test_a_file_that_others_change_meanwhile_is_written_again(tmp_path: Path) -> None:
    ends = ["done"] * ITEMS
    write_run(tmp_path, ["open"] * ITEMS)
    with opened(tmp_path, split=False) as files:
        files.open()
        files.close()
    write_run(tmp_path, ends)
    with opened(tmp_path, split=False) as files:
        files.write(range(3))
        (tmp_path / "out").unlink()
        files.write(range(3, ITEMS))
        assert len(listed(tmp_path / "out")) == ITEMS - 3
        files.close()
        check(tmp_path, ends, split=False)
        with (tmp_path / "out").open("ab") as file:
            file.write(b"note\n")
        files.close()
    check(tmp_path, ends, split=False)


def test_a_device_is_no_output(tmp_path: Path) -> None:
    write_run(tmp_path, ["done"] * ITEMS)
    with Journal(tmp_path, (RUN,), ITEMS) as journal:
        files = BatchFiles(journal, ABOUT, ITEMS, Path("/dev/null"), None)
        with pytest.raises(ConfigurationError, match="not a regular file"):
            files.open()


@pytest.mark.parametrize("file", ["out", "errors"])
@pytest.mark.parametrize("lines", ["all", "one", "torn"])
def test_a_copy_leaves_the_files_of_the_original_alone(
    tmp_path: Path, file: str, lines: str
) -> None:
    """Both would write to the same files, because the settings name them."""
    write_run(tmp_path, ["done", "failed"] * (ITEMS // 2))
    with opened(tmp_path) as files:
        files.open()
    whole = (tmp_path / file).read_bytes()
    kept = {"all": whole, "one": whole.splitlines(keepends=True)[0], "torn": whole[:90]}[lines]
    for path in (tmp_path / "out", tmp_path / "errors"):
        path.unlink()
    (tmp_path / file).write_bytes(kept)
    about = {"run": COPY, "earlier": [RUN]}
    with Journal(tmp_path, (COPY, RUN), ITEMS) as journal:
        copy = BatchFiles(journal, about, ITEMS, tmp_path / "out", tmp_path / "errors")
        with pytest.raises(ConfigurationError, match=f"run {RUN}, and this run is a copy"):
            copy.open()
        assert (tmp_path / file).read_bytes() == kept
        copy = BatchFiles(journal, about, ITEMS, tmp_path / "out2", tmp_path / "errors2")
        copy.open()
    assert [line["id"] for line in listed(tmp_path / "out2")] == [
        f"batch_req_{COPY}_{n}" for n in range(0, ITEMS, 2)
    ]


def test_a_folder_whose_device_number_changed_keeps_its_files(tmp_path: Path) -> None:
    write_run(tmp_path, ["done"] * ITEMS)
    with opened(tmp_path) as files:
        files.open()
    before = (tmp_path / "out").read_bytes()
    about = {"run": COPY, "earlier": [RUN, "1" * 16], "own": [RUN]}
    with Journal(tmp_path, (COPY, RUN), ITEMS) as journal:
        BatchFiles(journal, about, ITEMS, tmp_path / "out", None).open()
    assert (tmp_path / "out").read_bytes() == before
