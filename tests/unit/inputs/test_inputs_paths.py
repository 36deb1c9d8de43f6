from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fanfold.backends.inputs.lines.MAX_LINE_BYTES", 100)


def test_a_folder_of_texts(tmp_path: Path, put: Put, load: Load) -> None:
    put("docs/b.md", "\ufeffB\r\nline two\r\n")
    put("docs/b.txt", "same stem")
    put("docs/deep/a.TXT", "A")
    put("docs/.hidden/c.txt", "not read")
    put("docs/.c.txt", "not read")
    put("docs/d.pdf", "not read")
    assert load(InputConfig(path=str(tmp_path / "docs")), "text") == [
        Item(0, "b.md", {"file": "b.md", "text": "B\nline two"}),
        Item(1, "b.txt", {"file": "b.txt", "text": "same stem"}),
        Item(2, "deep/a.TXT", {"file": "deep/a.TXT", "text": "A"}),
    ]


def test_a_limit_leaves_later_texts_unread(tmp_path: Path, put: Put, load: Load) -> None:
    put("docs/a.txt", "A")
    put("docs/b.txt", b"\xff")
    assert len(load(InputConfig(path=str(tmp_path / "docs"), limit=1))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"docs/b\.txt is empty"),
        (" \n\n", r"docs/b\.txt contains only blanks; remove it from the folder"),
        (b"ok\n\xe4", r"docs/b\.txt is not encoded as UTF-8: byte 1 of line 2 is 0xE4"),
        (b"ok\0", r"docs/b\.txt is a binary file"),
        ("x" * 200, r"docs/b\.txt has 200 bytes; an item may have at most 100"),
    ],
)
@pytest.mark.usefixtures("small_limit")
def test_faulty_texts(put: Put, load: Load, content: str | bytes, message: str) -> None:
    folder = put("docs/a.txt", "A").parent
    put("docs/b.txt", content)
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(folder)))


def test_a_folder_without_texts(tmp_path: Path, put: Put, load: Load) -> None:
    put("docs/a.docx", "x")
    with pytest.raises(
        InputError, match=r"the folder .*docs has no file of a known format .*found: a\.docx"
    ):
        load(InputConfig(path=str(tmp_path / "docs")))


def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: object) -> Iterator[Any]:
        raise PermissionError(13, "Permission denied", str(place))

    folder = tmp_path / "docs"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(InputError, match=r"docs cannot be read: Permission denied"):
            load(InputConfig(path=str(folder)))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.smi", "a.parquet"])
def test_an_unreadable_file(
    put: Put, load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = put(name, "x")
    true_open = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return true_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=rf"{name} cannot be read: Permission denied; check"):
        load(InputConfig(path=str(path)))


def test_a_missing_file(
    tmp_path: Path, put: Put, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("molecules.csv", "x\n1\n")
    with pytest.raises(InputError, match=r"molecule\.csv does not exist; did you mean 'molecul"):
        load(InputConfig(path=str(tmp_path / "molecule.csv")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"molecule\.csv does not exist \(looked for /.*\); did you mean 'molecul"
    ):
        load(InputConfig(path="molecule.csv"))
    with pytest.raises(InputError, match=r"a\.csv does not exist"):
        load(InputConfig(path=str(tmp_path / "nowhere" / "a.csv")))


def test_a_path_through_a_file(put: Put, load: Load) -> None:
    with pytest.raises(InputError, match=r"b\.csv cannot be read: Not a directory"):
        load(InputConfig(path=str(put("a.csv", "x\n1\n") / "b.csv")))


def test_a_pipe(tmp_path: Path, load: Load) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"a\.csv is not a regular file; copy its content"):
        load(InputConfig(path=str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.parquet.gz", "unpack it first"),
        ("a.csv.zip", "unpack it first"),
        ("a.xlsx.gz", "convert or rename"),
        ("a.xlsx", "save the sheet as .csv"),
        ("a.txt", "use the folder of texts as input.path"),
        ("a.sdf", "convert or rename"),
        ("a", "convert or rename"),
    ],
)
def test_an_unknown_format(put: Put, load: Load, name: str, hint: str) -> None:
    with pytest.raises(
        InputError, match=rf"unsupported input format: .*\.csv, .*\.parquet.*{hint}"
    ):
        load(InputConfig(path=str(put(name, "x"))))
