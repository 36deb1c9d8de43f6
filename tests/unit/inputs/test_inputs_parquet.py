from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]


def test_every_sayable_type(tmp_path: Path, load: Load) -> None:
    table = pa.table(
        {
            "text": pa.array(["ä", None]),
            "whole": pa.array([2**63, 0], pa.uint64()),
            "real": pa.array([1.5, float("nan")]),
            "half": pa.array([0.5, 1.0], pa.float16()),
            "truth": pa.array([True, None]),
            "class": pa.array(["a", "b"]).dictionary_encode(),
            "list": pa.array([[1, 2], []]),
            "struct": pa.array([{"x": "y"}, None]),
            "moment": pa.array([1, None], pa.timestamp("ns")),
            "zoned": pa.array([datetime(2020, 1, 2, tzinfo=UTC)] * 2),
            "day": pa.array([date(2020, 1, 2)] * 2),
            "clock": pa.array([time(1, 2, 3)] * 2),
            "price": pa.array([Decimal("1.50")] * 2),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = load(InputConfig(path=str(tmp_path / "a.parquet")), *table.column_names)
    assert first == Item(
        0,
        "1",
        {
            "text": "ä",
            "whole": 2**63,
            "real": 1.5,
            "half": 0.5,
            "truth": True,
            "class": "a",
            "list": [1, 2],
            "struct": {"x": "y"},
            "moment": "1970-01-01 00:00:00.000000001",
            "zoned": "2020-01-02 00:00:00.000000Z",
            "day": "2020-01-02",
            "clock": "01:02:03.000000",
            "price": "1.50",
        },
    )
    assert second.row["text"] is None
    assert second.row["real"] is None


UNSAYABLE = {
    "raw": pa.array([b"x"]),
    "span": pa.array([timedelta(seconds=1)]),
    "inner": pa.array([{"x": b"y"}]),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_columns_json_cannot_say(tmp_path: Path, load: Load, name: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": pa.array([1]), **UNSAYABLE}), path)
    assert load(InputConfig(path=str(path)))[0].row == {"x": 1}
    with pytest.raises(InputError, match=f"column '{name}' is of type .* convert the column"):
        load(InputConfig(path=str(path), id="x"), name)


def test_no_sayable_column_at_all(tmp_path: Path, load: Load) -> None:
    pq.write_table(pa.table(UNSAYABLE), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has no column of text or numbers; its col"):
        load(InputConfig(path=str(tmp_path / "a.parquet")))


def test_batches_and_limit(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(2000))}), path, row_group_size=300)
    assert [item.row["x"] for item in load(InputConfig(path=str(path)))] == list(range(2000))
    assert len(load(InputConfig(path=str(path), limit=700))) == 700


def test_faulty_files(tmp_path: Path, put: Put, load: Load) -> None:
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file: .*magic"):
        load(InputConfig(path=str(put("a.parquet", "x,y\n1,2\n" * 10))))
    with pytest.raises(InputError, match=r"a\.parquet is empty"):
        load(InputConfig(path=str(put("a.parquet", ""))))
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    with pytest.raises(InputError, match=r"b\.parquet has several columns named 'x'"):
        load(InputConfig(path=str(path)))
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), path)
    with pytest.raises(InputError, match=r"b\.parquet has no rows"):
        load(InputConfig(path=str(path)))


def test_damaged_pages(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [str(n) for n in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file"):
        load(InputConfig(path=str(path)))


def test_a_missing_column(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"smiles": ["C"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet has no column 'x'.*its columns: smiles"):
        load(InputConfig(path=str(path)), "x")
