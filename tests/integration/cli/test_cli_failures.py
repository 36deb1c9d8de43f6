"""``fanfold failures``, and what ``status`` says about failures and how to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fanfold.tests.support.command_server import BlockingProcess, Command, started

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration

FAULTS = [
    {"kind": "refusal", "p": 0.3, "draw": "item"},
    {"kind": "bad_schema", "p": 0.4, "draw": "item"},
]


def faulty(**changes: Any) -> dict[str, Any]:
    return {"simulated": {"nodes": 1, "time_scale": 50, "faults": FAULTS} | changes}


def write_rows(shell: Shell, count: int) -> None:
    rows = "".join(f"row-{n},text {n}\n" for n in range(count))
    (shell.folder / "in.csv").write_text("id,text\n" + rows)


def test_classes_remedies_and_examples(shell: Shell) -> None:
    write_rows(shell, 40)
    task = {"prompt": "Say {text}", "system": "Be brief", "schema": SCHEMA}
    shell.write(endpoints=faulty(), task=task)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3

    found = json.loads(shell("failures", "run", "--json").out)
    classes = {row["class"]: row for row in found["classes"]}
    assert classes.keys() == {"RefusedAnswerError", "InvalidAnswerError"}
    counts = [row["count"] for row in found["classes"]]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == found["failed"]
    assert (found["simulated"], found["running"], found["items"]) == (True, False, 40)
    invalid = classes["InvalidAnswerError"]["example"]
    number = invalid["id"].removeprefix("row-")
    assert invalid["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": f"Say text {number}"},
    ]
    assert invalid["requests"] == 1 + invalid["repairs"] > 1
    assert "schema" in invalid["error"]
    assert json.loads(invalid["response"]) == {}

    shell.patch.setenv("COLUMNS", "60")
    text = shell("failures", "run").out
    assert text.startswith("SIMULATED: ")
    for row in found["classes"]:
        assert f"{row['count']} x {row['class']}" in text
    assert f"  example: item {invalid['id']}" in text
    assert f"    Say text {number}\n" in text
    command = "fanfold run run/run.yaml --from run --out run-2 --ask-again failed"
    assert text.splitlines()[-1].endswith(f"extend the run: {command}")
    assert all(len(line) <= 60 for line in text.splitlines()[:-1])
    assert all(line == line.rstrip() for line in text.splitlines())

    ids = shell("failures", "run", "--class", "InvalidAnswerError").out.splitlines()
    assert ids[0] == invalid["id"]
    assert len(ids) == classes["InvalidAnswerError"]["count"]
    listed = shell("failures", "run", "--class", "InvalidAnswerError", "--json").out
    assert json.loads(listed)["ids"] == ids

    said = shell("failures", "run", "--class", "Invalid")
    assert said.code == 2
    assert "RefusedAnswerError" in said.err

    extended = shell(*command.split()[1:], "--set", "task.repairs=2", "--yes", "--quiet")
    assert f"asked: {sum(counts)} " in extended.err
    again = shell("failures", "run").out
    assert "--out run-3" in again  # run-2 exists now


def test_status_names_the_classes_and_the_next_command(shell: Shell) -> None:
    write_rows(shell, 40)
    faults = [*FAULTS, {"kind": "empty_content", "p": 0.3, "draw": "item"}]
    shell.write(endpoints=faulty(faults=faults))
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    facts = json.loads(shell("status", "run", "--json").out)
    classes = json.loads(shell("failures", "run", "--json").out)["classes"]
    assert facts["failed_by_class"] == {row["class"]: row["count"] for row in classes}
    assert facts["next_command"] == "fanfold resume run --retry-failed"
    retry, longer = "fanfold resume run --retry-failed", facts["next_by_class"]
    assert longer.keys() == facts["failed_by_class"].keys()
    assert longer["EmptyAnswerError"] == retry
    assert longer["RefusedAnswerError"] is None
    text = shell("status", "run").out
    assert "failures with examples: fanfold failures run\n" in text
    assert f"failed items (helps EmptyAnswerError) with: {retry}" in " ".join(text.split())
    assert all(row["class"] in text for row in classes)


def test_a_run_without_failures(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    facts = json.loads(shell("status", "run", "--json").out)
    assert (facts["failed_by_class"], facts["next_command"]) == ({}, None)
    assert "0 failed of 3 items" in shell("failures", "run").out
    said = shell("failures", "run", "--class", "EndpointError")
    assert said.code == 2
    assert "none: no item has failed" in said.err
    assert "continue with" not in shell("status", "run").out


def test_an_exhausted_budget_continues_with_a_higher_limit(shell: Shell) -> None:
    write_rows(shell, 40)
    shell.write()
    assert shell("run", "c.yaml", "--out", "run", "--quiet", "--budget-requests", "10").code == 4
    facts = json.loads(shell("status", "run", "--json").out)
    assert facts["next_command"] == "fanfold resume run --budget-requests N"
    assert "continue with: fanfold resume run --budget-requests N" in shell("status", "run").out


def test_a_retry_that_fails_for_good_is_not_advised(shell: Shell) -> None:
    shell.write(endpoints=faulty(faults=[{"kind": "refusal"}]))
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    assert json.loads(shell("status", "run", "--json").out)["next_command"] is None
    text = shell("status", "run").out
    assert "extend the run: fanfold run run/run.yaml --from run" in text
    assert "--retry-failed" not in text
    text = shell("failures", "run").out
    assert "RefusedAnswerError: " in text
    assert "extend the run: fanfold run run/run.yaml --from run" in text
    assert "--retry-failed" not in text


def test_an_item_without_a_request_shows_its_row(shell: Shell) -> None:
    body = {"model": "simulated-8b", "messages": [{"role": "user", "content": "hello"}]}
    line = {"method": "POST", "body": body}
    lines = [
        line | {"custom_id": "a", "url": "/v1/chat/completions"},
        line | {"custom_id": "b", "url": "/v1/audio/speech"},
    ]
    (shell.folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    said = shell("batch", "in.jsonl", "out.jsonl", "--endpoints", "simulated", "--quiet")
    assert said.code == 3, said.err
    (row,) = json.loads(shell("failures", "out.jsonl.fanfold", "--json").out)["classes"]
    assert row["class"] == "InvalidItemError"
    example = row["example"]
    assert (example["id"], example["messages"], example["response"]) == ("b", None, None)
    assert example["row"]["url"] == "/v1/audio/speech"
    text = shell("failures", "out.jsonl.fanfold").out
    assert "/v1/audio/speech" in text
    assert "response: none was recorded" in text


def test_a_long_request_is_shortened_with_its_length(shell: Shell) -> None:
    (shell.folder / "in.csv").write_text(f"id,text\n1,{'word ' * 2000}\n")
    shell.write(endpoints=faulty(faults=[{"kind": "refusal"}]))
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    text = " ".join(shell("failures", "run").out.split())
    assert "… (10,003 characters; --json shows more)" in text or "… (10,004 characters" in text
    assert len(text) < 3_000
    (row,) = json.loads(shell("failures", "run", "--json").out)["classes"]
    assert len(row["example"]["messages"][-1]["content"]) > 10_000


def test_it_works_while_a_run_is_going_on_and_after_a_kill(shell: Shell) -> None:
    write_rows(shell, 5_000)
    shell.write(endpoints=faulty(time_scale=1), limits={"streams": 8})
    with started(Command(("run", "c.yaml", "--out", "run", "--quiet"))) as run:
        found = wait_for_failures(shell, run)
        assert found["running"]
        assert all(row["example"]["id"] for row in found["classes"])
        facts = json.loads(shell("status", "run", "--json").out)
        assert (facts["state"], facts["next_command"]) == ("running", None)
        text = shell("failures", "run").out
        assert "not finished" in text
    facts = json.loads(shell("status", "run", "--json").out)
    assert facts["state"] == "killed; resumable"
    assert facts["next_command"] == "fanfold resume run"


def wait_for_failures(shell: Shell, run: BlockingProcess) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        if not (shell.folder / "run" / "provenance.json").exists():
            return None
        found: dict[str, Any] = json.loads(shell("failures", "run", "--json").out)
        return found if found["failed"] else None

    return run.wait_until(find)


def test_a_folder_with_a_blank_is_quoted(shell: Shell) -> None:
    shell.write(endpoints=faulty(faults=[{"kind": "empty_content"}]))
    assert shell("run", "c.yaml", "--out", "my run", "--quiet").code == 3
    assert "fanfold resume 'my run' --retry-failed" in shell("failures", "my run").out


def test_a_folder_that_is_no_run(shell: Shell, tmp_path: Path) -> None:
    said = shell("failures", str(tmp_path))
    assert said.code == 2
    assert "not a run folder" in said.err
