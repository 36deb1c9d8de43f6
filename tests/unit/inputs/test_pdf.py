"""PDF files as items: texts, scanned pages, and files that are broken, hostile or slow."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.aio import call_stoppable
from fanfold.backends.core.errors import MissingExtraError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs import pdf
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.backends.inputs.pdf import PROBLEM_COLUMN, read_pdfs
from fanfold.configs.models import InputConfig
from fanfold.tests.support.pdf_files import make_large_pdf, make_pdf, make_scan

pytest.importorskip("pypdfium2", reason="PDF files need the extra 'pdf'")


def read(tmp_path: Path, path: Path, **more: Any) -> list[Item]:
    config = InputConfig.model_validate({"path": str(path), **more})
    load_input(config, tmp_path / "items.arrow", ["text"])
    with ItemStore(tmp_path / "items.arrow") as store:
        return store.read(0, len(store))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "papers"
    found.mkdir()
    return found


def test_files_are_items_with_their_texts(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_pdf(folder / "b.pdf", ["First page", "", "Third page"])
    make_pdf(folder / "a.pdf", ["Only page"])
    with caplog.at_level(logging.WARNING):
        one, other = read(tmp_path, folder)
    assert (one.id, one.row["text"], one.row["pages"]) == ("a.pdf", "Only page", 1)
    assert (other.id, other.row["text"].split()) == ("b.pdf", ["First", "page", "Third", "page"])
    assert other.row["pages_without_text"] == [2]
    assert PROBLEM_COLUMN not in other.row
    assert "b.pdf (1 of 3)" in caplog.text
    (single,) = read(tmp_path, folder / "a.pdf")
    assert single.id == "a.pdf"


def test_a_scanned_page_is_reported(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its picture has no text; beside a page with text it is named, alone it fails its item."""
    make_scan(folder / "all.pdf", ["", ""])
    make_scan(folder / "one.pdf", ["A title page", ""])
    with caplog.at_level(logging.WARNING):
        whole, partly = read(tmp_path, folder)
    assert "none of its 2 pages has text; it is probably scanned" in str(whole.problem)
    assert (partly.problem, partly.row["pages_without_text"]) == (None, [2])
    assert partly.row["text"].strip() == "A title page"
    assert "one.pdf (1 of 2)" in caplog.text
    assert "all.pdf" not in caplog.text


def test_bad_files_fail_alone(tmp_path: Path, folder: Path) -> None:
    make_pdf(folder / "good.pdf", ["Good"])
    make_pdf(folder / "scan.pdf", ["", ""])
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "text.pdf").write_text("no PDF at all")
    whole = (folder / "good.pdf").read_bytes()
    (folder / "cut.pdf").write_bytes(whole[:40])
    (folder / "noise.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 4000)
    (folder / "gone.pdf").symlink_to(folder / "nothing.pdf")
    items = {item.id: item for item in read(tmp_path, folder)}
    assert {name for name, item in items.items() if item.problem is None} == {"good.pdf"}
    assert "OCR" in str(items["scan.pdf"].problem)
    for name in ("empty.pdf", "text.pdf", "cut.pdf", "noise.pdf", "gone.pdf"):
        assert str(items[name].problem).startswith(f"{name}: cannot be read as PDF: ")
        assert items[name].row["text"] is None


def test_parts_of_a_file_that_cannot_be_read_fail_too(tmp_path: Path, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["word " * 15] * 15)
    (folder / "b.pdf").write_text("no PDF")
    items = read(tmp_path, folder, split={"tokens": 50, "overlap": 5})
    assert len(items) > 3
    assert [item.id for item in items if item.problem is not None] == ["b.pdf/p1"]


def test_many_files_keep_their_order(tmp_path: Path, folder: Path) -> None:
    for n in range(30):
        make_pdf(folder / f"{n:02}.pdf", [f"file {n}"])
    assert [item.row["text"] for item in read(tmp_path, folder)] == [f"file {n}" for n in range(30)]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process has no limit here")
def test_a_file_that_needs_too_much_memory_fails_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a kilobyte that unpacks to 400 MB; the limit is lowered to be reached soon."""
    program = pdf._PROCESS.read_text()
    assert "MEMORY_BYTES = 2 << 30" in program
    own = folder / "process.py"
    own.write_text(program.replace("MEMORY_BYTES = 2 << 30", "MEMORY_BYTES = 256 << 20"))
    monkeypatch.setattr(pdf, "_PROCESS", own)
    make_large_pdf(folder / "b.pdf", b" ", 400_000_000)
    assert (folder / "b.pdf").stat().st_size < 10_000
    for name in "ac":
        make_pdf(folder / f"{name}.pdf", [name])
    rows = [row for _, row in read_pdfs(folder, [Path(f"{name}.pdf") for name in "abc"])]
    assert [row["text"] for row in rows] == ["a", None, "c"]
    assert "needs more than 2 GiB of memory" in str(rows[1][PROBLEM_COLUMN])


def test_a_file_that_takes_too_long_fails_alone(folder: Path) -> None:
    """A file of a kilobyte whose page has millions of words."""
    make_large_pdf(folder / "a.pdf", b"(word) Tj 0 -1 Td ", 100_000_000)
    assert (folder / "a.pdf").stat().st_size < 10_000
    began = time.monotonic()
    ((_, row),) = read_pdfs(folder, [Path("a.pdf")], seconds=2)
    assert row[PROBLEM_COLUMN] == "a.pdf: cannot be read as PDF: it takes longer than 2 s"
    assert time.monotonic() - began < 30


STUCK = "import time\ntime.sleep(600)\n"
KILLED = f"import os\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n"


@pytest.mark.parametrize(("program", "word"), [(STUCK, "longer than 0.5 s"), (KILLED, "damaged")])
def test_a_process_that_is_stuck_or_dies_costs_its_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, word: str
) -> None:
    own = folder / "process.py"
    own.write_text(program)
    monkeypatch.setattr(pdf, "_PROCESS", own)
    files = [Path(f"{n}.pdf") for n in range(3)]
    problems = [row[PROBLEM_COLUMN] for _, row in read_pdfs(folder, files, seconds=0.5)]
    assert all(word in problem for problem in problems)
    assert len(problems) == 3


def test_no_process_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()

    class Process(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Process)
    for n in range(5):
        make_pdf(folder / f"{n}.pdf", ["x"])
    rows = read_pdfs(folder, [Path(f"{n}.pdf") for n in range(5)])
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert started
    assert all(process.returncode is not None for process in started)


async def test_a_stop_does_not_wait_for_the_files(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads end with their processes, also if these never answer."""
    own = tmp_path / "process.py"
    own.write_text(STUCK)
    monkeypatch.setattr(pdf, "_PROCESS", own)
    for n in range(20):
        make_pdf(folder / f"{n}.pdf", ["x"])
    config = InputConfig.model_validate({"path": str(folder)})
    target = tmp_path / "items.arrow"
    before, began = set(threading.enumerate()), time.monotonic()
    reading = asyncio.create_task(call_stoppable(load_input, config, target, ["text"]))
    while not any(thread.name.startswith("fanfold-pdf") for thread in threading.enumerate()):  # noqa: ASYNC110 - threads set no events
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert time.monotonic() - began < 30
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("fanfold-pdf")]
    assert not target.exists()


def test_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pdf"):
        next(read_pdfs(folder, [Path("a.pdf")]))


def test_texts_count_beside_the_files_that_they_come_from(tmp_path: Path, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["x"])
    (folder / "a.md").write_text("parsed")
    assert [item.id for item in read(tmp_path, folder)] == ["a.md"]
