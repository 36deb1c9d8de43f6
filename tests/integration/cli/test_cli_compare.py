"""``fanfold compare``: agreement, changed items, gold figures and cost of two runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import krippendorff
import pytest
from scipy import stats
from sklearn import metrics

from fanfold.tests.support.model_server import serve_answers

from .conftest import Said, Shell

pytestmark = pytest.mark.integration

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["decision"],
    "properties": {
        "decision": {"type": "string", "enum": ["yes", "no", "maybe"]},
        "score": {"type": "number"},
        "note": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
}
OTHER: dict[str, Any] = {
    "type": "object",
    "required": ["decision"],
    "properties": {
        "decision": {"type": "string", "enum": ["yes", "no", "maybe"]},
        "score": {"type": "number"},
        "reason": {"type": "string"},
    },
}
LABELS = ("yes", "no", "maybe")
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m"
ITEMS = 40


def gold_of(n: int) -> str:
    return LABELS[n % 3]


def answer_a(n: int) -> tuple[str, float]:
    return LABELS[(n % 3 + (n % 8 == 0)) % 3], float(n)


def answer_b(n: int) -> tuple[str, float]:
    return LABELS[(n % 3 + (n % 5 == 0)) % 3], n + (n % 4) / 2


FAILED_A, FAILED_B = {7, 17}, {17, 27, 37}


def answer(prompt: str) -> str | None:
    """Answer as the first run's model for "Judge", else as the second run's."""
    match = re.search(r"\d+", prompt)
    assert match is not None
    n, is_first = int(match[0]), prompt.startswith("Judge")
    if n in (FAILED_A if is_first else FAILED_B):
        return None
    decision, score = answer_a(n) if is_first else answer_b(n)
    more = {"note": HOSTILE, "tags": ["x"]} if is_first else {"reason": "because"}
    return json.dumps({"decision": decision, "score": score, **more})


@pytest.fixture
def url() -> Iterator[str]:
    with serve_answers(answer) as found:
        yield found


@pytest.fixture
def pair(shell: Shell, url: str) -> Shell:
    """Two runs, ``a`` and ``b``, with other prompts, schemas and prices over the same items."""
    lines = "".join(f"i{n},question {n},{gold_of(n)}\n" for n in range(ITEMS))
    (shell.folder / "in.csv").write_text("id,text,label\n" + lines)
    shell.config = {
        "name": "first",
        "input": {"path": "in.csv", "id": "id"},
        "task": {"prompt": "Judge {text}", "schema": SCHEMA},
        "endpoints": {"urls": [url]},
        "evaluate": {"gold": "label", "field": "decision"},
        "model": {"price": {"prompt": 1.0, "completion": 2.0}},
    }
    shell.write()
    assert shell("run", "c.yaml", "--out", "a", "--quiet").code == 3
    shell.write(name="second", task={"prompt": "Rate {text}", "schema": OTHER}, model=None)
    assert shell("run", "c.yaml", "--out", "b", "--quiet").code == 3
    return shell


def compare(shell: Shell, *options: str) -> dict[str, Any]:
    said = shell("compare", "a", "b", "--format", "json", *options)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def values(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures.items()}


def test_agreement_gold_and_cost(pair: Shell) -> None:
    before = pair.files()
    found = compare(pair)
    assert pair.files() == before
    assert found["items"] == {"common": ITEMS, "only_a": 0, "only_b": 0, "different_input": 0}
    assert (found["fields_only_a"], found["fields_only_b"]) == (["output.note"], ["output.reason"])
    assert found["warnings"] == []
    assert 'task.prompt: "Judge {text}" → "Rate {text}"' in found["settings"]

    both = [n for n in range(ITEMS) if n not in FAILED_A | FAILED_B]
    a, b = ([LABELS.index(of(n)[0]) for n in both] for of in (answer_a, answer_b))
    labels, numbers = found["fields"]
    assert (labels["field"], labels["kind"], labels["both"]) == (
        "output.decision",
        "categorical",
        36,
    )
    assert (labels["only_a"], labels["only_b"]) == (2, 1)
    assert labels["changed"] == sum(x != y for x, y in zip(a, b, strict=True))
    assert values(labels["figures"]) == pytest.approx(
        {
            "agreement": 1 - labels["changed"] / 36,
            "kappa": metrics.cohen_kappa_score(a, b),
            "alpha": krippendorff.alpha([a, b], level_of_measurement="nominal"),
        }
    )
    x, y = ([of(n)[1] for n in both] for of in (answer_a, answer_b))
    assert (numbers["field"], numbers["kind"]) == ("output.score", "numeric")
    figures = values(numbers["figures"])
    assert figures["mae"] == pytest.approx(metrics.mean_absolute_error(x, y))
    assert figures["spearman"] == pytest.approx(stats.spearmanr(x, y)[0])
    assert figures["mean_difference"] == pytest.approx(sum(y) / 36 - sum(x) / 36)

    (gold,) = found["gold"]
    kept = json.loads(Path("a", "evaluation.json").read_text())["evaluations"][0]
    assert gold["a"] == kept["metrics"]
    right = [([LABELS.index(gold_of(n)) for n in both][k]) for k in range(36)]
    only_a = sum(p == g != q for p, q, g in zip(a, b, right, strict=True))
    only_b = sum(q == g != p for p, q, g in zip(a, b, right, strict=True))
    assert (gold["only_a"], gold["only_b"]) == (only_a, only_b)
    assert gold["mcnemar_p"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert gold["difference"]["value"] == pytest.approx((only_b - only_a) / 36)
    assert gold["difference"]["low"] < gold["difference"]["value"] < gold["difference"]["high"]

    first, second = found["a"], found["b"]
    assert (first["done"], first["failed"], second["done"]) == (38, 2, 37)
    assert first["usd"] == pytest.approx(38 * 20e-6)
    assert second["usd"] is None
    for side in (first, second):
        assert 0 < side["latency_median_s"] <= side["latency_p95_s"]


def test_changed_items_come_first(pair: Shell) -> None:
    found = compare(pair, "--field", "score")
    (one,) = found["fields"]
    rows = one["rows"]
    assert len(rows) == 39
    changes = [row["change"] for row in rows]
    assert changes == sorted(changes, key=["changed", "only_a", "only_b", "same"].index)
    assert changes.count("changed") == one["changed"]
    differences = [row["b"] - row["a"] for row in rows if row["change"] == "changed"]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] == 1.5
    assert {"id": "i7", "change": "only_b", "a": None, "b": 8.5} in rows
    limited = compare(pair, "--field", "score", "--limit", "3")
    assert limited["fields"][0]["rows"] == rows[:3]


def test_a_terminal_shows_all_parts(pair: Shell) -> None:
    said = pair("compare", "a", "b")
    assert said.code == 0, said.err
    for words in (
        "A: a (first, stand-in): 38 done, 2 failed of 40",
        "fields only in B: output.reason",
        "output.decision: changed items first",
        "--field NAME (output.score)",
        "output.decision against label",
        "McNemar's exact test: p = ",
        "latency, 95 % within",
        "settings that differ",
    ):
        assert words in said.out, words
    assert "columns not shown" not in said.out
    assert max(map(len, said.out.splitlines())) <= 90
    pair.patch.setenv("COLUMNS", "60")
    narrow = pair("compare", "a", "b").out.partition("changed items first")[0]
    assert "interval]" in narrow
    assert "columns not shown" not in narrow
    assert pair("compare", "a", "b", "--field", "output.score").out.count("items first") == 1


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = set[str]()
        self.attributes = set[str]()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_has_texts_as_texts(pair: Shell) -> None:
    assert pair("compare", "a", "a", "-o", "page.html").code == 0
    text = Path("page.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "a"}
    assert page.attributes <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "tabindex",
    }
    assert "default-src 'none'" in text
    assert HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in page.text
    assert "\x1b" not in text
    assert "http://" not in text.replace("http://127.0.0.1", "")
    said = pair("compare", "a", "b", "--format", "html", "--field", "decision", "--limit", "1")
    assert "1 of 39 items; more with --limit N" in Page(said.out).text


def refuse(shell: Shell, *arguments: str) -> Said:
    said = shell("compare", *arguments)
    assert said.code == 2
    return said


def test_runs_over_other_items_are_refused(pair: Shell) -> None:
    lines = "".join(f"q{n},question {n},{gold_of(n)}\n" for n in range(5))
    Path("in.csv").write_text("id,text,label\n" + lines)
    assert pair("run", "c.yaml", "--out", "c", "--quiet").code == 0
    said = refuse(pair, "a", "c")
    assert "a has 40 items (i0, i1, i2, …) and c has 5 (q0, q1, q2, …), but no id" in said.err
    by_number = {"path": "in.csv"}
    pair.write(input=by_number)
    assert pair("run", "c.yaml", "--out", "d", "--quiet").code == 0
    Path("in.csv").write_text("id,text,label\n" + lines.replace("question ", "question 1"))
    assert pair("run", "c.yaml", "--out", "e", "--quiet").code in {0, 3}
    said = refuse(pair, "d", "e")
    assert "5 of the 5 items with the same number have different columns" in said.err


def test_a_part_of_the_items(pair: Shell) -> None:
    """Items of one run only are counted; rows whose columns differ are pointed out."""
    lines = "".join(f"i{n},question {n + (n == 31)},{gold_of(n)}\n" for n in range(50, 29, -1))
    Path("in.csv").write_text("id,text,label\n" + lines)
    assert pair("run", "c.yaml", "--out", "c", "--quiet").code == 3
    said = pair("compare", "a", "c", "--format", "json")
    found = json.loads(said.out)
    assert found["items"] == {"common": 10, "only_a": 30, "only_b": 11, "different_input": 1}
    assert "WARNING: 1 of the 10 items in both runs have other values" in said.err
    rows = {row["id"]: (row["a"], row["b"]) for row in found["fields"][1]["rows"]}
    assert rows["i33"] == (33.0, 33.5)
    assert found["gold"][0]["difference"]["n"] == 9


def test_simulated_runs_are_marked(pair: Shell) -> None:
    pair.write(endpoints={"simulated": {"nodes": 1, "time_scale": 50}})
    assert pair("run", "c.yaml", "--out", "s", "--quiet").code == 0
    said = pair("compare", "a", "s")
    assert said.code == 0
    assert "WARNING: SIMULATED: the answers of s are simulated" in said.err
    assert "B: SIMULATED: s" in said.out
    assert "against label" not in said.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--field", "decison"), "--field decison: a: task.schema has no field 'decison'"),
        (("--field", "note"), "--field note: b: task.schema has no field 'note'"),
        (("--field", "tags"), "field 'tags' is array in task.schema"),
        (("--format", "xml"), "--format xml: choose one of text, json, html"),
        (("-o", "none/x.html"), "the folder none does not exist"),
    ],
)
def test_options_that_do_not_fit(pair: Shell, options: tuple[str, ...], words: str) -> None:
    assert words in refuse(pair, "a", "b", *options).err


def test_a_field_that_has_another_type_is_compared_as_text(pair: Shell) -> None:
    other = {"type": "object", "properties": {"score": {"type": ["string", "number"]}}}
    pair.write(task={"prompt": "Rate {text}", "schema": other}, evaluate=None)
    assert pair("run", "c.yaml", "--out", "c", "--quiet").code == 3
    said = pair("compare", "b", "c", "--format", "json")
    (one,) = json.loads(said.out)["fields"]
    assert (one["kind"], one["changed"], one["both"]) == ("categorical", 0, 37)


def test_the_commands_of_the_page(pair: Shell) -> None:
    page = Path(str(files("fanfold")), "docs", "evaluate.md").read_text()
    section = page.partition("## Compare two runs")[2]
    commands = re.findall(r"^\$ fanfold (compare .*?)(?:  +#.*)?$", section, re.MULTILINE)
    assert len(commands) >= 3
    Path("a").rename("first")
    Path("b").rename("second")
    for command in commands:
        said = pair(*command.replace(" > agreement.json", "").split())
        assert said.code == 0, (command, said.err)
