from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs.readers import CsvSplitter
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), min_size=1), st.sampled_from(",\t"))
def test_splits_what_the_csv_module_writes(records: list[list[str]], delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        records
    )
    lines = enumerate(text.getvalue().removesuffix("\n").split("\n"), start=1)
    splitter = CsvSplitter(Path("a.csv"), delimiter)
    assert [cells for _, cells in splitter.split(lines)] == records


@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), min_size=1))
def test_splits_with_the_fewest_quotes(records: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(records)
    lines = enumerate(text.getvalue().removesuffix("\n").split("\n"), start=1)
    found = [cells for _, cells in CsvSplitter(Path("a.csv"), ",").split(lines)]
    assert found == records


def test_csv_cells_names_and_ids_are_stripped(put: Put, load: Load) -> None:
    path = put("a.csv", "\ufeff id ,x\r\n a , 1 2 \r\n\r\nb,\r\n")
    assert load(InputConfig(path=str(path), id="id"), "x") == [
        Item(0, "a", {"id": "a", "x": "1 2"}),
        Item(1, "b", {"id": "b", "x": ""}),
    ]


def test_row_numbers_count_rows_from_one(put: Put, load: Load) -> None:
    items = load(InputConfig(path=str(put("a.csv", "x\n\nfirst\n\nsecond\n"))))
    assert [item.id for item in items] == ["1", "2"]


def test_unnamed_columns_get_a_name(put: Put, load: Load) -> None:
    assert load(InputConfig(path=str(put("a.csv", ",x,\n0,1,\n"))))[0].row == {
        "unnamed_0": "0",
        "x": "1",
        "unnamed_2": "",
    }


def test_quoted_cells(put: Put, load: Load) -> None:
    path = put("a.csv", 'x,y\n"one, ""two""\nthree" , "4"\n5" pipe,6\n')
    assert [item.row for item in load(InputConfig(path=str(path)))] == [
        {"x": 'one, "two"\nthree', "y": "4"},
        {"x": '5" pipe', "y": "6"},
    ]


def test_long_cells_leave_the_csv_module_alone(put: Put, load: Load) -> None:
    before = csv.field_size_limit()
    long = "abstract " * 25_000
    items = load(InputConfig(path=str(put("a.csv", f'x,y\n1,"{long}"\n2,{long}\n'))))
    assert [len(item.row["y"]) for item in items] == [len(long) - 1] * 2
    assert csv.field_size_limit() == before


def test_tsv(put: Put, load: Load) -> None:
    items = load(InputConfig(path=str(put("a.TSV", "x\ty\n1, 2\t\n")), id="x"))
    assert items == [Item(0, "1, 2", {"x": "1, 2", "y": ""})]


@pytest.mark.parametrize("quotes", ["auto", False])
def test_quotes_in_a_tsv_are_text(put: Put, load: Load, quotes: Any) -> None:
    """A stray quote does not merge rows."""
    path = put("a.tsv", 'x\ty\n5" pipe\t"open\n"6"\ta "b" c\n"\t7\n')
    assert [item.row for item in load(InputConfig(path=str(path), quotes=quotes))] == [
        {"x": '5" pipe', "y": '"open'},
        {"x": '"6"', "y": 'a "b" c'},
        {"x": '"', "y": "7"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "quotes", "row"),
    [
        ("a.tsv", 'x\ty\n"1\t2\n3"\t"4"\n', True, {"x": "1\t2\n3", "y": "4"}),
        ("a.csv", 'x,y\n"1,2",3\n', True, {"x": "1,2", "y": "3"}),
        ("a.csv", 'x,y\n"1",3"\n', False, {"x": '"1"', "y": '3"'}),
    ],
)
def test_the_setting_decides_whether_quotes_enclose_cells(  # noqa: PLR0913, PLR0917 - a table
    put: Put, load: Load, name: str, content: str, quotes: bool, row: dict[str, str]
) -> None:
    config = InputConfig(path=str(put(name, content)), quotes=quotes)
    assert [item.row for item in load(config)] == [row]


def test_a_tsv_with_quoted_cells_names_the_setting(put: Put, load: Load) -> None:
    path = put("a.tsv", 'x\ty\n"1\t2"\t3\n')
    with pytest.raises(InputError, match=r"a\.tsv, line 2: 3 cells.*input\.quotes: true"):
        load(InputConfig(path=str(path)))


def test_smi(put: Put, load: Load) -> None:
    path = put("a.smi", "SMILES Name\n# a remark\nCCO ethyl alcohol \n\nC\t\nO\twater\n")
    assert [item.row for item in load(InputConfig(path=str(path)))] == [
        {"smiles": "CCO", "name": "ethyl alcohol"},
        {"smiles": "C", "name": ""},
        {"smiles": "O", "name": "water"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n3\n", r"a\.csv, line 3: 1 cells, but the header names 2 columns"),
        ("a.csv", 'x,y\n"1\n\n",2\n3,4,5\n', r"a\.csv, line 5: 3 cells, .* 2 columns; put quotes"),
        ("a.csv", 'x,y\n1,2\n"3,4\n5,6\n', r"line 3: the quote that opens here is not closed"),
        ("a.csv", 'x,y\n"1"2,3\n', r"line 2: text follows the closing quote of cell 1; write"),
        ("a.csv", "x,y,x\n1,2,3\n", r"line 1: the header names 'x' twice; give every column"),
        ("a.csv", "x;y\n1;2\n", r"line 1: the columns seem to be separated by semicolons"),
        ("a.csv", "x\ty\n1\t2\n", r"line 1: the columns seem to be separated by tabs"),
        ("a.tsv", "x,y\n1,2\n", r"line 1: the columns seem to be separated by commas"),
        ("a.csv", "x,y\n", r"a\.csv has no rows; nothing to run"),
        ("a.csv", " \n\n", r"a\.csv contains only blanks; its first line must name"),
        ("a.csv", "", r"a\.csv is empty; input\.path must name a file with rows"),
        ("a.csv", b"\xef\xbb\xbf", r"a\.csv is empty"),
        ("a.csv", b"PK\x03\x04\0\0", r"a\.csv is a binary file \(a NUL byte at offset 4\)"),
        ("a.csv", b"x\n" + b"1\n" * 5000 + b"\0\n", r"binary file \(a NUL byte in line 5002\)"),
        ("a.csv", b"x\nna\xefve\n", r"not encoded as UTF-8: byte 3 of line 2 is 0xEF; convert"),
        (
            "a.csv",
            "x\n1\n".encode("utf-16"),
            r"the byte order mark of UTF-16; convert .* iconv -f UTF-16",
        ),
        ("a.csv", "x,y\r1,2\r", r"line 1: lines end with bare carriage returns; convert it"),
        ("a.smi", "# only remarks\n", r"a\.smi has no rows"),
    ],
)
def test_faulty_files(put: Put, load: Load, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(put(name, content))))


def test_a_line_without_end_is_refused(
    put: Put, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanfold.backends.inputs.lines.MAX_LINE_BYTES", 100)
    with pytest.raises(InputError, match="line 2 is longer than 100 bytes; the file must be text"):
        load(InputConfig(path=str(put("a.csv", "x\n" + "y" * 101 + "\n"))))


def test_an_endless_quoted_cell_is_refused(
    put: Put, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanfold.backends.inputs.readers.MAX_LINE_BYTES", 100)
    with pytest.raises(InputError, match="line 2: the quote that opens here is not closed"):
        load(InputConfig(path=str(put("a.csv", 'x\n"' + "y\n" * 200 + '"\n'))))


def test_a_missing_column_is_named_with_those_there(put: Put, load: Load) -> None:
    path = put("a.csv", "mol_id,smiles\n1,C\n")
    with pytest.raises(
        InputError,
        match=r"a\.csv has no column 'SMILE', which the task needs; "
        r"its columns: mol_id, smiles; did you mean 'smiles'\?",
    ):
        load(InputConfig(path=str(path)), "SMILE")
    with pytest.raises(InputError, match=r"no column 'xyz', which input\.id needs; its columns"):
        load(InputConfig(path=str(path), id="xyz"))


def test_the_limit_stops_the_reading(put: Put, load: Load) -> None:
    path = put("a.csv", b"x\n1\n2\n\xe9\n")
    assert [item.id for item in load(InputConfig(path=str(path), limit=2))] == ["1", "2"]
    with pytest.raises(InputError, match="line 4"):
        load(InputConfig(path=str(path), limit=3))
