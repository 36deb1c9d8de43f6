"""Stamps of inputs: they tell whether files were changed, without reading them."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from fanfold.backends.storage.run_folder import read_file_stamp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "texts"
    (found / "more").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "more/c.txt"):
        (found / name).write_text(name)
    return found


def change(path: Path, content: str | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_text(content)


@pytest.mark.parametrize("name", ["", "*.txt"])
def test_a_change_of_any_file_changes_the_stamp(folder: Path, name: str) -> None:
    path = folder / name
    stamp = read_file_stamp(path)
    assert stamp is not None
    assert read_file_stamp(path) == stamp
    assert orjson.loads(orjson.dumps(stamp)) == stamp
    stat = (folder / "a.txt").stat()
    os.utime(folder / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen = [stamp, read_file_stamp(path)]
    for file, content in (("b.txt", "longer"), ("d.txt", ""), ("a.txt", None)):
        change(folder / file, content)
        seen.append(read_file_stamp(path))
    assert len({tuple(one or ()) for one in seen}) == len(seen)


def test_a_pattern_looks_at_its_own_files_only(folder: Path) -> None:
    before = read_file_stamp(folder / "*.txt")
    (folder / "notes.md").write_text("x")
    assert read_file_stamp(folder / "*.txt") == before


def test_what_is_not_there_has_no_stamp(folder: Path) -> None:
    for name in ("none", "*.csv", "[a"):
        assert read_file_stamp(folder / name) is None
    assert read_file_stamp(folder / "a.txt") is not None
