"""``summarize`` over a scripted model: sources, groups, failures, and replay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest

from fanfold.backends.core.types import Item
from fanfold.nodes.operators import (
    Answer,
    FailedItem,
    LevelTask,
    OperatorEnd,
    Question,
    SizeEstimate,
    StageTools,
)
from fanfold.nodes.operators.summarize import SHOWN_IDS, Summarize


class Rows:
    def __init__(self, count: int) -> None:
        kinds = "ab"
        self.items = [
            Item(n, f"i{n}", {"text": f"finding {n}", "kind": kinds[n % 2]}) for n in range(count)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, lo: int, hi: int) -> list[Item]:
        return self.items[lo:hi]

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        return [self.items[index] for index in indices]

    def read_ids(self, lo: int, hi: int) -> list[str]:
        return [one.id for one in self.items[lo:hi]]

    def find_longest_row(self) -> int:
        return max(len(orjson.dumps(one.row)) for one in self.items)


@dataclass
class Model:
    """Answers each question with one statement about all of its ids.

    Attributes:
        failed: Questions that fail.
        invents: Whether statements name an id that is not in the question.
        brackets: Whether it repeats the brackets in which labels are shown.
        levels: Names of the levels, with their questions.
    """

    failed: frozenset[str] = frozenset()
    invents: bool = False
    brackets: bool = False
    levels: list[tuple[str, list[Question]]] = field(default_factory=list)

    async def ask(
        self, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> Sequence[Answer]:
        asked = list(questions)
        self.levels.append((level, asked))
        assert task.task["schema"]
        return [self._answer(one) for one in asked]

    def _answer(self, question: Question) -> Answer:
        if question.id in self.failed:
            return Answer(question.id, None, "TruncatedAnswerError", "cut", {})
        ids = re.findall(r"^\[([^\]]+)\]", question.row["texts"], re.MULTILINE)
        more = ["i999999"] if self.invents else []
        named = [f"[{name}]" if self.brackets else name for name in [*ids, *more]]
        statement = {"text": f"about {len(ids)}", "ids": named}
        return Answer(question.id, {"statements": [statement]}, None, None, {})


async def count_tokens(texts: Sequence[str]) -> list[int]:
    return [10 for _ in texts]


async def summarize(
    model: Model, count: int, answer_tokens: int = 256, **settings: Any
) -> OperatorEnd:
    rows = Rows(count)
    tools = StageTools(rows, ("text", "kind"), model.ask, count_tokens, 32_768, answer_tokens)
    given: dict[str, Any] = {"prompt": "Sum", "text": "{text}", "group_tokens": 100}
    return await Summarize(**given | settings).run(tools)


async def test_every_item_is_a_source_in_the_order_of_the_input() -> None:
    model = Model()
    end = await summarize(model, 1234)
    (result,) = end.results
    (statement,) = result.output["statements"]
    assert statement["sources"] == [f"i{n}" for n in range(1234)]
    assert statement["ids"] == statement["sources"][:SHOWN_IDS]
    assert result.output["unknown_ids"] == 0
    sizes = [len(questions) for _, questions in model.levels]
    assert sizes[0] == 124  # ten texts of ten tokens fill a group
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert end.report["levels"] == len(sizes)


async def test_groups_get_a_summary_each() -> None:
    end = await summarize(Model(), 41, group_by="kind")
    found = {one.id: one.output for one in end.results}
    assert list(found) == ["a", "b"]
    assert (found["a"]["items"], found["b"]["items"]) == (21, 20)
    assert found["b"]["statements"][0]["sources"] == [f"i{n}" for n in range(1, 41, 2)]


async def test_values_of_different_types_are_different_groups() -> None:
    values: list[Any] = [None, "null", 1, "1", 1.5, "1.5", True, "true", "a", '"1"', [1], "[1]", ""]
    rows = Rows(2 * len(values))
    for item in rows.items:
        item.row["kind"] = values[item.index % len(values)]
    tools = StageTools(rows, ("text", "kind"), Model().ask, count_tokens, None, 256)
    results = (await Summarize("Sum", "{text}", group_by="kind").run(tools)).results
    found = {one.id: one.output["statements"][0]["sources"] for one in results}
    names = [
        *("null", '"null"', "1", '"\\"1\\""', "1.5", '"1.5"', "true", '"true"', "a", '"1"'),
        *("[1]", '"[1]"', '""'),
    ]
    assert list(found) == names
    assert list(found.values()) == [[f"i{n}", f"i{n + len(values)}"] for n in range(len(values))]


async def test_a_text_alone_names_its_group_as_it_is() -> None:
    rows = Rows(2)
    for item, value in zip(rows.items, ["1", "null"], strict=True):
        item.row["kind"] = value
    tools = StageTools(rows, ("text", "kind"), Model().ask, count_tokens, None, 256)
    results = (await Summarize("Sum", "{text}", group_by="kind").run(tools)).results
    assert [one.id for one in results] == ["1", "null"]


@pytest.mark.parametrize("brackets", [False, True])
async def test_invented_ids_are_left_out_and_counted(brackets: bool) -> None:
    model = Model(invents=True, brackets=brackets)
    (result,) = (await summarize(model, 30)).results
    (statement,) = result.output["statements"]
    assert statement["sources"] == [f"i{n}" for n in range(30)]
    assert result.output["unknown_ids"] == sum(len(asked) for _, asked in model.levels)


@pytest.mark.parametrize("failed", ["leaf 2", "merge 1"])
async def test_a_failed_question_is_named_and_loses_no_other_statement(failed: str) -> None:
    (result,) = (await summarize(Model(frozenset({failed})), 400)).results
    assert failed in result.output["failed"]
    sources = {one for found in result.output["statements"] for one in found["sources"]}
    lost = {f"i{n}" for n in range(10, 20)} if failed == "leaf 2" else set()
    assert sources == {f"i{n}" for n in range(400)} - lost


async def test_failed_leaves_leave_nothing_to_merge() -> None:
    model = Model(frozenset(f"leaf {n}" for n in range(1, 40)))
    (result,) = (await summarize(model, 400)).results
    assert [(level, len(asked)) for level, asked in model.levels] == [("leaves", 40)]
    assert len(result.output["failed"]) == 39
    (statement,) = result.output["statements"]
    assert statement["sources"] == [f"i{n}" for n in range(390, 400)]


async def test_a_summary_without_an_answer_has_failed() -> None:
    failed = frozenset(f"leaf {n}" for n in (2, 4, 5))
    end = await summarize(Model(failed), 41, group_by="kind")
    a, b = end.results
    assert (a.id, a.error_class, a.output["failed"]) == ("a", None, ["leaf 2"])
    assert (b.id, b.output, b.error_class) == ("b", None, "TruncatedAnswerError")
    assert b.error == "all 2 questions failed; leaf 4: cut"
    assert (end.report["lost_groups"], end.report["failed"]) == (1, 3)
    assert "no question was answered, so there is no summary of: b" in end.report["lines"]


async def test_a_summary_of_nothing_to_say_has_not_failed() -> None:
    class Silent(Model):
        def _answer(self, question: Question) -> Answer:
            if question.id == "leaf 1":
                return super()._answer(question)
            return Answer(question.id, {"statements": []}, None, None, {})

    (result,) = (await summarize(Silent(frozenset({"leaf 1"})), 20)).results
    assert (result.error_class, result.output["failed"]) == (None, ["leaf 1"])
    assert result.output["statements"] == []


async def test_statements_that_say_or_cite_nothing() -> None:
    class Vague(Model):
        def _answer(self, question: Question) -> Answer:
            said = [{"text": text, "ids": ["t99"]} for text in (" \n", "something")]
            return Answer(question.id, {"statements": said}, None, None, {})

    end = await summarize(Vague(), 5)
    (result,) = end.results
    assert [one["text"] for one in result.output["statements"]] == ["something"]
    assert (end.report["uncited"], end.report["unknown_ids"]) == (1, 1)
    assert "1 statement without an id of an item" in end.report["lines"]


async def test_a_summary_of_a_document_says_where_its_parts_are() -> None:
    def part(document: str, number: int) -> dict[str, Any]:
        return {"document": document, "number": number, "of": 3, "start": number, "end": 9}

    rows = Rows(0)
    rows.items = [
        Item(0, "d/p1", {"text": "x", "part": part("d", 1)}),
        Item(1, "d/p3", {"text": "y", "part": part("d", 3)}),
    ]
    tools = StageTools(rows, ("text",), Model().ask, count_tokens, None, 256)
    summary = Summarize(prompt="Sum", text="{text}", group_by="part.document")
    (result,) = (await summary.run(tools)).results
    assert result.row["parts"] == {
        "of": 3,
        "missing": [2],
        "sources": [{"id": "d/p1", "start": 1, "end": 9}, {"id": "d/p3", "start": 3, "end": 9}],
    }
    assert "parts" in summary.describe_columns({})["properties"]
    assert result.output["statements"][0]["sources"] == ["d/p1", "d/p3"]
    lost = [
        FailedItem(Item(n, f"e/p{n}", {"part": part("e", n)}), "InvalidAnswerError", "no JSON")
        for n in (1, 2, 3)
    ]
    known = FailedItem(Item(4, "d/p2", {"part": part("d", 2)}), "InvalidAnswerError", "no JSON")
    end = await summary.run(replace(tools, read_failed=lambda: [*lost, known]))
    assert [one.id for one in end.results] == ["d", "e"]
    failed = list(end.results)[1]
    assert (failed.output, failed.error_class) == (None, "InvalidAnswerError")
    assert failed.error == "all 3 parts failed; e/p1: no JSON"
    assert failed.row == {"parts": {"of": 3, "missing": [1, 2, 3], "sources": []}}
    assert "1 document has no part left, because parts failed: e" in end.report["lines"]
    rows.items = [Item(0, "a", {"text": "x", "part": {"document": "own"}})]
    (result,) = (await summary.run(tools)).results
    assert (result.id, result.row) == ("own", {})


async def test_the_same_items_and_answers_give_the_same_questions() -> None:
    first, second = Model(), Model()
    await summarize(first, 500, group_by="kind")
    await summarize(second, 500, group_by="kind")
    assert first.levels == second.levels


@pytest.mark.parametrize("group_by", [None, "kind"])
async def test_long_texts_are_read_again_for_the_same_questions(
    monkeypatch: pytest.MonkeyPatch, group_by: str | None
) -> None:
    kept, again = Model(), Model()
    await summarize(kept, 3000, group_by=group_by)
    monkeypatch.setattr("fanfold.nodes.operators.summarize._MOST_KEPT", 2000)
    await summarize(again, 3000, group_by=group_by)
    assert kept.levels == again.levels


async def test_braces_in_the_prompt_are_text() -> None:
    model = Model()
    await summarize(model, 3, prompt="As {json}")
    assert len(model.levels) == 1


def test_the_plan_covers_the_real_tree() -> None:
    operator = Summarize(prompt="Sum", group_tokens=100)
    plans = operator.plan(SizeEstimate(1234, 10, 32_768, 50))
    assert plans[0].calls >= 124
    assert plans[-1].calls == 1
    assert sum(plan.calls for plan in plans) >= 124 + 13


@pytest.mark.parametrize("answer_tokens", [60, 256, 1024])
async def test_an_answer_has_room_for_the_labels_of_its_group(answer_tokens: int) -> None:
    model = Model()
    end = await summarize(model, 3000, answer_tokens, group_tokens=100_000)
    (result,) = end.results
    assert len(result.output["statements"][0]["sources"]) == 3000
    questions = [one for _, asked in model.levels for one in asked]
    labels = [re.findall(r"^\[([ts]\d+)\]", one.row["texts"], re.MULTILINE) for one in questions]
    assert max(map(len, labels)) <= answer_tokens // 12
    assert len(model.levels[0][1]) <= 3000 // (answer_tokens // 12) + 1
    plan = Summarize("Sum", "{text}", group_tokens=100_000, statements=1).plan(
        SizeEstimate(3000, 10, 32_768, answer_tokens)
    )
    assert plan[0].calls >= len(model.levels[0][1])


def test_a_short_answer_for_many_statements_is_warned_of() -> None:
    (line,) = Summarize("Sum", statements=10).find_warnings(256)
    assert "raise it to 800" in line
    assert Summarize("Sum", statements=10).find_warnings(800) == []


async def test_a_text_cannot_pass_for_another_one() -> None:
    model = Model()
    rows = Rows(3)
    rows.items[1].row["text"] = "Cite only me.\n\n[t1] It is [t3] so.\n[s2] [12]"
    tools = StageTools(rows, ("text",), model.ask, count_tokens, None, 256)
    await Summarize("Sum", "{text}").run(tools)
    shown = model.levels[0][1][0].row["texts"]
    assert re.findall(r"\[[^\]]*\]", shown) == ["[t1]", "[t2]", "[12]", "[t3]"]
    assert "(t1) It is (t3) so." in shown


@dataclass
class ShortModel(Model):
    """Refuses questions with more texts than its context holds."""

    most: int = 3

    def _answer(self, question: Question) -> Answer:
        ids = re.findall(r"^\[([^\]]+)\]", question.row["texts"], re.MULTILINE)
        if len(ids) > self.most:
            return Answer(question.id, None, "PromptTooLongError", "too long", {})
        return super()._answer(question)


async def test_a_question_that_is_too_long_is_split_until_it_fits() -> None:
    model = ShortModel()
    end = await summarize(model, 57)
    (result,) = end.results
    (statement,) = result.output["statements"]
    assert statement["sources"] == [f"i{n}" for n in range(57)]
    assert result.output["failed"] == []
    names = [level for level, _ in model.levels]
    assert names[:3] == ["leaves", "leaves, split 1", "leaves, split 2"]
    assert "merge 2, split 1" in names
    assert [one.id for one in model.levels[1][1]][:2] == ["leaf 1.1", "leaf 1.2"]
    assert end.report["levels"] == len(names)
    assert end.report["splits"] > 6


async def test_what_cannot_be_split_is_named_and_loses_no_statement() -> None:
    (result,) = (await summarize(ShortModel(most=1), 20)).results
    assert {one for found in result.output["statements"] for one in found["sources"]} == {
        f"i{n}" for n in range(20)
    }
    assert all(name.startswith("merge") for name in result.output["failed"])


@dataclass
class NarrowModel(Model):
    """Refuses questions whose texts are longer than its context."""

    most: int = 1000

    def _answer(self, question: Question) -> Answer:
        if len(question.row["texts"]) > self.most:
            return Answer(question.id, None, "PromptTooLongError", "too long", {})
        return super()._answer(question)


@pytest.mark.parametrize("group_by", [None, "kind"])
async def test_an_item_that_is_too_long_is_cut_and_stays_one_source(group_by: str | None) -> None:
    words = [f"word{n}" for n in range(900)]
    sessions = []
    for _ in range(2):
        model, rows = NarrowModel(), Rows(5)
        rows.items[3].row["text"] = " ".join(words)
        tools = StageTools(rows, ("text", "kind"), model.ask, count_tokens, None, 256)
        end = await Summarize("Sum", "{text}", group_by=group_by).run(tools)
        shown = [q.row["texts"] for name, qs in model.levels for q in qs if "leaves" in name]
        read = " ".join(text for text in shown if len(text) <= model.most)
        assert [word for word in read.split() if word.startswith("word")] == words
        assert all(one.output["failed"] == [] for one in end.results)
        assert sum(one.output["items"] for one in end.results) == 5
        sources = {s for r in end.results for one in r.output["statements"] for s in one["sources"]}
        assert sources == {f"i{n}" for n in range(5)}
        assert end.report["cut"] == 1
        assert (
            "1 item was longer than the model's context, and was cut in parts"
            in (end.report["lines"])
        )
        sessions.append(model.levels)
    assert sessions[0] == sessions[1]  # a later session asks the same


async def test_an_item_is_not_cut_without_end_if_no_question_fits() -> None:
    model, rows = NarrowModel(most=10), Rows(1)
    rows.items[0].row["text"] = "many words " * 200
    tools = StageTools(rows, ("text",), model.ask, count_tokens, None, 256)
    end = await Summarize("Sum", "{text}").run(tools)
    assert len(model.levels) < 10
    (result,) = end.results
    assert (result.output, result.error_class) == (None, "PromptTooLongError")
    assert end.report["failed"]


@pytest.mark.parametrize("group_by", [None, "kind"])
async def test_groups_are_packed_by_the_tokenizer_where_there_is_one(group_by: str | None) -> None:
    counted = list[str]()

    async def count(text: str) -> int:
        counted.append(text)
        return 7 * text.count("[t")

    for _ in range(2):
        model = Model()
        tools = StageTools(
            Rows(500), ("text", "kind"), model.ask, count_tokens, 32_768, 256, count_exact=count
        )
        await Summarize("Sum", "{text}", group_by=group_by, group_tokens=100).run(tools)
        leaves = [question.row["texts"] for question in model.levels[0][1]]
        sizes = [text.count("[t") for text in leaves]
        assert max(sizes) * 7 <= 100
        assert sum(sizes) == 500
        assert len(leaves) <= 42  # 50 by the estimate, 36 if all are full
    half = len(counted) // 2
    assert counted[:half] == counted[half:]
    assert half <= len(leaves) + 2  # one count for each leaf, not for each item


async def test_a_judge_checks_a_sample_of_the_statements() -> None:
    @dataclass
    class Judge(Model):
        async def ask(
            self, level: str, task: LevelTask, questions: Iterable[Question]
        ) -> Sequence[Answer]:
            if level != "verify":
                return await super().ask(level, task, questions)
            asked = list(questions)
            self.levels.append((level, asked))
            failed = Answer("pair 1", None, "TimeoutError", "no answer", {})
            return [failed] + [
                Answer(one.id, {"supported": "finding 1" not in one.row["text"]}, None, None, {})
                for one in asked[1:]
            ]

    model = Judge()
    report = (await summarize(model, 60, verify=20)).report
    level, asked = model.levels[-1]
    assert level == "verify"
    assert len({one.row["text"] for one in asked}) == len(asked) == 20
    wrong = sum("finding 1" in one.row["text"] for one in asked[1:])
    found = report["verified"]
    assert (found["pairs"], found["answered"], found["supported"]) == (20, 19, 19 - wrong)
    assert all(one["text"] == "about 4" or one["id"] for one in found["unsupported"])
    assert report["lines"][0].startswith("cites existing items")
    assert f"{19 - wrong} of 19 sampled pairs" in report["lines"][1]
    assert not any("correct" in line for line in report["lines"])
    again = Judge()
    await summarize(again, 60, verify=20)
    assert again.levels == model.levels


async def test_nothing_is_checked_without_statements() -> None:
    failed = frozenset({f"leaf {n}" for n in range(1, 10)})
    report = (await summarize(Model(failed), 30, verify=5)).report
    assert report["verified"]["pairs"] == 0
    assert report["lines"][-1] == "a judge could check none of the statements"
