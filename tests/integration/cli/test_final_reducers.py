"""Queries and functions over the results: the documented example, failures, kills, embedded."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import fanfold
from fanfold import build_graph
from fanfold.tests.support.command_server import Command, run_command

from .conftest import Shell

pytestmark = pytest.mark.integration
pytest.importorskip("duckdb", reason="queries need the extra 'analysis'")

ROOT = Path(fanfold.__file__).parent


def read_aggregate(run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(run, "aggregate.json").read_text())["aggregate"]
    return found


def write_function(text: str, name: str = "mine") -> None:
    Path(f"{name}.py").write_text(text)
    sys.modules.pop(name, None)


def test_the_documented_example(shell: Shell) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (settings,) = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "reduced" in b]
    (function,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hours" in b]
    folder = Path("settings")  # functions are found beside the file, wherever fanfold starts
    folder.mkdir()
    (folder / "c.yaml").write_text(settings)
    (folder / "totals.py").write_text(function)
    lines = [f"{n},{'ab'[n % 2]},sample {n}" for n in range(12)]
    (folder / "samples.csv").write_text("\n".join(["id,site,text", *lines]) + "\n")
    assert shell("check", "settings/c.yaml").code == 0
    said = shell("run", "settings/c.yaml", "--out", "r")
    assert said.code == 0, said.err
    for words in ("by assays[].name", "count by input.site", "sql: SELECT site", "totals:hours"):
        assert words in said.out.replace("\n", " ")
    rows = pq.read_table("r/results.parquet").to_pylist()
    assays = [assay for row in rows for assay in row["output"]["assays"]]
    histogram, stats, count, sql, python = read_aggregate("r")
    counts = {row["value"]: row["count"] for row in histogram["counts"]}
    assert counts == {n: sum(a["name"] == n for a in assays) for n in ("nmr", "hplc", "ms")}
    assert {g["group"]: g["count"] for g in stats["groups"]} == counts
    assert [(g["group"], g["size"]) for g in count["groups"]] == [("a", 6), ("b", 6)]
    assert sql["rows"] == [
        {
            "site": site,
            "samples": 6,
            "assays": sum(len(row["output"]["assays"]) for row in rows if row["site"] == site),
        }
        for site in "ab"
    ]
    assert python["result"]["hours"] == pytest.approx(sum(a["hours"] for a in assays))
    results = fanfold.load_results("r")
    assert results.aggregate == read_aggregate("r")
    assert json.loads(shell("status", "r", "--json").out)["aggregate"] == results.aggregate
    assert shell("report", "r", "-o", "r.html").code == 0
    assert "totals:hours" not in shell("resume", "r", "--quiet").out
    assert read_aggregate("r") == results.aggregate


def test_one_that_fails_loses_nothing_and_is_corrected(
    shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    write_function("def broken(rows):\n    next(rows)\n    return 1 / 0\n")
    query = "SELECT CASE WHEN status = 'done' THEN error('boom') END FROM results"
    entries = [
        {"op": "sql", "query": query},
        {"op": "count"},
        {"op": "python", "function": "mine:broken"},
    ]
    shell.write(reduce=entries)
    said = shell("run", "c.yaml", "--out", "r")
    assert said.code == 0, said.err
    sql, count, python = read_aggregate("r")
    assert "boom" in sql["error"]
    assert count["done"] == 3
    assert "ZeroDivisionError" in python["error"]
    assert "mine.py, line 3, in broken" in python["error"]
    assert "reduce.2: mine:broken failed" in caplog.text
    assert "--set 'reduce.0.…'" in caplog.text
    assert pq.read_table("r/results.parquet").num_rows == 3
    requests = json.loads(shell("status", "r", "--json").out)["requests"]
    write_function("def broken(rows):\n    return [row['id'] for row in rows]\n")
    said = shell("resume", "r", "--set", "reduce.0.query=SELECT count(*) AS n FROM results")
    assert said.code == 0, said.err
    sql, _, python = read_aggregate("r")
    assert sql["rows"] == [{"n": 3}]
    assert python["result"] == ["1", "2", "3"]
    assert json.loads(shell("status", "r", "--json").out)["requests"] == requests


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"op": "sql", "query": "SELECT scor FROM results"}, "scor"),
        ({"op": "sql", "query": "COPY results TO 'x.csv'"}, "one SELECT statement (found COPY)"),
        ({"op": "python", "function": "nowhere:f"}, "nowhere:f cannot be imported"),
        ({"op": "python", "function": "json:nothing"}, "json:nothing cannot be imported"),
        ({"op": "python", "function": "broken_module:f"}, "broken_module.py, line 2"),
        (
            {"op": "python", "function": "parameters:none"},
            "parameters:none() cannot be called with one argument",
        ),
        (
            {"op": "python", "function": "parameters:two"},
            "two(rows, size) cannot be called with one argument (missing a required argument",
        ),
        ({"op": "python", "function": "json"}, "expected package.module:function"),
        ({"op": "sql", "query": ""}, "must not be empty"),
        ({"op": "sql", "query": "SELECT 1", "k": 3}, "unknown key 'reduce.0.k'"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_first_request(
    shell: Shell, entry: dict[str, Any], words: str
) -> None:
    Path("broken_module.py").write_text("x = 1\nraise ValueError(x)\n")
    write_function("def none(): ...\ndef two(rows, size): ...\n", "parameters")
    shell.write(reduce=[entry])
    for command in (("check", "c.yaml"), ("run", "c.yaml", "--out", "r")):
        said = shell(*command)
        assert said.code == 2
        assert words in said.err.replace("\n", " ")
        assert "reduce.0" in said.err
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("return object()", "returned object, which cannot be written as JSON"),
        ("return 'x' * 6_000_000", "bytes of JSON, more than 5,000,000"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return [row['nope'] for row in rows]", "KeyError: 'nope'"),
    ],
)
def test_results_that_are_no_data(shell: Shell, text: str, words: str) -> None:
    write_function(f"def f(rows):\n    {text}\n")
    shell.write(reduce=[{"op": "python", "function": "mine:f"}])
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    assert words in read_aggregate("r")[0]["error"]


KILLER = """
import os, signal
from pathlib import Path
def f(rows):
    found = sum(row["output"]["score"] for row in rows)
    if Path("kill").exists():
        Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return found
"""


def test_killed_in_a_function(shell: Shell) -> None:
    write_function(KILLER)
    entries = [
        {"op": "stats", "field": "score", "group_by": "label"},
        {"op": "sql", "query": "SELECT label, sum(score) AS s FROM results GROUP BY 1 ORDER BY 1"},
        {"op": "python", "function": "mine:f"},
    ]
    shell.write(reduce=entries)
    assert shell("run", "c.yaml", "--quiet", "--out", "whole").code == 0
    Path("kill").touch()
    killed = run_command(Command(("run", "c.yaml", "--quiet", "--out", "r")))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("r/aggregate.json").exists()
    resumed = run_command(Command(("resume", "r", "--quiet")))
    assert resumed.returncode == 0, resumed.stderr
    assert read_aggregate("r") == read_aggregate("whole")


async def test_embedded(shell: Shell) -> None:
    write_function("def f(rows):\n    return {'ids': [row['id'] for row in rows]}\n", "inside")
    shell.config["reduce"] = [
        {"op": "python", "function": "inside:f"},
        {"op": "sql", "query": "SELECT count(*) AS n FROM results"},
    ]
    shell.config["input"] = {"id": "id"}
    graph = build_graph(yaml.safe_load(yaml.safe_dump(shell.config)))
    end = await graph.ainvoke({"items": [{"id": "x", "text": "one"}, {"id": "y", "text": "two"}]})
    assert end["aggregate"][0]["result"] == {"ids": ["x", "y"]}
    assert end["aggregate"][1]["rows"] == [{"n": 2}]
