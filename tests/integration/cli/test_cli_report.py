"""``fanfold report`` at the command line."""

from __future__ import annotations

import re

import pytest

from .conftest import Shell

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
