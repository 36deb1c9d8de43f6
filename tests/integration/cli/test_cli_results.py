"""``fanfold results``: the input's columns, prompts and texts of answers, in all formats."""

from __future__ import annotations

import csv
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration


def lines(shell: Shell, *arguments: str) -> list[dict[str, Any]]:
    said = shell("results", "r", *arguments)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_the_input_is_beside_the_answer_in_all_formats(shell: Shell) -> None:
    table = pa.table(
        {
            "name": ["a", "b", "c"],
            "day": [date(2020, 1, n) for n in (1, 2, 3)],
            "n": pa.array([1, None, 3], pa.int8()),
            "tags": [["x"], [], None],
            "model": ["m1", "m2", "m3"],
        }
    )
    pq.write_table(table, "in.parquet")
    shell.write(
        input={"path": "in.parquet", "id": "name"},
        task={"prompt": "Say {day}", "schema": SCHEMA},
    )
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    found = pq.read_table("r/results.parquet")
    assert found.column_names[:8] == [
        *("id", "status", "name", "day", "n", "tags", "input_model", "output")
    ]
    for name in ("name", "day", "n", "tags"):
        assert found.column(name).combine_chunks().equals(table.column(name).combine_chunks())
    assert found.column("input_model").to_pylist() == ["m1", "m2", "m3"]
    assert shell("results", "r", "-o", "again.parquet").code == 0
    assert pq.read_table("again.parquet").equals(found)

    rows = lines(shell)
    assert [row["day"] for row in rows] == ["2020-01-01", "2020-01-02", "2020-01-03"]
    assert [row["tags"] for row in rows] == [["x"], [], None]
    text = shell("results", "r", "--format", "csv").out
    cells = list(csv.DictReader(io.StringIO(text)))
    assert [row["n"] for row in cells] == ["1", "", "3"]
    assert [row["output.score"] for row in cells] == [str(r["output"]["score"]) for r in rows]


def test_failures_have_the_input_too(shell: Shell) -> None:
    Path("in.csv").write_text("id,smiles,status\na,C,new\nb,not a molecule,old\n")
    shell.write(
        input={"path": "in.csv", "id": "id", "smiles": "smiles"},
        task={"prompt": "Say {smiles}", "schema": SCHEMA},
    )
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 3
    (failed,) = [json.loads(line) for line in Path("r/failures.jsonl").read_text().splitlines()]
    assert list(failed)[:5] == ["id", "status", "smiles", "input_status", "output"]
    assert (failed["id"], failed["smiles"], failed["input_status"]) == (
        "b",
        "not a molecule",
        "old",
    )
    done, failed = lines(shell, "--prompt", "--raw")
    assert done["prompt"] == [{"role": "user", "content": "Say C"}]
    assert done["raw"] is None
    assert failed["prompt"] is None


def test_prompts_and_texts_of_answers(shell: Shell) -> None:
    shell.patch.setenv("TONE", "briefly")
    shell.write(
        keep={"raw": "all"},
        task={"system": "Answer ${TONE}.", "prompt": "Say {text}", "schema": SCHEMA},
    )
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    rows = lines(shell, "--prompt", "--raw")
    assert rows[1]["prompt"] == [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Say two"},
    ]
    assert [json.loads(row["raw"]) for row in rows] == [row["output"] for row in rows]
    assert not {"prompt", "raw"} & lines(shell)[0].keys()
    assert shell("results", "r", "-o", "x.parquet", "--prompt", "--raw").code == 0
    table = pq.read_table("x.parquet")
    assert table.column("prompt").to_pylist() == [row["prompt"] for row in rows]
    assert table.column("raw").to_pylist() == [row["raw"] for row in rows]
    cells = list(csv.DictReader(io.StringIO(shell("results", "r", "--format=csv", "--raw").out)))
    assert cells[0]["raw"] == rows[0]["raw"]

    shell.patch.delenv("TONE")
    assert lines(shell) == [
        {k: v for k, v in row.items() if k not in {"prompt", "raw"}} for row in rows
    ]
    said = shell("results", "r", "--prompt")
    assert said.code == 2
    assert "task.system: the environment variable TONE is not set; export TONE=" in said.err


def test_the_system_text_as_the_model_got_it(shell: Shell) -> None:
    shell.write(model={"system_role": "user"}, task={"system": "Be brief.", "prompt": "Say {text}"})
    shell.write(
        model={"system_role": "user"},
        task={"system": "Be brief.", "prompt": "Say {text}", "schema": SCHEMA},
    )
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    first, *_ = lines(shell, "--prompt")
    assert first["prompt"] == [{"role": "user", "content": "Be brief.\n\nSay one"}]


def test_a_folder_of_texts(shell: Shell) -> None:
    Path("texts").mkdir()
    for name in "ab":
        Path("texts", f"{name}.txt").write_text(f"The text of {name}.\n" * 3)
    shell.write(input={"path": "texts"})
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    table = pq.read_table("r/results.parquet", columns=["id", "file", "text"])
    assert table.to_pylist()[1] == {
        "id": "b.txt",
        "file": "b.txt",
        "text": "\n".join(["The text of b."] * 3),
    }


def test_the_messages_of_a_batch_file(shell: Shell) -> None:
    parts = [{"type": "text", "text": "Say two"}]
    requests = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": content}]},
        }
        for n, content in enumerate(["Say one", parts])
    ]
    Path("in.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in requests))
    shell.write(input={"path": "in.jsonl", "format": "openai_batch"}, task=None, reduce=None)
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    assert [row["prompt"][0]["content"] for row in lines(shell, "--prompt")] == ["Say one", parts]
    assert shell("results", "r", "-o", "x.parquet", "--prompt").code == 0
    table = pq.read_table("x.parquet")
    prompts: list[Any] = table.column("prompt").to_pylist()
    assert [prompt[0]["content"] for prompt in prompts] == [
        "Say one",
        json.dumps(parts, separators=(",", ":")),
    ]
    assert table.column("custom_id").to_pylist() == ["r0", "r1"]
