"""``fanfold show``: rows of the results with selected columns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration


def rows(shell: Shell, *options: str) -> list[dict[str, Any]]:
    said = shell("show", "run", "--json", *options)
    assert said.code == 0, said.err
    found: list[dict[str, Any]] = json.loads(said.out)["rows"]
    return found


@pytest.fixture
def finished(shell: Shell) -> Shell:
    """A run of four items; the input has a column that the answer has too."""
    lines = "".join(f"item-{n},text {n},mine {n},{n}.5\n" for n in range(4))
    (shell.folder / "in.csv").write_text("id,text,label,with.dot\n" + lines)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    return shell


def test_answer_and_input_of_the_first_rows(finished: Shell) -> None:
    first, *more = rows(finished, "--limit", "3")
    assert list(first) == ["id", "status", "output.label", "score", "text", "label", "with.dot"]
    assert (first["id"], first["status"], first["text"]) == ("item-0", "done", "text 0")
    assert first["label"] == "mine 0"
    assert 0 <= first["score"] <= 1
    assert [row["id"] for row in more] == ["item-1", "item-2"]
    said = finished("show", "run", "--limit", "3")
    assert "item-2" in said.out
    assert "item-3" not in said.out
    assert "the first 3 rows" in said.err
    assert "SIMULATED" in said.err
    assert "the first" not in finished("show", "run").err


def test_selected_columns(finished: Shell) -> None:
    names = "output.score,score,output,input.text,with.dot,input.with.dot,attempts,prompt"
    (row, *_) = rows(finished, "--columns", names)
    assert list(row) == ["id", *names.split(",")]
    assert row["output.score"] == row["score"] == row["output"]["score"]
    assert row["with.dot"] == row["input.with.dot"]
    assert row["attempts"] == 1
    assert row["prompt"] == [{"role": "user", "content": "Say text 0"}]
    table = finished("show", "run", "--columns", "text , score").out
    assert table.splitlines()[1].split() == ["┃", "id", "┃", "text", "┃", "score", "┃"]
    assert all("…" not in line for line in table.splitlines())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("scores", "did you mean 'score'?"),
        ("input.nothing", "there are id, status, output"),
        ("output.nothing", "output.score"),
        ("", "there are"),
    ],
)
def test_unknown_columns_are_refused(finished: Shell, name: str, hint: str) -> None:
    said = finished("show", "run", "--columns", f"score,{name}")
    assert said.code == 2
    assert f"--columns: no column {name!r}" in said.err
    assert hint in said.err


def test_failed_items(shell: Shell) -> None:
    faults = [{"kind": "refusal", "draw": "item"}]
    shell.write(
        endpoints={"simulated": {"nodes": 1, "time_scale": 50, "faults": faults}},
        task={"prompt": "Say {text}", "schema": SCHEMA},
    )
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 3
    found = rows(shell, "--failed")
    assert [row["id"] for row in found] == ["1", "2", "3"]
    assert {row["error_class"] for row in found} == {"RefusedAnswerError"}


def test_sorted_rows(shell: Shell) -> None:
    """By a field of the answer or the input, from either end; what is missing comes last."""
    lines = "".join(f"{n},r{n},text {n},{n * 7 % 5 if n else ''}\n" for n in range(6))
    (shell.folder / "in.csv").write_text(",id,text,weight\n" + lines)
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    scores = [row["score"] for row in rows(shell)]
    by_score = rows(shell, "--sort", "output.score")
    assert [row["output.score"] for row in by_score] == sorted(scores)
    best = rows(shell, "--sort", "-output.score", "--limit", "2")
    assert [row["output.score"] for row in best] == sorted(scores, reverse=True)[:2]
    by_weight = [row["id"] for row in rows(shell, "--sort", "weight")]
    assert by_weight == ["r5", "r3", "r1", "r4", "r2", "r0"]
    assert [row["id"] for row in rows(shell, "--sort", "-weight")] == [*by_weight[-2::-1], "r0"]
    table = shell("show", "run", "--sort", "-weight").out
    assert "weight" in table
    assert "unnamed_0" not in table  # the name that the reader gave to the first column
    assert str(rows(shell)[1]["unnamed_0"]) == "1"
    said = shell("show", "run", "--sort", "wieght")
    assert (said.code, "--sort: no column 'wieght'" in said.err) == (2, True)
    assert "did you mean 'weight'" in said.err


def test_columns_that_repeat_the_ids_take_no_room(shell: Shell) -> None:
    (shell.folder / "in.csv").write_text("id,key,text\n1,1,one\n2,2,two\n3,3,three\n")
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    heads = shell("show", "run").out.splitlines()[1].split()
    assert "text" in heads
    assert "key" not in heads
    assert "key" in shell("show", "run", "--columns", "key").out


def test_free_text(shell: Shell) -> None:
    shell.write(task={"prompt": "Say {text}"}, reduce=[])
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    (row, *_) = rows(shell)
    assert isinstance(row["output"], str)
    said = shell("show", "run", "--columns", "score")
    assert said.code == 2
