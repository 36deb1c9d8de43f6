"""The commands of docs/documents.md that make an input of the output of a parser of papers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.types import Item
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.configs.models import InputConfig

PAGE = Path(str(files("fanfold"))) / "docs" / "documents.md"

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


def run_command(folder: Path, word: str) -> list[Item]:
    """Run the only command of the page with a word, and read what it has written."""
    (command,) = re.findall(rf"^\$ (jq .*{word}.*)$", PAGE.read_text(), re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=folder, check=True, timeout=60)
    data = {"path": str(folder / "papers.jsonl"), "id": "id", "split": {}}
    load_input(InputConfig.model_validate(data), folder / "items.arrow", ["title"])
    with ItemStore(folder / "items.arrow") as store:
        return store.read(0, len(store))


def write(path: Path, *documents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in documents))


def test_adaparse(tmp_path: Path) -> None:
    """Paths of files from a zip file begin with a folder whose name is random."""
    for run in ("0c2b", "91fe"):
        folder = f"/local/{run}/osti"
        about = {"authors": "", "title": "T", "page_char_idx": [0, 9]}
        lines = (
            {"text": f"Text {n}.", "path": f"{folder}/{n}.pdf", "metadata": about, "parser": "x"}
            for n in (1, 2)
        )
        write(tmp_path / run / "OUT" / "parsed_pdfs" / "a.jsonl", *lines)
        items = run_command(tmp_path / run, "parsed_pdfs")
        assert [item.id for item in items] == ["osti/1.pdf/p1", "osti/2.pdf/p1"]
        assert [item.row["text"] for item in items] == ["Text 1.", "Text 2."]
        assert items[0].row["title"] == "T"


def test_doc2json(tmp_path: Path) -> None:
    for name in ("2004.14974", "2004.05150"):
        body = [{"text": f"{name} {n}", "cite_spans": [], "section": "S"} for n in (1, 2)]
        parse = {"paper_id": "2004", "body_text": body, "back_matter": [], "bib_entries": {}}
        parse["abstract"] = (
            [{"text": "In short.", "section": "Abstract"}] if "14974" in name else []
        )
        paper = {"paper_id": "2004", "title": "T", "abstract": "", "pdf_parse": parse}
        write(tmp_path / "json" / f"{name}.json", paper)
    other, one = run_command(tmp_path, "pdf_parse")
    assert (one.id, other.id) == ("2004.14974/p1", "2004.05150/p1")
    assert one.row["text"] == "In short.\n\n2004.14974 1\n\n2004.14974 2"
    assert other.row["text"] == "2004.05150 1\n\n2004.05150 2"
