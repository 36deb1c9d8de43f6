"""Inputs of several files, packed files, arrays of JSON, and numbers of more than 64 bits."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.configs.models import InputConfig
from fanfold.graphs.caller_policy import resolve_below

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]


def rows(items: list[Item]) -> list[object]:
    return [item.row["x"] for item in items]


@pytest.mark.parametrize("where", ["parts", "parts/*.jsonl", "parts/part-?.jsonl"])
def test_files_of_one_kind_are_one_input(put: Put, load: Load, tmp_path: Path, where: str) -> None:
    put("parts/part-2.jsonl", '{"x": 3}\n')
    put("parts/part-1.jsonl", '{"x": 1}\n\n{"x": 2, "y": 0}\n')
    put("parts/.part-0.jsonl", '{"x": 0}\n')
    put("parts/_SUCCESS", "")
    items = load(InputConfig(path=str(tmp_path / where)), "x")
    assert rows(items) == [1, 2, 3]
    assert [item.id for item in items] == ["1", "2", "3"]


def test_packed_and_plain_files_mix_and_a_folder_has_subfolders(
    put: Put, load: Load, tmp_path: Path
) -> None:
    put("parts/b/2.csv", "x\n3\n")
    put("parts/a.csv.gz", gzip.compress(b"x\n1\n2\n"))
    assert rows(load(InputConfig(path=str(tmp_path / "parts")))) == ["1", "2", "3"]


def test_a_pattern_of_texts(put: Put, load: Load, tmp_path: Path) -> None:
    put("docs/a.txt", "A")
    put("docs/b.txt.gz", gzip.compress(b"B\n"))
    put("docs/c.csv", "x\n1\n")
    items = load(InputConfig(path=str(tmp_path / "docs/*.txt*")), "text")
    assert [(i.row["file"], i.row["text"]) for i in items] == [("a.txt", "A"), ("b.txt.gz", "B")]


def test_a_name_with_characters_of_a_pattern_is_a_name(
    put: Put, load: Load, tmp_path: Path
) -> None:
    put("a[1].csv", "x\n1\n")
    put("a1.csv", "x\n2\n")
    assert rows(load(InputConfig(path=str(tmp_path / "a[1].csv")))) == ["1"]


@pytest.mark.parametrize(
    ("files", "where", "message"),
    [
        (["p/a.csv", "p/b.jsonl"], "p", r"several kinds: 1 \.csv \(a\.csv\), 1 \.jsonl .*/p/\*\."),
        (["p/a.csv", "p/b.txt"], "p", r"several kinds: 1 \.csv \(a\.csv\), 1 text \(b\.txt\)"),
        (["p/a.csv", "p/b.tsv"], "p/*", r"pattern .*p/\* has files of several kinds"),
        (["p/a.docx"], "p/*", r"no file of a known format .*\.parquet.*found: a\.docx"),
        (["p/a.csv"], "p/*.tsv", r"no file matches .*p/\*\.tsv"),
        ([], "p/*.tsv", r"p cannot be read: No such file"),
    ],
)
def test_files_that_are_no_input(  # noqa: PLR0913, PLR0917 - fixtures and a table
    put: Put, load: Load, tmp_path: Path, files: list[str], where: str, message: str
) -> None:
    for name in files:
        put(name, "x\n1\n")
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(tmp_path / where)))


def test_an_error_names_the_file_and_the_line(put: Put, load: Load, tmp_path: Path) -> None:
    put("p/a.jsonl", '{"x": 1}\n')
    put("p/b.jsonl", '{"x": 1}\n{"x": \n')
    with pytest.raises(InputError, match=r"p/b\.jsonl, line 2"):
        load(InputConfig(path=str(tmp_path / "p")))
    put("p/b.jsonl", '{"x": 1}\n{"y": 1}\n')
    with pytest.raises(InputError, match=r"p/b\.jsonl, line 2 has no column 'x'"):
        load(InputConfig(path=str(tmp_path / "p")), "x")
    put("p/b.jsonl", '{"x": 2, "n": "a"}\n{"x": 3, "n": "a"}\n')
    put("p/a.jsonl", '{"x": 1, "n": "b"}\n')
    with pytest.raises(InputError, match=r"'a' \(.*p/b\.jsonl, line 2\)"):
        load(InputConfig(path=str(tmp_path / "p"), id="n"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", b"x\n1\n2\n"),
        ("a.TSV.GZ", b"x\ty\n1\t\n2\t\n"),
        ("a.ndjson.gz", b'\xef\xbb\xbf{"x": "1"}\n{"x": "2"}'),
        ("a.json.gz", b'[{"x": "1"}, {"x": "2"}]'),
    ],
)
def test_packed_files(put: Put, load: Load, name: str, content: bytes) -> None:
    packed = gzip.compress(content[:5]) + gzip.compress(content[5:])  # members, as cat makes them
    assert rows(load(InputConfig(path=str(put(name, packed))))) == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x\n1\n", r"a\.csv\.gz cannot be unpacked: Not a gzipped file"),
        (
            gzip.compress(b"x\n1\n" * 99, mtime=0)[:-9],
            r"a\.csv\.gz cannot be unpacked: Compressed file",
        ),
        (gzip.compress(b"x\n1\n", mtime=0)[:12] + b"\xff" * 20, r"a\.csv\.gz cannot be unpacked"),
        (gzip.compress(b"", mtime=0), r"a\.csv\.gz is empty"),
        (gzip.compress(b"\0\1\2", mtime=0), r"a\.csv\.gz is a binary file"),
    ],
)
def test_packed_files_that_are_damaged(put: Put, load: Load, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(put("a.csv.gz", content))))


@pytest.mark.usefixtures("small_limit")
def test_a_packed_text_is_not_unpacked_beyond_the_limit(
    put: Put, load: Load, tmp_path: Path
) -> None:
    put("docs/a.txt.gz", gzip.compress(b"line of text\n" * 10_000))
    with pytest.raises(InputError, match=r"a\.txt\.gz has more than 100 bytes unpacked"):
        load(InputConfig(path=str(tmp_path / "docs")))


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fanfold.backends.inputs.lines.MAX_LINE_BYTES", 100)


@pytest.mark.parametrize(
    "text",
    [
        '[{"x": 1}, {"x": 2}]',
        '\ufeff\n[\n  {"x": 1},\n  {"x": 2}\n]\n',
        '{"x": 1}\n{"x": 2}\n',
        '\n \n{"x": 1}\n\n{"x": 2}',
    ],
)
def test_a_json_file_has_an_array_or_lines(put: Put, load: Load, text: str) -> None:
    assert rows(load(InputConfig(path=str(put("a.json", text))))) == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"x": 1},\n {"x": }]', r"a\.json, line 2: not JSON: .* at character 8"),
        ('{"rows": [\n{"x": 1}]}', r"a\.json is an object, not an array of objects"),
        ('"x"', r"a\.json is a string, not an array"),
        ('[{"x": 1}, 2]', r"a\.json, row 2: not a JSON object but a number"),
        ("[]", r"a\.json has no rows"),
        ('[{"x": 1}, {"y": 2}]', r"a\.json, row 2 has no column 'x'"),
        ('\n{"x": 1}\n\n{"y": 2}', r"a\.json, line 4 has no column 'x'"),
        ('{"x": 1}\n2', r"a\.json, line 2: the row is not a JSON object but a number"),
        ('{"x": 1}\n{"x": }', r"a\.json, line 2: the row is not JSON"),
    ],
)
def test_faulty_arrays(put: Put, load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(put("a.json", text))), "x")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"k": "a"}, {"k": "b"},\n{"k": "a"}]', "row 3"),
        ('\ufeff\n{"k": "a"}\n{"k": "b"}\n\n{"k": "a"}', "line 5"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_position_in_a_json_file_is_a_row_or_a_line(
    put: Put, load: Load, text: str, place: str, name: str
) -> None:
    content = text.encode()
    path = put(name, gzip.compress(content) if name.endswith("gz") else content)
    for given in (path, path.parent):
        with pytest.raises(InputError, match=re.escape(f"'a' ({path}, {place})")):
            load(InputConfig(path=str(given), id="k"))


@pytest.mark.parametrize("number", [2**64, 10**30, -(2**63) - 1])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_number_that_would_lose_digits_is_refused(
    put: Put, load: Load, number: int, name: str
) -> None:
    text = json.dumps({"x": 1, "deep": [{"n": number}]})
    content = f"[{text}]" if name == "a.json" else text
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    with pytest.raises(InputError, match=rf"a\..*{number} has more than 64 bits .* in quotes"):
        load(InputConfig(path=str(put(name, packed))))


def test_numbers_of_64_bits_and_digits_in_texts_are_kept(put: Put, load: Load) -> None:
    values = [2**64 - 1, -(2**63), f"{10**30}", 1.5e300, 0.1234567890123456789012]
    lines = "\n".join(json.dumps({"x": value}) for value in values)
    assert rows(load(InputConfig(path=str(put("a.jsonl", lines))))) == values


def test_views_of_arrow(tmp_path: Path, load: Load) -> None:
    table = pa.table(
        {
            "x": pa.array(["a", None], pa.string_view()),
            "list": pa.array([["a"], ["b", "c"]], pa.list_view(pa.string_view())),
            "large": pa.array([[1], []], pa.large_list_view(pa.int8())),
            "packed": pa.array([b"1", b"2"], pa.binary_view()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    items = load(InputConfig(path=str(tmp_path / "a.parquet")), "x", "list")
    assert [item.row for item in items] == [
        {"x": "a", "list": ["a"], "large": [1]},
        {"x": None, "list": ["b", "c"], "large": []},
    ]


def test_a_request_cannot_leave_its_folder_by_a_pattern(put: Put, tmp_path: Path) -> None:
    outside = put("outside.csv", "x\n1\n")
    put("root/a.csv", "x\n1\n")
    root = tmp_path / "root"
    assert resolve_below(root, "*.csv", "path") == root / "*.csv"
    for text in ("../*.csv", str(tmp_path / "*.csv")):
        with pytest.raises(InputError, match="outside"):
            resolve_below(root, text, "path")
    (root / "link.csv").symlink_to(outside)
    with pytest.raises(InputError, match="outside"):
        resolve_below(root, "*.csv", "path")
