"""Queries over the results: what they see, what they may not do, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.query_process import run_query
from fanfold.backends.storage.results_query import ResultQuery

duckdb = pytest.importorskip("duckdb", reason="queries need the extra 'analysis'")

TABLE = pa.table(
    {
        "id": ["a", "b", "c"],
        "status": ["done", "done", "failed"],
        "weight": pa.array([1.5, 2.5, None], pa.float64()),
        "output": pa.array(
            [
                {"score": 1, "ID": 7, "tags": [{"k": "x"}, {"k": "y"}]},
                {"score": 3, "ID": 8, "tags": []},
                None,
            ]
        ),
    }
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "results.parquet"
    pq.write_table(TABLE, path)
    return path


def ask(query: str, table: Path | None, **limits: Any) -> dict[str, Any]:
    request = {"table": None if table is None else str(table), "query": query}
    answer = run_query({**request, "limit": 3, "memory_mb": 256, **limits})
    json.dumps(answer, allow_nan=False)
    return answer


def test_columns_of_the_view(table: Path) -> None:
    query = (
        "SELECT id, output.score AS a, score AS b, output.ID AS c, input.k AS k FROM results r, "
        "(SELECT id AS i, unnest(tags, recursive := true) FROM results) input "
        "WHERE i = r.id ORDER BY k"
    )
    assert ask(query, table)["rows"] == [
        {"id": "a", "a": 1, "b": 1, "c": 7, "k": "x"},
        {"id": "a", "a": 1, "b": 1, "c": 7, "k": "y"},
    ]


def test_rows_are_limited_and_equal_names_are_numbered(table: Path) -> None:
    found = ask("SELECT id, id FROM results ORDER BY id", table, limit=2)
    assert found["rows"] == [{"id": "a", "id_1": "a"}, {"id": "b", "id_1": "b"}]
    assert found["columns"][1] == {"name": "id_1", "type": "VARCHAR"}
    assert found["more"] is True
    assert ask("SELECT 1", table)["more"] is False


def test_values_are_json(table: Path) -> None:
    query = """SELECT 'nan'::DOUBLE AS nan,
        170141183460469231731687::HUGEINT AS big, 1.5::DECIMAL(9, 2) AS dec,
        DATE '2020-01-02' AS day, TIME '10:00' AS t,
        TIMESTAMPTZ '2020-01-02 03:04:05+00' AS at, INTERVAL 3 DAY AS span, 'ab'::BLOB AS blob,
        MAP {'a': [1]} AS map, {'x': NULL} AS s, gen_random_uuid() AS u"""
    row = ask(query, table)["rows"][0]
    assert (row["nan"], row["big"], row["dec"]) == (None, hex(170141183460469231731687), 1.5)
    assert (row["day"], row["t"]) == ("2020-01-02", "10:00:00")
    assert row["at"].startswith("2020-01-02T03:04:05")
    assert (row["span"], row["blob"], row["map"], row["s"]) == (
        259_200,
        "YWI=",
        {"a": [1]},
        {"x": None},
    )
    assert len(row["u"]) == 36


HOSTILE = [
    "COPY results TO '{folder}/out.csv'",
    "COPY results FROM '/etc/passwd'",
    "ATTACH '{folder}/out.db' AS x",
    "EXPORT DATABASE '{folder}/out'",
    "IMPORT DATABASE '{folder}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET threads = 64",
    "RESET memory_limit",
    "PRAGMA memory_limit = '100GB'",
    "CALL pragma_version()",
    "CREATE TABLE x AS SELECT 1",
    "CREATE SECRET (TYPE s3)",
    "DROP VIEW results",
    "USE memory",
    "CHECKPOINT",
    "SELECT 1; COPY results TO '{folder}/out.csv'",
    "",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_json('/etc/passwd')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{table}'",
    "SELECT * FROM read_parquet('{table}')",
    "SELECT * FROM parquet_metadata('{table}')",
    "SELECT * FROM read_parquet('http://127.0.0.1:1/x')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "SELECT * FROM query('COPY results TO ''{folder}/out.csv''')",
    "SELECT * FROM pa",
    "SELECT * FROM request",
]


@pytest.mark.parametrize("query", HOSTILE)
def test_hostile_queries_are_refused(query: str, table: Path) -> None:
    before = table.read_bytes()
    text = query.format(folder=table.parent, table=table)
    try:
        answer = ask(text, table)
    except duckdb.Error as error:
        answer = {"error": str(error)}
    assert answer.keys() == {"error"}
    assert list(table.parent.iterdir()) == [table]
    assert table.read_bytes() == before


async def run(query: str, table: Path, **limits: Any) -> dict[str, Any]:
    known = {"limit": 3, "memory_mb": 256, "timeout_s": 120} | limits
    return await ResultQuery(query, **known).run(table)


async def test_a_query_in_its_process(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    found = await run("SELECT sum(score) AS n FROM results", table)
    assert found["rows"] == [{"n": 4}]
    with pytest.raises(ConfigurationError, match=r'"nope" not found') as error:
        await run("SELECT nope FROM results", table)
    assert "\n" not in error.value.message
    with pytest.raises(ConfigurationError, match=r"(?i)memory"):
        await run("SELECT list(range) FROM range(1000000000)", table, memory_mb=64)


async def test_a_query_that_takes_too_long_is_stopped(table: Path) -> None:
    endless = (
        "SELECT sum(a.range * b.range * c.range) FROM range(9999) a, range(9999) b, range(9999) c"
    )
    with pytest.raises(ConfigurationError, match=r"longer than timeout_s \(3 s\)"):
        await run(endless, table, timeout_s=3)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        mine = children.read_text().split()
        names = [Path(f"/proc/{pid}/cmdline") for pid in mine]
        assert not any("query_process" in name.read_text() for name in names if name.exists())


async def test_a_query_is_checked_against_the_columns() -> None:
    await ResultQuery("SELECT score, tags[1].k FROM results", 1, 256, 120).check(TABLE.schema)
    with pytest.raises(ConfigurationError, match="tag"):
        await ResultQuery("SELECT tag FROM results", 1, 256, 120).check(TABLE.schema)
