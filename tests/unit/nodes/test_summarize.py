"""``summarize`` over a scripted model: sources, groups, failures, and replay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fanfold.backends.core.types import Item
from fanfold.nodes.operators import (
    Answer,
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


@dataclass
class Model:
    """Answers each question with one statement about all of its ids.

    Attributes:
        failed: Questions that fail.
        invents: Whether statements name an id that is not in the question.
        levels: Names of the levels, with their questions.
    """

    failed: frozenset[str] = frozenset()
    invents: bool = False
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
        statement = {"text": f"about {len(ids)}", "ids": [*ids, *more]}
        return Answer(question.id, {"statements": [statement]}, None, None, {})


async def count_tokens(texts: Sequence[str]) -> list[int]:
    return [10 for _ in texts]


async def summarize(model: Model, count: int, **settings: Any) -> OperatorEnd:
    rows = Rows(count)
    tools = StageTools(rows, ("text", "kind"), model.ask, count_tokens, 32_768, 256)
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


async def test_invented_ids_are_left_out_and_counted() -> None:
    model = Model(invents=True)
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


async def test_the_same_items_and_answers_give_the_same_questions() -> None:
    first, second = Model(), Model()
    await summarize(first, 500, group_by="kind")
    await summarize(second, 500, group_by="kind")
    assert first.levels == second.levels


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
