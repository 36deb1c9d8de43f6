"""Runs from the command line: output, files, resume and exit codes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold.configs.loader import load_config
from fanfold.graphs.run.fingerprint import compute_fingerprint

from .conftest import Served, Shell

pytestmark = pytest.mark.integration

KEY = "s3cr3t-of-the-user"
OTHER_KEY = "sk-openai-of-the-user"


def journal(folder: Path) -> list[dict[str, Any]]:
    lines = [
        line for file in folder.glob("journal/*.jsonl") for line in file.read_text().splitlines()
    ]
    return [record for line in lines if "status" in (record := json.loads(line))]


def test_everything_says_simulated(shell: Shell) -> None:
    said = shell("run", "c.yaml", "--out", "r", "--json")
    assert said.code == 0, said.err
    final = json.loads(said.out)
    assert {"run", "items", "done", "failed", "requests", "tokens", "seconds"} <= final.keys()
    assert (final["items"], final["done"], final["failed"], final["requests"]) == (3, 3, 0, 3)
    assert set(final["tokens"]) == {
        "prompt",
        "cached",
        "completion",
        "lost",
        "useful",
        "wasted",
    }
    assert final["aggregate"][0]["op"] == "top_k"
    folder = shell.folder / "r"
    for name in ("aggregate.json", "provenance.json"):
        assert json.loads((folder / name).read_text())["simulated"] is True
    assert len(journal(folder)) == 3
    assert all(record["simulated"] is True for record in journal(folder))
    assert final["simulated"] is True

    rows = [json.loads(line) for line in shell("results", "r").out.splitlines()]
    assert [(row["id"], row["simulated"]) for row in rows] == [(n, True) for n in "123"]
    table = list(csv.DictReader(io.StringIO(shell("results", "r", "--format", "csv").out)))
    assert [(row["id"], row["simulated"]) for row in table] == [(n, "true") for n in "123"]
    said = shell("results", "r", "--format", "parquet", "-o", "x.parquet")
    assert (said.code, said.out) == (0, "")
    assert said.err == "x.parquet: 3 of 3 items as parquet\n"
    for file in ("x.parquet", "r/results.parquet"):
        assert pq.read_table(file).column("simulated").to_pylist() == [True] * 3

    status = json.loads(shell("status", "r", "--json").out)
    assert status["simulated"] is True
    assert status["aggregate"] == json.loads(Path("r/aggregate.json").read_text())["aggregate"]
    assert "simulated │ true" in shell("status", "r").out
    said = shell("resume", "r")
    assert said.out.splitlines()[0] == "top_k of score   simulated: true"
    assert "SIMULATED: 3 done" in said.err


def test_urls_of_a_simulated_fleet_are_found_out(
    shell: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    shell.patch.setenv("THE_KEY", KEY)
    shell.patch.setenv("OPENAI_API_KEY", OTHER_KEY)
    shell.patch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    shell.patch.setenv("PLACE", fleet.urls[0])
    shell.write(endpoints={"urls": ["${PLACE}", fleet.urls[1]], "api_key": "${THE_KEY}"})
    said = shell("-v", "run", "c.yaml", "--out", "r")
    assert said.code == 0, said.err
    assert "simulated: true" in said.out
    assert fleet.requests == 3
    assert {r["simulated"] for r in journal(shell.folder / "r")} == {True}
    text = (
        said.out
        + said.err
        + "".join(p.read_bytes().decode("latin-1") for p in Path("r").rglob("*") if p.is_file())
    )
    text += caplog.text
    assert KEY not in text
    assert OTHER_KEY not in text
    assert "api_key: ${THE_KEY}" in Path("r/run.yaml").read_text()
    assert "${PLACE}" in Path("r/run.yaml").read_text()

    shell.patch.delenv("THE_KEY")
    assert shell("results", "r").code == shell("status", "r").code == 0  # these need no key
    assert shell("resume", "r").code == 0  # nothing is left to do
    assert "THE_KEY" in shell("resume", "r", "--retry-failed").err

    check = shell(
        "check", "c.yaml", "--endpoints", ",".join(fleet.urls), "--set", "endpoints.api_key=k"
    )
    assert check.code == 0, check.err
    assert "connects to: 127.0.0.1 (endpoint)" in check.out
    assert check.out.count(": SIMULATED serves simulated-8b") == 2
    assert "Say one" in check.out
    assert "requests: 3 to 6" in check.out
    assert fleet.requests == 3


def test_check_hints_at_a_repeated_column_after_one_that_differs(shell: Shell) -> None:
    rows = ({"id": n, "text": f"text {n % 20} " * 30, "ask": f"{n}?"} for n in range(300))
    Path("asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "input": {"path": "asks.jsonl", "id": "id"},
        "task": {"prompt": "{ask} {text}"},
        "endpoints": {"simulated": {"nodes": 1}},
    }
    Path("asks.yaml").write_text(json.dumps(settings))
    checked = shell("check", "asks.yaml")
    assert checked.code == 0, checked.err
    assert "hint: task.prompt: {text} is repeated but comes after {ask}" in checked.out
    late = json.loads(shell("check", "asks.yaml", "--json").out)["late_repeat"]
    assert late["repeated"] == "{text}"
    settings["task"] = {"prompt": "{text} {ask}"}
    Path("asks.yaml").write_text(json.dumps(settings))
    assert "hint:" not in shell("check", "asks.yaml").out


def test_a_key_written_out_is_not_kept(shell: Shell) -> None:
    said = shell("run", "c.yaml", "--out", "r", "--quiet", "--set", f"endpoints.api_key={KEY}")
    assert said.code == 0
    assert not [p for p in Path("r").rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert "api_key: '**********'" in Path("r/run.yaml").read_text()


def test_what_a_resume_may_change(shell: Shell, fleet: Served) -> None:
    urls = ",".join(fleet.urls)
    first = json.loads(shell("run", "c.yaml", "--out", "r", "--json", "--endpoints", urls).out)
    assert fleet.requests == 3
    (shell.folder / "same.csv").write_text((shell.folder / "in.csv").read_text())
    for change in (
        [],
        ["--set", "limits.streams=7"],
        ["--endpoints", fleet.urls[0]],
        ["--set", "model.name=simulated-8b"],
        ["--input", "same.csv"],
    ):
        again = shell("resume", "r", "--json", *change)
        assert again.code == 0, again.err
        assert json.loads(again.out)["aggregate"] == first["aggregate"]
    assert "streams: 7" in Path("r/run.yaml").read_text()
    new = shell("resume", "r", "--json", "--set", "reduce=[{op: count}]")
    assert json.loads(new.out)["aggregate"] == [
        {"op": "count", "done": 3, "failed": 0, "failed_by_class": {}}
    ]
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    assert shell("run", "r/run.yaml", "--out", "r2", "--quiet").code == 0
    assert fleet.requests == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "task.prompt='X {text}'"], ['task.prompt: "Say {text}" → "X {text}"']),
        (["--set", "model.temperature=1"], ["model.temperature: 0.0 → 1.0"]),
        (["--set", "model.name=other"], ['model.name: "simulated-8b" → "other"']),
        (["--limit", "2"], ["input.limit: null → 2"]),
        (["--input", "other.csv"], ["input: the content of", "other.csv"]),
        (["--input", "none.csv"], ["none.csv does not exist"]),
        (["--set", "reduce=[{op: top_k, field: score, show: [nope]}]"], ["no column 'nope'"]),
        (["--set", "limits.stream=1"], ["'limits.stream'"]),
    ],
    ids=" ".join,
)
def test_what_a_resume_may_not_change(
    finished: Shell, options: list[str], words: list[str]
) -> None:
    (finished.folder / "other.csv").write_text("id,text\n1,one\n2,two\n3,tree\n")
    before = finished.files()
    said = finished("resume", "r", *options)
    assert said.code == 2
    assert not [word for word in words if word not in said.err], said.err
    assert finished.files() == before


@pytest.fixture
def finished(shell: Shell) -> Shell:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    return shell


def test_a_changed_input_is_another_run(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    (shell.folder / "in.csv").write_text("id,text\n1,one\n2,two\n3,tree\n")
    assert "input: the content of" in shell("resume", "r").err
    (shell.folder / "in.csv").unlink()
    assert shell("resume", "r", "--quiet").code == 0  # the run folder holds a copy


def test_real_and_simulated_never_mix(shell: Shell, fleet: Served) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet", "--endpoints", fleet.urls[0]).code == 0
    provenance = Path("r/provenance.json")
    about = json.loads(provenance.read_text()) | {"simulated": False}
    about["fingerprint"] = compute_fingerprint(
        load_config(Path("r/run.yaml")).config, about["model"], False
    )
    provenance.write_text(json.dumps(about))  # as if the servers had been real ones
    before = shell.files()
    for endpoints in ("simulated", fleet.urls[1]):
        said = shell("resume", "r", "--endpoints", endpoints)
        assert said.code == 2
        assert "real → simulated" in said.err
    assert shell.files() == before


def test_failed_items_end_with_3_until_they_are_asked_again(shell: Shell) -> None:
    faults = "endpoints.simulated.faults=[{kind: refusal, max_count: 1}]"
    said = shell("run", "c.yaml", "--out", "r", "--json", "--set", faults)
    assert said.code == 3, said.err
    final = json.loads(said.out)
    assert (final["done"], final["failed"], final["exit_code"]) == (2, 1, 3)
    (failed,) = [json.loads(line) for line in Path("r/failures.jsonl").read_text().splitlines()]
    assert failed["error_class"] == "RefusedAnswerError"
    assert "refused" in failed["error"]
    again = shell("resume", "r", "--json")
    assert (again.code, json.loads(again.out)["requests"]) == (3, 3)
    said = shell(
        "resume", "r", "--retry-failed", "--json", "--set", "endpoints.simulated.faults=[]"
    )
    assert said.code == 0, said.err
    final = json.loads(said.out)
    assert (final["done"], final["failed"], final["requests"]) == (3, 0, 4)
    assert Path("r/failures.jsonl").read_text() == ""


def test_endpoints_that_do_not_serve_are_named(
    shell: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    urls = f"{fleet.urls[0]},http://127.0.0.1:9/v1"
    said = shell("run", "c.yaml", "--out", "r", "--quiet", "--endpoints", urls)
    assert said.code == 0, said.err
    assert "endpoint 127.0.0.1:9 does not answer yet" in caplog.text
    assert "http://127.0.0.1:9/v1" in Path("r/run.yaml").read_text()


def test_streams_of_a_preset(shell: Shell) -> None:
    fast = ["--limit", "4", "--set", "endpoints.simulated.time_scale=50"]
    said = shell("run", "data_annotation", "--out", "r", *fast)
    assert said.code == 0
    assert said.err.splitlines()[0].startswith("preset data_annotation: SIMULATED FLEET")
    assert all(len(line) <= 80 for line in said.out.splitlines())
    assert said.out.count("simulated: true") == 5
    quiet = shell("run", "data_annotation", "--out", "q", "--quiet", *fast)
    assert quiet.out == ""
    # the preset's notice, the count, the evaluation, the place
    assert len(quiet.err.splitlines()) == 4


def test_endpoints_beside_a_file_without_any(shell: Shell) -> None:
    shell.write(endpoints=None)
    said = shell("run", "c.yaml", "--endpoints", "simulated", "--out", "r", "--quiet")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("target", "options", "form"),
    [
        ("x.csv", [], "csv"),
        ("X.CSV", [], "csv"),
        ("x.jsonl", [], "jsonl"),
        ("x.ndjson", [], "jsonl"),
        ("x.parquet", [], "parquet"),
        ("x.txt", ["--format", "csv"], "csv"),
        ("x.out", ["--format", "parquet"], "parquet"),
    ],
)
def test_the_suffix_decides_the_format_of_results(
    target: str, options: list[str], form: str, finished: Shell
) -> None:
    said = finished("results", "r", "-o", target, *options)
    assert (said.code, said.out) == (0, "")
    assert f"{target}: " in said.err
    assert f" as {form}" in said.err
    start = (finished.folder / target).read_bytes()[:4]
    assert start == {"csv": b"id,s", "jsonl": b'{"id', "parquet": b"PAR1"}[form]


def test_where_results_cannot_go(finished: Shell) -> None:
    for target, words in (("nodir/x", "folder nodir does not exist"), ("r", "is a folder")):
        for form in ("jsonl", "parquet"):
            said = finished("results", "r", "--format", form, "-o", target)
            assert said.code == 2
            assert words in said.err


def test_the_command_is_kept_without_secrets(shell: Shell) -> None:
    shell(
        "run",
        "c.yaml",
        "--out",
        "r",
        "--quiet",
        "--set",
        f"endpoints.api_key={KEY}",
        "--limit",
        "1",
    )
    (life,) = json.loads(Path("r/provenance.json").read_text())["sessions"]
    assert life["command"][:2] == ["fanfold", "run"]
    assert "endpoints.api_key=**********" in life["command"]


def test_a_reader_that_leaves_early(finished: Shell) -> None:
    """A fresh process writes into a pipe whose reader is gone, as with ``| head``."""
    for command in ("results r", "presets show data_annotation"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m fanfold {command} | true"],
            capture_output=True,
            cwd=finished.folder,
            check=True,
        )
        assert done.stderr == b""


def test_reused_answers_are_told(shell: Shell) -> None:
    (shell.folder / "in.csv").write_text("id,text\n1,one\n2,two\n3,one\n4,one\n")
    shell.write(cache="answers")
    checked = shell("check", "c.yaml")
    assert "equal requests are paid once" in checked.out
    assert not (shell.folder / "answers").exists()
    first = shell("run", "c.yaml", "--out", "a")
    assert first.code == 0, first.err
    assert "2 requests, 2 answers reused, " in first.err
    second = shell("run", "c.yaml", "--out", "b", "--json")
    assert second.code == 0, second.err
    final = json.loads(second.out)
    assert (final["requests"], final["reused"]) == (0, 4)
    assert set(final["tokens"].values()) == {0}
    assert (shell.folder / "answers" / "simulated-v1").is_dir()
    assert json.loads(shell("status", "b", "--json").out)["reused"] == 4
    rows = [json.loads(line) for line in shell("results", "b").out.splitlines()]
    assert [(row["reused"], row["attempts"], row["endpoint"]) for row in rows] == [(1, 0, None)] * 4
    shell.write()
    plain = shell("run", "c.yaml", "--out", "c")
    assert "answers reused" not in plain.err
    assert "4 requests" in plain.err


def test_a_secret_of_the_request_is_wanted_again(shell: Shell, fleet: Served) -> None:
    """The run folder does not keep it, and the model is not sent its mask."""
    urls = ",".join(fleet.urls)
    shell.write(model={"name": "simulated-8b", "extra_body": {"proxy": {"api_key": KEY}}})
    assert shell("run", "c.yaml", "--out", "r", "--endpoints", urls).code == 0
    assert not [p for p in Path("r").rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    said = shell("resume", "r", "--retry-failed")
    assert said.code == 2
    assert "model.extra_body.proxy.api_key: a run folder does not keep a secret" in said.err
    assert shell("resume", "r", "--set", f"model.extra_body.proxy.api_key={KEY}").code == 0
    assert shell("status", "r").code == shell("results", "r").code == 0
