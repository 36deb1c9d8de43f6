"""``fanfold report`` at the command line."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration


def test_a_report_is_one_file_that_asks_for_nothing(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    said = shell("report", "run")
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith("Report: run/report.html (")
    text = (shell.folder / "run" / "report.html").read_text()
    assert "default-src 'none'; script-src 'sha256-" in text
    assert "SIMULATED" in text
    assert "3 <small>of 3</small>" in text
    assert not re.search(r"""\b(src|href)=["'](?!#)""", text)
    before = shell.files()
    assert shell("report", "run", "-o", "other.html").code == 0
    assert {name for name in shell.files() if name not in before} == {"other.html"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["."], "not a run folder"),
        (["run", "-o", "missing/x.html"], "does not exist"),
        (["run", "-o", "."], "is a folder"),
    ],
)
def test_what_cannot_be_written(shell: Shell, arguments: list[str], said: str) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    found = shell("report", *arguments)
    assert found.code == 2
    assert said in found.err
    assert not (shell.folder / "run" / "report.html").exists()


def test_the_page_has_its_tables_without_charts_and_drawings(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{n},{'C' * n}O\n" for n in range(1, 6))
    (shell.folder / "in.csv").write_text("id,smiles\n" + rows)
    reduce = [{"op": "top_k", "field": "score", "k": 3, "show": ["smiles"]}]
    reduce.append({"op": "histogram", "field": "label"})
    shell.write(task={"prompt": "Rate {smiles}", "schema": SCHEMA}, reduce=reduce)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    for name in ("altair", "rdkit"):
        monkeypatch.setitem(sys.modules, name, None)
    assert shell("report", "run").code == 0
    text = (shell.folder / "run" / "report.html").read_text()
    assert "<svg" not in text
    assert "No charts: they need the extra &#39;report&#39;" in text
    assert "No molecules: drawing SMILES needs the extra &#39;chem&#39;" in text
    assert "Highest score" in text
    assert "Distribution of label" in text


def test_the_commands_of_the_page(shell: Shell) -> None:
    page = Path(str(files("fanfold")), "docs", "report.md").read_text()
    block = re.findall(r"```console\n(.*?)```", page, re.DOTALL)[0]
    lines = block.splitlines()
    for line in (line for line in lines if line.startswith("$ fanfold ")):
        found = shell(*line.removeprefix("$ fanfold ").split(), *["--limit=40"] * ("run" in line))
        assert found.code == 0, found.err
    assert re.fullmatch(r"Report: \S+ \([\d.]+ MB\)", lines[-1])
    assert found.err.startswith(lines[-1].partition(" (")[0])
    text = (shell.folder / "screening" / "report.html").read_text()
    assert 'aria-label="structure of ' in text


@pytest.mark.parametrize("ended", [False, True])
def test_an_empty_or_unfinished_run(shell: Shell, ended: bool) -> None:
    limit = "2" if ended else "1"
    code = shell("run", "c.yaml", "--out", "run", "--quiet", "--budget-requests", limit).code
    assert code == 4
    assert shell("report", "run").code == 0
    text = (shell.folder / "run" / "report.html").read_text()
    assert "have not ended" in text
    assert "fanfold resume run --budget-requests N" in text


def test_failed_questions_of_an_operator_are_on_its_page_and_on_that_of_the_pipeline(
    shell: Shell,
) -> None:
    reduce = {"op": "summarize", "prompt": "Sum up.", "text": "{text}"}
    summary = {"name": "sum", "reduce": reduce, "model": {"max_tokens": 3}}
    shell.write(task=None, reduce=None, stages=[summary])
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    assert shell("report", "run").code == 0
    root = shell.folder / "run"
    whole, stage = ((path / "report.html").read_text() for path in (root, root / "stages" / "sum"))
    assert '<div class="bad"><dt>Failed</dt><dd>3</dd></div>' in whole  # with the summary itself
    assert '<div class="bad"><dt>Failed questions</dt><dd>2</dd></div>' in stage
    assert "2 questions of the operator, which failed: fanfold failures" in stage


def test_a_pipeline_that_has_not_ended_has_a_page(shell: Shell) -> None:
    stages = [
        {"name": "first", "map": {"prompt": "Say {text}"}},
        {"name": "sum", "reduce": {"op": "summarize", "prompt": "Sum", "text": "{first}"}},
    ]
    budget = {"requests": 4, "reserve_for_reduce": {}}
    shell.write(task=None, reduce=None, stages=stages, budget=budget)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 4
    assert shell("report", "run").code == 0
    text = (shell.folder / "run" / "report.html").read_text()
    assert "1 <small>of 2</small>" in text
    assert "fanfold resume run --budget-requests N" in text
    assert re.findall(r'href="(stages/[^"]+)"', text) == ["stages/first/report.html"]
