"""``evaluate`` and ``fanfold evaluate``: figures of a run against gold values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from sklearn import metrics

from fanfold import load_results
from fanfold.tests.support.model_server import serve_answers

from .conftest import Shell

pytestmark = pytest.mark.integration

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["decision"],
    "properties": {
        "decision": {"type": "string", "enum": ["yes", "no", "maybe"]},
        "score": {"type": "number"},
    },
}
LABELS = ("yes", "no", "maybe")


def gold_of(number: int) -> str:
    return LABELS[number % 3]


def answer_of(number: int, wrong: int = 7) -> str:
    """Return the answer to an item: mostly right."""
    return LABELS[(number % 3 + (number % wrong == 0)) % 3]


def answer(prompt: str) -> str | None:
    """Answer 60 items; refuse every tenth, and give a score that is somewhat too high."""
    match = re.search(r"\d+", prompt)
    assert match is not None
    number = int(match[0])
    if number % 10 == 9:
        return None
    decision = answer_of(number, 8 if prompt.startswith("Yes") else 7)
    return json.dumps({"decision": decision, "score": number + number % 4})


@pytest.fixture
def url() -> Iterator[str]:
    with serve_answers(answer) as found:
        yield found


@pytest.fixture
def labelled(shell: Shell, url: str) -> Shell:
    lines = "".join(f"i{n},question {n},{gold_of(n)},{n}\n" for n in range(60))
    (shell.folder / "in.csv").write_text("id,text,label,number\n" + lines)
    shell.config = {
        "name": "t",
        "input": {"path": "in.csv", "id": "id"},
        "task": {"prompt": "Judge {text}", "schema": SCHEMA},
        "endpoints": {"urls": [url]},
        "evaluate": [
            {"gold": "label", "field": "output.decision"},
            {"gold": "number", "field": "score"},
        ],
    }
    shell.write()
    return shell


def written(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "evaluation.json").read_text())
    return found


def test_a_run_is_evaluated_at_its_end(labelled: Shell) -> None:
    said = labelled("run", "c.yaml", "--out", "r", "--json")
    assert said.code == 3, said.err
    content = written("r")
    assert (content["version"], content["simulated"]) == (1, False)
    first, second = content["evaluations"]
    done = [n for n in range(60) if n % 10 != 9]
    gold, answers = [gold_of(n) for n in done], [answer_of(n) for n in done]
    assert (first["gold"], first["field"], first["kind"]) == (
        "label",
        "output.decision",
        "categorical",
    )
    assert (first["items"], first["answered"], first["missing"]) == (60, 54, 6)
    assert first["missing_by_cause"] == {"failed": 6}
    found = {name: one["value"] for name, one in first["metrics"].items()}
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(gold, answers))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(gold, answers))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(gold, answers, average="macro"))
    matrix = metrics.confusion_matrix(gold, answers, labels=LABELS)
    assert first["confusion"] == {"labels": list(LABELS), "counts": matrix.tolist()}
    assert second["kind"] == "numeric"
    expected = metrics.mean_absolute_error(done, [n + n % 4 for n in done])
    assert second["metrics"]["mae"]["value"] == pytest.approx(expected)

    assert json.loads(said.out)["evaluation"] == content["evaluations"]
    assert load_results("r").evaluation == content["evaluations"]
    assert json.loads(labelled("status", "r", "--json").out)["evaluation"] == [first, second]
    assert "54 of 60 items answered, 6 missing (6 failed); accuracy" in labelled("status", "r").err

    assert labelled("report", "r").code == 0
    page = Path("r", "report.html").read_text()
    for one in (first, second):
        assert f"Evaluation: {one['field']} against {one['gold']}" in page
    assert 'aria-label="Confusion: output.decision against label"' in page
    assert "6 without an answer count as missing (6 failed)" in page
    again = labelled("run", "c.yaml", "--out", "r")
    assert "evaluation of output.decision against label: 54 of 60" in again.out
    assert "accuracy, missing as wrong" in again.out
    assert "mean absolute error" in again.out
    assert again.err.count("evaluation of") == 0
    assert written("r") == content


def test_a_resumed_run_follows_its_settings(labelled: Shell) -> None:
    labelled.write(evaluate=None)
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    assert not Path("r", "evaluation.json").exists()
    assert load_results("r").evaluation == []
    assert "evaluation" not in json.loads(labelled("status", "r", "--json").out)
    labelled.write(evaluate={"gold": "label", "field": "decision"})
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    assert [one["gold"] for one in written("r")["evaluations"]] == ["label"]
    labelled.write(evaluate=None)
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    assert not Path("r", "evaluation.json").exists()


def test_a_finished_run_by_command(labelled: Shell) -> None:
    labelled.write(evaluate=None)
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    missing = labelled("evaluate", "r")
    assert missing.code == 2
    assert "have no section evaluate; give --gold COLUMN" in missing.err
    said = labelled("evaluate", "r", "--gold", "label", "--field", "decision", "--json")
    assert said.code == 0, said.err
    (one,) = json.loads(said.out)["evaluations"]
    assert one["answered"] == 54
    assert labelled("evaluate", "r", "--gold", "number", "--field", "output.score").code == 0
    assert labelled("evaluate", "r", "--gold", "label", "--field", "output.decision").code == 0
    assert [kept["gold"] for kept in written("r")["evaluations"]] == ["number", "label"]
    assert written("r")["evaluations"][1] == one


def test_gold_values_of_a_file(labelled: Shell) -> None:
    labelled.write(evaluate=None)
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    lines = [json.dumps({"key": f"i{n}", "right": gold_of(n)}) for n in range(30)]
    Path("gold.jsonl").write_text("\n".join([*lines, json.dumps({"key": "x", "right": "no"})]))
    command = ("evaluate", "r", "--gold", "right", "--field", "decision", "--gold-file")
    said = labelled(*command, "gold.jsonl", "--gold-id", "key", "--json")
    assert said.code == 0, said.err
    (one,) = json.loads(said.out)["evaluations"]
    assert (one["items"], one["answered"], one["unlabelled"]) == (30, 27, 30)
    assert one["notes"] == ["rows of gold.jsonl that belong to no item: 1"]
    refused = labelled(*command, "gold.jsonl")
    assert refused.code == 2
    assert "no column 'id' in gold.jsonl, line 1 (it has key, right)" in refused.err
    assert "there is no such file" in labelled(*command, "none.csv").err
    Path("twice.csv").write_text("id,right\ni1,yes\ni1,no\n")
    assert "two gold values for 'i1'" in labelled(*command, "twice.csv").err
    Path("other.csv").write_text("id,right\nq1,yes\n")
    assert "none of its 1 ids is that of an item" in labelled(*command, "other.csv").err


def test_an_unfinished_run(labelled: Shell) -> None:
    assert labelled("run", "c.yaml", "--out", "r", "--pilot", "9", "--quiet").code == 5
    said = labelled("evaluate", "r", "--gold", "label", "--field", "decision", "--json")
    (one,) = json.loads(said.out)["evaluations"]
    assert one["items"] == 60
    assert one["missing_by_cause"]["unfinished"] == 51
    assert "51 open items, counted as missing" in labelled("evaluate", "r").err


def test_simulated_answers_have_no_figures(labelled: Shell) -> None:
    labelled.write(endpoints={"simulated": {"nodes": 1, "time_scale": 50}})
    said = labelled("run", "c.yaml", "--out", "r")
    assert said.code == 0
    assert "no figure is computed: the answers are simulated" in said.err
    assert "accuracy" not in said.out
    content = written("r")
    assert content["evaluations"] == []
    assert "simulated" in content["refused"]
    refused = labelled("evaluate", "r", "--gold", "label", "--field", "decision")
    assert refused.code == 2
    assert "no figure is computed: the answers are simulated" in refused.err
    facts = json.loads(labelled("status", "r", "--json").out)
    assert facts["evaluation"] == []
    assert "simulated" in facts["evaluation_refused"]
    assert load_results("r").evaluation == []


def test_check_looks_at_gold_values(labelled: Shell) -> None:
    said = labelled("check", "c.yaml")
    assert said.code == 0, said.err
    assert "output.decision against 'label' (categorical): 60 of 60 items have a gold" in said.out
    assert "WARNING: evaluate" not in said.out
    text = Path("in.csv").read_text()
    Path("in.csv").write_text(text.replace(",maybe,", ",Maybe,").replace(",59\n", ",\n"))
    labelled.write(task={"prompt": "Judge {text} {label}", "schema": SCHEMA})
    said = labelled("check", "c.yaml", "--json")
    lines = " ".join(json.loads(said.out)["evaluate"])
    assert "'Maybe' (20 items; did you mean 'maybe'? Case counts)" in lines
    assert "the prompt shows the gold column 'label' to the model" in lines
    assert "59 of 60 items have a gold value" in lines
    labelled.write(evaluate={"gold": "lable", "field": "decision"})
    for command in (("check",), ("run", "--out", "x")):
        refused = labelled(command[0], "c.yaml", *command[1:])
        assert refused.code == 2
        assert "c.yaml: evaluate.0: the input has no column 'lable'" in refused.err
        assert "did you mean 'label'?" in refused.err
    labelled.write(endpoints={"simulated": {}})
    assert "no figure is computed" in labelled("check", "c.yaml").out


def test_a_leak_is_noted_beside_the_figures(labelled: Shell) -> None:
    labelled.write(task={"prompt": "Judge {text} ({label})", "schema": SCHEMA})
    said = labelled("run", "c.yaml", "--out", "r")
    assert "note: the prompt shows the gold column 'label'" in said.out
    assert written("r")["evaluations"][0]["notes"]
    assert written("r")["evaluations"][1]["notes"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gold", "label"), "give both --gold COLUMN and --field NAME"),
        (("--gold-file", "x.csv"), "--gold-file needs --gold COLUMN"),
        (("--gold-id", "x"), "--gold-id needs --gold-file FILE"),
        (("--gold", "text", "--field", "input.text"), "is a column of the input"),
    ],
)
def test_options_that_do_not_fit(labelled: Shell, options: tuple[str, ...], words: str) -> None:
    labelled.write(evaluate=None)
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    refused = labelled("evaluate", "r", *options)
    assert refused.code == 2
    assert words in refused.err


PAGE = Path(str(files("fanfold")), "docs", "evaluate.md").read_text()


def test_the_page_describes_every_key(labelled: Shell) -> None:
    assert labelled("run", "c.yaml", "--out", "r", "--quiet").code == 3
    for one in written("r")["evaluations"]:
        for key in (*one, *one["metrics"]):
            assert f"`{key}`" in PAGE, key


def test_the_example_of_the_page(labelled: Shell, url: str) -> None:
    """It prints what the page shows; ends of bootstrap intervals depend on NumPy's version."""
    Path("in.csv").rename("questions.csv")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("triage.yaml").write_text(text.replace("http://127.0.0.1:8000/v1", url))
    shown = PAGE.partition("$ fanfold run triage.yaml --out first\n")[2].partition("```")[0]
    said = labelled("run", "triage.yaml", "--out", "first")
    assert said.code == 3

    def stable(table: str) -> list[str]:
        kept = (line for line in table.strip().splitlines() if "accuracy" not in line)
        return [re.sub(r"\d\.\d+ to \d\.\d+", "…", line) for line in kept]

    assert stable(said.out) == stable(shown)
    for line in shown.splitlines():
        assert "accuracy" not in line or line in said.out
    prompt = "task.prompt=Yes, no or maybe? {text}"
    assert f"fanfold run triage.yaml --out second --set '{prompt}'" in PAGE
    assert labelled("run", "triage.yaml", "--out", "second", "--set", prompt, "--quiet").code == 3
    shown = PAGE.partition("$ fanfold compare first second\n")[2].partition("```")[0]
    said = labelled("compare", "first", "second")
    assert said.code == 0
    found = stable(said.out)
    assert all(line in found for line in stable(shown) if line != "…")
    commands = re.findall(r"^\$ fanfold (evaluate .*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    Path("labels.csv").write_text("key,label\ni1,no\ni2,yes\n")
    for command in commands:
        assert labelled(*command.split()).code == 0, command
