"""The example of docs/stages.md, as its reader runs it, and what the commands show of it."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import pytest

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration

PAGE = (files("fanfold") / "docs" / "stages.md").read_text(encoding="utf-8")


def plain(shell: Shell, *arguments: str) -> dict[str, Any]:
    said = shell(*arguments, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_the_example_runs_and_every_command_shows_it(  # noqa: PLR0915 - of one run
    shell: Shell,
) -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    (shell.folder / "review.yaml").write_text(example)
    checked = shell("check", "review.yaml")
    assert checked.code == 0
    assert "stage summary (summarize), at most 12 items" in checked.out
    said = shell("run", "review.yaml", "--out", "review")
    assert said.code == 0
    example = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)[0]
    shown = re.findall(r"^stage .*tokens$", example, re.MULTILINE)
    assert len(shown) == 3
    for line in shown:
        assert line in said.err
    findings = re.findall(r"^stage screen   simulated.*?^$", PAGE, re.MULTILINE | re.DOTALL)
    printed = [line.rstrip() for line in said.out.splitlines()]
    expected = findings[0].splitlines()
    assert expected == printed[: len(expected)]
    assert "claims  SIMULATED  6/6" in said.err
    status = plain(shell, "status", "review")
    assert (status["items"], status["done"], status["failed"]) == (20, 20, 0)
    whole = shell("status", "review").out
    for part in ("histogram of topic", "biology: 4 items", "summary/1 (leaves)", "[A06, A11]"):
        assert part in whole
    only = shell("status", "review", "--stage", "summary").out
    assert "biology: 4 items" in only
    assert "histogram" not in only
    assert "histogram of topic" in shell("status", "review", "--stage", "screen").out
    watched = plain(shell, "watch", "review")
    assert (watched["stage"], watched["done"]) == ("summary/1 (leaves)", 2)
    assert plain(shell, "watch", "review", "--stage", "claims")["items"] == 6
    assert [one["state"] for one in status["stages"]] == ["finished"] * 3
    assert status["next_command"] is None
    cost = plain(shell, "cost", "review")
    assert cost["requests"] == sum(one["requests"] for one in cost["stage"]) == 20
    by_model = plain(shell, "cost", "review", "--by", "model")["model"]
    assert sum(one["requests"] for one in by_model) == 20
    rows = [json.loads(line) for line in shell("results", "review").out.splitlines()]
    assert {row["id"] for row in rows} == {"materials", "biology"}
    claims = shell("results", "review", "--stage", "claims").out.splitlines()
    assert [json.loads(line)["screen"]["score"] > 0.3 for line in claims] == [True] * 6
    leaves = shell("results", "review", "--stage", "summary/1").out.splitlines()
    assert [json.loads(line)["id"] for line in leaves] == ["leaf 1", "leaf 2"]
    assert plain(shell, "show", "review", "--stage", "screen", "--limit", "3")["rows"]
    (listed,) = plain(shell, "ls", "review")["runs"]
    assert (listed["items"], listed["done"], listed["state"]) == (12, 12, "finished")
    assert listed["model"] == "simulated-8b"
    about = json.loads((shell.folder / "review" / "provenance.json").read_text())
    for key in ("done", "failed", "failed_in_stages", "ended"):
        del about["sessions"][-1][key]  # as while it runs, or after a kill
    (shell.folder / "review" / "provenance.json").write_text(json.dumps(about | {"model": ""}))
    (again,) = plain(shell, "ls", "review")["runs"]
    assert again["model"] == "simulated-8b"
    assert [again[key] for key in ("done", "failed", "ended")] == [12, 0, 12]
    assert "no item failed" in shell("failures", "review").err
    assert shell("report", "review", "--stage", "summary", "-o", "summary.html").code == 0
    page = (shell.folder / "summary.html").read_text()
    for part in ("Summarize the claims.", "2 results of the operator summarize", "A06, A11"):
        assert part in page
    for part in ("<pre>{stages}", "Distribution of statements", "1 items", "failed items are not"):
        assert part not in page
    check_report_of_all_stages(shell)


def check_report_of_all_stages(shell: Shell) -> None:
    """One page lists the stages and what they have found, and has links to a page of each."""
    assert not list((shell.folder / "review").rglob("report.html"))
    assert shell("report", "review", "-o", "review.html").code == 0
    alone = (shell.folder / "review.html").read_text()
    assert not list((shell.folder / "review").rglob("report.html"))
    assert 'href="stages' not in alone
    said = shell("report", "review")
    assert said.err.startswith("Report: review/report.html (")
    page = (shell.folder / "review" / "report.html").read_text()
    for text in (alone, page):
        for part in ("SIMULATED", "6 not selected", "Distribution of topic", "A06, A11"):
            assert part in text
        assert "<script" not in text
    links = re.findall(r'href="(stages/[^"]+)"', page)
    assert links == [f"stages/{name}/report.html" for name in ("screen", "claims", "summary")]
    for link in links:
        assert 'id="table-data"' in (shell.folder / "review" / link).read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("results", "review", "--stage", "sumary"), "the stages of review are screen"),
        (("results", "review", "--stage", "summary/7"), "it has 1 level, e.g."),
        (("resume", "review/stages/screen"), "is stage 'screen' of a pipeline"),
        (("resume", "review", "--retry-failed"), "--retry-failed is for a single task"),
        (("cost", "review", "--by", "colour"), "stage"),
        (("compare", "review", "review"), "is a pipeline; give the folder of one of its stages"),
    ],
)
def test_mistakes_name_the_way_out(shell: Shell, arguments: tuple[str, ...], text: str) -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    (shell.folder / "review.yaml").write_text(example)
    assert shell("run", "review.yaml", "--out", "review", "--quiet").code == 0
    said = shell(*arguments)
    assert said.code == 2
    assert text in said.err


def test_a_column_that_no_stage_provides_is_named_before_any_call(shell: Shell) -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    (shell.folder / "review.yaml").write_text(example.replace("{screen.topic}?", "{topic}?"))
    said = shell("run", "review.yaml", "--out", "review")
    assert said.code == 2
    assert "did you mean 'screen.topic'" in said.err
    assert not (shell.folder / "review").exists()


def test_skipped_documents_are_named_before_the_first_call(shell: Shell) -> None:
    rows = [{"id": "P1", "text": "One sentence."}, {"id": "P2", "text": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (shell.folder / "papers.jsonl").write_text(lines)
    shell.write(
        input={"path": "papers.jsonl", "id": "id", "split": {"merge": "vote"}},
        task={"prompt": "Read {text}"},
        reduce=None,
    )
    assert "1 skipped" in shell("check", "c.yaml").out
    said = shell("run", "c.yaml", "--out", "run")
    assert said.code == 0
    assert "skipped 1: P2\n" in said.err


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        ({}, "output.score > 1", "3 do not fulfil where: output.score > 1"),
        ({"max_tokens": 1}, None, "3 failed (fanfold failures run --stage first)"),
    ],
)
def test_a_stage_without_items_says_what_became_of_the_results(
    shell: Shell, change: dict[str, Any], where: str | None, said: str
) -> None:
    rate = {"prompt": "Rate {text}", "schema": SCHEMA}
    first = {"name": "first", "map": rate, "model": change}
    second = {"name": "second", "map": {"prompt": "Say {first.score}"}, "where": where}
    shell.write(task=None, reduce=None, stages=[first, second])
    ended = shell("run", "c.yaml", "--out", "run", "--quiet")
    assert ended.code == 2
    assert f"no result of stage 'first' is passed on: {said}" in ended.err


@pytest.mark.parametrize("options", [("--limit", "2"), ()], ids=["another limit", "another row"])
def test_an_operator_that_reads_the_input_keeps_it(shell: Shell, options: tuple[str, ...]) -> None:
    stage = {"name": "unique", "reduce": {"op": "dedup", "text": "{text}"}}
    shell.write(task=None, reduce=None, stages=[stage])
    command = ("run", "c.yaml", "--out", "run", "--quiet")
    assert shell(*command).code == 0
    assert shell(*command).code == 0
    if not options:
        with (shell.folder / "in.csv").open("a") as file:
            file.write("4,four\n")
    refused = shell(*command, *options)
    assert refused.code == 2
    assert f"input{'.limit' if options else ': the content of'}" in refused.err
    assert len(shell("results", "run").out.splitlines()) == 3
