"""Tasks of the documentation: results as the next input, examples, several messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import fanfold
from fanfold.tests.unit.inputs.test_images import JPEG, make_png

from .conftest import Shell

pytestmark = pytest.mark.integration

ROOT = Path(fanfold.__file__).parent


def read_page_settings(name: str) -> dict[str, Any]:
    """Return the settings of a name that docs/configuration.md shows."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    blocks = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    (found,) = [one for one in blocks if isinstance(one, dict) and one.get("name") == name]
    return dict(found)


def read_lines(shell: Shell, run: str, *options: str) -> list[dict[str, Any]]:
    said = shell("results", run, *options)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_results_are_the_next_input(shell: Shell, kind: str) -> None:
    for name in ("first", "second"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(read_page_settings(name)))
    assert shell("run", "first.yaml", "--out", "first", "--quiet").code == 0
    path = f"first/results.{kind}"
    assert shell("results", "first", "-o", path).code == 0
    options = ["--set", f"input.path={path}"]
    if kind == "csv":  # its cells are text, so there is nothing to rank by
        options += ["--set", "reduce=[{op: count}]"]
    said = shell("check", "second.yaml", *options)
    assert said.code == 0, said.err
    said = shell("run", "second.yaml", "--out", "second", "--quiet", *options)
    assert said.code == 0, said.err
    rated = {row["id"]: row["output"] for row in read_lines(shell, "first")}
    for row in read_lines(shell, "second", "--prompt"):
        (message,) = row["prompt"]
        before = rated[row["id"]]
        assert f"solubility of {before['score']}: {before['why']}.\n" in message["content"]
    if kind == "parquet":
        (top,) = fanfold.load_results("second").aggregate
        first = top["rows"][0]
        assert first["value"] == max(one["score"] for one in rated.values())
        assert first["show"]["output.why"] == rated[first["id"]]["why"]
        assert pq.read_schema("second/results.parquet").field("input_output").type.num_fields == 2


def test_fields_that_do_not_exist_are_refused_or_fail_their_item(shell: Shell) -> None:
    rows = [{"id": "a", "x": {"score": 1}}, {"id": "b", "x": {}}, {"id": "c", "x": None}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"path": "in.jsonl", "id": "id"}
    for prompt, message in [
        ("Say {y.score}", "no column 'y.score' or 'y'"),
        ("Say {x.scor}", "'x' of the input has no field 'scor' in any row; its fields: score"),
    ]:
        shell.write(input=given, task={"prompt": prompt}, reduce=None)
        for command in (["check", "c.yaml"], ["run", "c.yaml", "--out", "r"]):
            said = shell(*command)
            assert said.code == 2, said.err
            assert message in " ".join(said.err.split())
            assert not Path("r").exists()
    shell.write(input=given, task={"prompt": "Say {x.score}"}, reduce=None)
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 3
    found = {row["id"]: row for row in read_lines(shell, "r", "--prompt")}
    assert found["a"]["prompt"] == [{"role": "user", "content": "Say 1"}]
    assert "'x' has no field 'score'" in found["b"]["error"]
    assert "'x' is null, not an object" in found["c"]["error"]
    assert {found[name]["error_class"] for name in "bc"} == {"InvalidItemError"}

    Path("in.csv").write_text('id,x\na,"{""score"": 1}"\n')
    shell.write(input=given | {"path": "in.csv"}, task={"prompt": "Say {x.score}"}, reduce=None)
    said = shell("check", "c.yaml")
    assert "no valid item; item a: task.prompt uses {x.score}, but 'x' is text" in said.out


def test_examples_precede_every_prompt(shell: Shell) -> None:
    settings = read_page_settings("sentiment")
    Path("reviews.csv").write_text("text\nI slept well.\nA waste of ink.\n")
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    bare = shell("check", "c.yaml", "--json", "--set", "task.examples=null")
    assert bare.code == 0, bare.err
    said = shell("check", "c.yaml", "--json")
    assert said.code == 0, said.err
    few, none = (json.loads(one.out) for one in (said, bare))
    assert few["sample"]["tokens"]["likely"] > none["sample"]["tokens"]["likely"] + 20
    assert "examples: 2, before every prompt" in shell("check", "c.yaml").out

    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    rows = read_lines(shell, "r", "--prompt")
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (system|user|assistant) \| `(.*)`", page, re.MULTILINE)
    for row in rows:
        sent = [(one["role"], one["content"]) for one in row["prompt"]]
        assert sent[:-1] == shown[:5]
        assert sent[-1] == ("user", f"Review: {row['text']}")
        assert row["output"]["label"] in {"good", "bad"}

    lines = [json.dumps(one) + "\n" for one in settings["task"]["examples"]]
    Path("few.jsonl").write_text("".join(lines))
    same = shell("run", "c.yaml", "--out", "r", "--set", "task.examples=few.jsonl")
    assert same.code == 0, same.err
    Path("few.jsonl").write_text(lines[0])
    other = shell("run", "c.yaml", "--out", "r", "--set", "task.examples=few.jsonl")
    assert other.code == 2
    assert "task.examples" in other.err


def test_several_messages_are_sent_in_order(shell: Shell) -> None:
    settings = read_page_settings("revise")
    settings["input"]["limit"] = 3
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    said = shell("check", "c.yaml")
    assert said.code == 0, said.err
    assert "system: You are a strict editor." in said.out
    assert "assistant: I have read it." in said.out
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    for row in read_lines(shell, "r", "--prompt"):
        assert [(one["role"], one["content"]) for one in row["prompt"]] == [
            ("system", "You are a strict editor."),
            ("user", f"Here is an abstract: {row['abstract']}"),
            ("assistant", "I have read it. What shall I look for?"),
            ("user", f"The weakest sentence, in the light of the title: {row['title']}"),
        ]
        assert row["status"] == "done"
    other = shell("run", "c.yaml", "--out", "r", "--set", "task.messages.0.content=Be kind.")
    assert other.code == 2
    assert "task.messages" in other.err
    replaced = ["--set", "task.messages=", "--set", "task.prompt=Improve {abstract}"]
    said = shell("check", "c.yaml", *replaced)
    assert said.code == 0, said.err
    talk = 'task.messages=[{role: user, content: "Rate {smiles}"}]'
    bare = ["--set", 'task.prompt=""', "--set", 'task.system=""']  # as the page shows it
    said = shell("check", "quickstart", "--limit", "2", "--set", talk, *bare)
    assert said.code == 0, said.err
    assert "user: Rate " in said.out


def test_samples_are_folded(shell: Shell) -> None:
    Path("topics.yaml").write_text(yaml.safe_dump(read_page_settings("topics")))
    checked = json.loads(shell("check", "topics.yaml", "--json").out)
    rows = checked["input"]["items"] // 5
    assert checked["estimate"]["requests"]["low"] == 5 * rows
    said = shell("run", "topics.yaml", "--out", "topics", "--quiet")
    assert said.code == 0, said.err
    columns = "field,agreement.field,novelty,spread.novelty,samples"
    said = shell("show", "topics", "--columns", columns, "--limit", "1000", "--json")
    shown = json.loads(said.out)["rows"]
    samples = read_lines(shell, "topics", "--samples")
    assert (len(shown), len(samples)) == (rows, 5 * rows)
    for n, row in enumerate(shown):
        answers = [one["output"] for one in samples[5 * n : 5 * n + 5]]
        fields = [one["field"] for one in answers]
        most = max(map(fields.count, fields))
        leading = {name for name in fields if fields.count(name) == most}
        assert row["field"] == (leading.pop() if len(leading) == 1 else None)
        assert row["agreement.field"] == most / 5
        assert row["novelty"] == pytest.approx(sum(one["novelty"] for one in answers) / 5)
    counts, agreement = fanfold.load_results("topics").aggregate
    assert counts["missing"] == agreement["ties"]["field"] == sum(r["field"] is None for r in shown)


def test_images_of_the_page(shell: Shell) -> None:
    Path("figures.yaml").write_text(yaml.safe_dump(read_page_settings("figures")))
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"```\n(id,figure,caption\n.*?)```", page, re.DOTALL)
    Path("figures").mkdir()
    Path("figures/figures.csv").write_text(rows)
    Path("figures/f1.png").write_bytes(make_png(280, 280))
    Path("figures/f2.jpg").write_bytes(JPEG)
    checked = shell("check", "figures.yaml")
    assert "[image, image/png, 280 x 280 pixels]" in checked.out, checked.err
    assert "images by their size" in checked.out
    said = shell("run", "figures.yaml", "--out", "figures-run", "--quiet")
    assert said.code == 0, said.err
    first, second = read_lines(shell, "figures-run", "--prompt")
    (message,) = first["prompt"]
    asked, image = message["content"].splitlines()
    assert asked == "What kind of figure is this? Its caption: Yield over time"
    assert re.fullmatch(r"\[image f1\.png, [\d,]+ bytes, sha256 [0-9a-f]{16}\]", image)
    assert first["output"] in {"plot", "micrograph", "structure"}
    assert second["prompt_tokens"] > 256


def test_a_stage_passes_on_folded_answers(shell: Shell) -> None:
    kind = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": ["a", "b"]}}}
    stages = [
        {"name": "first", "map": {"prompt": "Label {text}", "samples": 3, "schema": kind}},
        {"name": "second", "map": {"prompt": "Is it {first.kind}?"}},
    ]
    model = {"temperature": 0.7, "seed": 3}
    shell.write(task=None, reduce=None, model=model, stages=stages)
    said = shell("run", "c.yaml", "--out", "r", "--quiet")
    assert said.code == 0, said.err
    folded = {row["id"]: row["output"] for row in read_lines(shell, "r", "--stage", "first")}
    second = read_lines(shell, "r", "--stage", "second")
    assert {row["id"]: row["first"] for row in second} == folded
    assert len(read_lines(shell, "r", "--stage", "first", "--samples")) == 3 * len(folded)
    operator = {"name": "second", "reduce": {"op": "summarize", "prompt": "What is there?"}}
    task = {"samples": 3}
    shell.write(task=task, reduce=None, model=model, stages=[stages[0], operator])
    refused = shell("run", "c.yaml", "--out", "other", "--quiet")
    assert refused.code == 2
    assert "asks each of its questions once" in " ".join(refused.err.split()), refused.err
