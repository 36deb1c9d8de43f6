"""PDF files as items: texts, scanned pages, and files that are broken, hostile or slow."""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import MissingExtraError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs import pdf
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.backends.inputs.pdf import PROBLEM_COLUMN, read_pdfs
from fanfold.configs.models import InputConfig

pytest.importorskip("pypdfium2", reason="PDF files need the extra 'pdf'")


def make_pdf(path: Path, texts: Sequence[str]) -> None:
    """Write a PDF file with one page for each text; a page of an empty text has none."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(texts)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(texts)} >>",
    ]
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    for n, text in enumerate(texts):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {4 + 2 * n} 0 R "
        objects.append(page + f"/Resources << /Font << /F1 {font} >> >> >>")
        stream = f"BT /F1 12 Tf 20 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    data, places = "%PDF-1.4\n", list[int]()
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    data += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer << /Size {size} /Root 1 0 R >>\n"
    path.write_text(f"{data}startxref\n{data.index('xref')}\n%%EOF\n")


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


def test_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pdf"):
        next(read_pdfs(folder, [Path("a.pdf")]))


def test_texts_count_beside_the_files_that_they_come_from(tmp_path: Path, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["x"])
    (folder / "a.md").write_text("parsed")
    assert [item.id for item in read(tmp_path, folder)] == ["a.md"]
