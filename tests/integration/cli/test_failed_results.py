"""Results of operators that fail: summaries without an answer, documents without a part."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration

REFUSED = {"simulated": {"nodes": 1, "time_scale": 50, "faults": [{"kind": "refusal"}]}}
SOME_REFUSED = {
    "simulated": {
        "nodes": 1,
        "time_scale": 50,
        "faults": [{"kind": "refusal", "draw": "item", "p": 0.5}],
    }
}
GOOD = {"simulated": {"nodes": 1, "time_scale": 50}}


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_summary_whose_questions_all_failed_has_failed(shell: Shell) -> None:
    (shell.folder / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"i{n}", "t": "x", "k": n % 2}) + "\n" for n in range(4))
    )
    summarize = {"op": "summarize", "prompt": "Sum", "text": "{t}", "group_by": "k"}
    ask = {"prompt": "About {s}?", "schema": SCHEMA}
    shell.write(
        input={"path": "in.jsonl", "id": "id"},
        endpoints=REFUSED,
        task=None,
        reduce=None,
        stages=[{"name": "s", "reduce": summarize}, {"name": "next", "map": ask}],
    )
    said = shell("run", "c.yaml", "--out", "r")
    assert said.code == 2
    assert "no result of stage 's' is passed on: 2 failed" in said.err
    status = json.loads(shell("status", "r", "--json").out)
    (stage, _) = status["stages"]
    assert (stage["results"], stage["failed"]) == (0, 2)
    assert stage["report"]["lost_groups"] == 2
    failures = shell("failures", "r").out
    assert "2 x RefusedAnswerError" in failures
    assert "its question failed; leaf 1: " in failures
    assert "0: failed: its question failed" in shell("status", "r").out
    again = f"fanfold run {shlex.quote('r/run.yaml')} --from r --out r-2 --ask-again failed"
    assert json.loads(shell("status", "r", "--json").out)["next_command"] == again
    assert shell("report", "r", "--stage", "s").code == 0
    page = (shell.folder / "r" / "stages" / "s" / "report.html").read_text()
    assert "2 items failed and have no answer" in page
    assert "its question failed; leaf 1" in page


def test_a_stage_without_items_needs_another_where(shell: Shell) -> None:
    (shell.folder / "in.jsonl").write_text('{"id": "a", "t": "x"}\n')
    stages = [
        {"name": "s", "map": {"prompt": "{t}", "schema": SCHEMA}},
        {"name": "none", "where": "output.score > 2", "map": {"prompt": "{s.score}"}},
    ]
    given = {"path": "in.jsonl", "id": "id"}
    shell.write(input=given, endpoints=GOOD, task=None, reduce=None, stages=stages)
    assert shell("run", "c.yaml", "--out", "r").code == 2
    command = "fanfold resume r --set stages.1.where=CONDITION"
    assert json.loads(shell("status", "r", "--json").out)["next_command"] == command
    assert f"continue with: {command}" in shell("status", "r").out
    assert shell("report", "r").code == 0
    assert command in (shell.folder / "r" / "report.html").read_text()
    given_where = command.replace("CONDITION", "'output.score > 0'").replace("fanfold ", "")
    assert shell(*shlex.split(given_where)).code == 0
    assert json.loads(shell("status", "r", "--json").out)["next_command"] is None


@pytest.mark.parametrize("merge", ["concat", "summarize"])
def test_a_document_whose_parts_all_failed_is_named(shell: Shell, merge: str) -> None:
    rows = [{"id": f"d{n}", "title": f"T{n}", "text": f"Only word {n}."} for n in range(12)]
    (shell.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shell.write(
        input={"path": "in.jsonl", "id": "id", "split": {"tokens": 100, "overlap": 0}},
        endpoints=SOME_REFUSED,
        task=None,
        reduce=None,
        stages=[
            {"name": "read", "map": {"prompt": "{text}", "schema": SCHEMA}},
            {
                "name": "documents",
                "endpoints": GOOD,
                "reduce": {"op": "merge", "field": "read"}
                if merge == "concat"
                else {"op": "summarize", "prompt": "Sum", "group_by": "part.document"},
            },
        ],
    )
    said = shell("run", "c.yaml", "--out", "r")
    parts = read_lines(shell("results", "r", "--stage", "read").out)
    lost = [row["id"].removesuffix("/p1") for row in parts if row["status"] == "failed"]
    assert 0 < len(lost) < len(rows)
    assert f"{len(lost)} documents have no part left, because parts failed: {lost[0]}" in said.err
    assert [row["input_id"] + "/p1" for row in parts] == [row["id"] for row in parts]
    results = {row["id"]: row for row in read_lines(shell("results", "r").out)}
    assert results.keys() == {row["id"] for row in rows}
    for name, row in results.items():
        assert row["status"] == ("failed" if name in lost else "done")
        assert row["parts"]["of"] == 1
        if merge == "concat":
            assert row["title"] == f"T{name[1:]}"
        assert "input_id" not in row  # it would repeat the id
    listed = shell("failures", "r", "--stage", "documents", "--class", "RefusedAnswerError")
    assert listed.out.split() == lost
    assert f"its only part failed; {lost[0]}/p1" in shell("failures", "r").out
    found = json.loads(shell("status", "r", "--json").out)["stages"][1]
    assert (found["results"], found["failed"]) == (len(rows) - len(lost), len(lost))
    assert shell("report", "r").code == 0
    page = (shell.folder / "r" / "stages" / "documents" / "report.html").read_text()
    assert f"{len(lost)} items failed and have no answer" in page
    assert f"its only part failed; {lost[0]}/p1" in page
