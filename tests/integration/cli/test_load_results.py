"""``load_results``: of a finished run, of an unfinished one, and while one goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fanfold import ConfigurationError, RunResults, load_results
from fanfold.backends.storage.run_folder import open_folder

from .conftest import Shell

pytestmark = pytest.mark.integration

PAGE = Path(str(files("fanfold")), "docs", "results.md").read_text()


def test_a_finished_run(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    before = shell.files()
    results = load_results("r")
    assert isinstance(results, RunResults)
    assert results.to_arrow().equals(pq.read_table("r/results.parquet"))
    assert (len(results), results.items, results.done, results.failed) == (3, 3, 3, 0)
    assert results.simulated
    assert results.folder == Path("r")
    assert results.aggregate == json.loads(Path("r/aggregate.json").read_text())["aggregate"]
    cost = json.loads(shell("cost", "r", "--json").out)
    assert results.cost == {name: cost[name] for name in results.cost}
    assert results.cost["requests"] == 3
    assert len(results.failures()) == 0
    assert repr(results) == "<RunResults: SIMULATED: t (simulated-8b): 3 done, 0 failed of 3>"
    assert "SIMULATED" in results._repr_html_()
    assert shell.files() == before


def test_an_unfinished_run_has_the_rows_so_far(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--pilot", "2", "--quiet").code == 5
    results = load_results("r")
    assert (len(results), results.items, results.aggregate) == (2, 3, [])
    assert "2 done, 0 failed of 3, 1 not ended" in results._repr_html_()
    assert results.to_arrow().column("text").to_pylist()[0] == "one"
    with open_folder(Path("r")).lock():  # as while a session works on the run
        again = load_results("r")
    assert again.to_arrow().equals(results.to_arrow())
    assert shell("resume", "r", "--quiet").code == 0
    whole = load_results("r")
    assert len(whole) == 3
    assert len(results) == 2
    assert whole.to_arrow().schema.equals(results.to_arrow().schema, check_metadata=True)


def test_records_after_the_table_was_written_count(shell: Shell) -> None:
    """A session that retries failed items has recorded answers, and the table is older."""
    Path("in.csv").write_text("id,text,smiles\n1,one,C\n2,two,not a molecule\n")
    shell.write(input={"path": "in.csv", "id": "id", "smiles": "smiles"})
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 3
    first = load_results("r")
    assert (first.done, first.failed) == (1, 1)
    assert first.failures().to_arrow().column("smiles").to_pylist() == ["not a molecule"]
    table = Path("r/results.parquet").read_bytes()
    aggregate = Path("r/aggregate.json").read_bytes()
    assert shell("resume", "r", "--retry-failed", "--quiet").code == 3
    Path("r/results.parquet").write_bytes(table)
    Path("r/aggregate.json").write_bytes(aggregate)
    later = load_results("r")
    assert later.aggregate == []
    ends = [str(one.to_arrow().column("finished_at")[1]) for one in (first, later)]
    assert ends[0] < ends[1]


def test_a_table_that_is_missing_or_of_another_version(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    table = load_results("r").to_arrow()
    pq.write_table(table.replace_schema_metadata(None), "r/results.parquet")
    assert load_results("r").to_arrow().equals(table)
    Path("r/results.parquet").write_bytes(b"damaged")
    assert load_results("r").to_arrow().equals(table)
    Path("r/results.parquet").unlink()
    assert load_results("r").to_arrow().equals(table)


def test_a_folder_that_is_no_run(shell: Shell) -> None:
    with pytest.raises(ConfigurationError, match="no such run folder"):
        load_results(shell.folder / "absent")
    with pytest.raises(ConfigurationError, match="not a run folder of fanfold"):
        load_results(shell.folder)


def test_the_example_of_the_documentation(shell: Shell) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    section = PAGE.partition("\n## In Python\n")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", section, re.DOTALL))
    Path("alerts.yaml").write_text(blocks["yaml"])
    assert shell("run", "alerts.yaml", "--out", "alerts", "--quiet").code == 0
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks["python"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["id", "smiles", "output.score"]
    assert re.fullmatch(r"\d+ severe alerts in \d+ molecules", lines[4])
    assert lines[5] == "0 failed; 20 requests"
    best = load_results("alerts").aggregate[0]["rows"][0]
    assert lines[1].split()[1] == best["id"]
    assert lines[6] == f"best: {best['show']['smiles']}"
