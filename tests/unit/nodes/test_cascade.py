"""The operator ``cascade`` with two models in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from fanfold.backends.core.types import Item
from fanfold.nodes.operators import (
    Answer,
    LevelTask,
    OperatorEnd,
    Question,
    SizeEstimate,
    StageTools,
    make_operator,
)

TASK = {
    "prompt": "Text: {text}",
    "schema": {
        "type": "object",
        "properties": {"label": {"enum": ["a", "b", "c"]}, "reason": {"type": "string"}},
    },
}
SETTINGS = {
    "op": "cascade",
    "field": "label",
    "small": {"model": {"name": "small", "temperature": 0.0}, "endpoints": {"urls": ["http://s"]}},
    "target": 0.9,
    "task": TASK,
    "names": ("text",),
}


class Rows:
    """Items in memory."""

    def __init__(self, count: int) -> None:
        self.items = [Item(n, f"t{n}", {"text": str(n), "year": 2000 + n}) for n in range(count)]

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


class Models:
    """A large model that knows the truth, and a small one that is right as often as it is sure."""

    def __init__(self, seed: int = 0) -> None:
        self.levels = list[tuple[str, LevelTask, list[Question]]]()
        self.has_logprobs = True
        self.fails: Callable[[str, str], bool] = lambda _model, _text: False
        self._seed = seed

    def truth(self, text: str) -> str:
        return random.Random(f"truth {self._seed} {text}").choice("abc")

    def certainty(self, text: str) -> float:
        return random.Random(f"certainty {self._seed} {text}").random()

    def _say(self, model: str, text: str, sample: int) -> str:
        chance = random.Random(f"{self._seed} {text} {sample}")
        if model == "large" or chance.random() < 0.5 + 0.5 * self.certainty(text):
            return self.truth(text)
        return chance.choice("abc")

    async def ask(
        self, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> Sequence[Answer]:
        asked = list(questions)
        self.levels.append((level, task, asked))
        model = str(task.model.get("name", "large"))
        samples = int(task.task.get("samples", 1))
        return [
            self._answer(model, task, question, sample + 10 * ("again" in level))
            for question in asked
            for sample in range(samples)
        ]

    def _answer(self, model: str, task: LevelTask, question: Question, sample: int) -> Answer:
        text = str(question.row["text"])
        record: dict[str, Any] = {"model": model, "nano_usd": 10 if model == "small" else 1000}
        if self.fails(model, text):
            return Answer(question.id, None, "TimeoutError", "no answer", record)
        if "certainty" in task.task:
            record["certainty"] = 0.9 * self.certainty(text) if self.has_logprobs else None
        output = {"label": self._say(model, text, sample), "reason": f"{model} {text}"}
        return Answer(question.id, output, None, None, record)


async def run(models: Models, count: int = 600, **settings: Any) -> OperatorEnd:
    async def count_tokens(texts: Sequence[str]) -> list[int]:
        return [len(text) // 4 for text in texts]

    tools = StageTools(Rows(count), ["text"], models.ask, count_tokens, None, 100, streams=32)
    return await make_operator(SETTINGS | settings).run(tools)


def levels_of(models: Models) -> list[str]:
    return [level.partition(" ")[0] for level, _, _ in models.levels]


async def test_each_item_has_the_answer_of_one_model() -> None:
    models = Models()
    end = await run(models)
    results, report = list(end.results), end.report
    assert [one.id for one in results] == [f"t{n}" for n in range(600)]
    by_model = {
        model: [one for one in results if one.record["model"] == model]
        for model in ("small", "large")
    }
    assert len(by_model["small"]) == report["small"] > 0
    assert len(by_model["large"]) == report["large"] > 0
    for model, some in by_model.items():
        assert all(one.output["reason"] == f"{model} {one.row['text']}" for one in some)
    assert min(one.record["certainty"] for one in by_model["small"]) >= report["certainty"]
    wrong = sum(one.output["label"] != models.truth(one.row["text"]) for one in results)
    assert wrong <= 60
    assert results[3].row == {"text": "3", "year": 2003}
    assert list(end.results) == results  # they can be read again
    assert report["lines"][0] == (
        "agrees with large in label on at least 90 % of the items, with probability 0.9"
    )
    kept, large = report["small"], report["large"]
    assert report["saved_usd"] == pytest.approx((1000 * kept - 603 * 10) / 1e9, abs=1e-6)
    assert report["lines"][1].startswith(
        f"{large} of 600 items ({100 * large / 600:.0f} %) went to"
    )


async def test_the_levels_and_what_they_ask() -> None:
    models = Models()
    end = await run(models)
    assert levels_of(models)[:3] == ["small,", "small", "sample"]
    assert levels_of(models)[-1] == "large"
    assert levels_of(models).count("sample") == end.report["rounds"]
    small = models.levels[1][1]
    assert small.model == {"name": "small", "price": None, "temperature": 0.0}
    assert small.endpoints == {"urls": ["http://s"]}
    assert small.task == TASK | {"certainty": "label"}
    assert models.levels[-1][1] == LevelTask(TASK)
    assert {frozenset(q.row) for _, _, asked in models.levels for q in asked} == {
        frozenset({"text"})
    }
    by_large = [q.id for level, _, asked in models.levels if "small" not in level for q in asked]
    assert len(set(by_large)) == len(by_large) == end.report["large"]
    assert all(len(asked) <= 32 for level, _, asked in models.levels if level.startswith("sample"))


async def test_samples_replace_log_probabilities() -> None:
    models = Models()
    models.has_logprobs = False
    end = await run(models, samples=5)
    assert levels_of(models)[:3] == ["small", "small,", "sample"]
    first, again = models.levels[0][1], models.levels[1][1]
    assert first.task == TASK
    assert again.task == TASK | {"samples": 4}
    assert again.model["temperature"] == 0.7
    assert {one.record["certainty"] for one in end.results} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert end.report["small"] > 0


async def test_a_server_without_log_probabilities_is_asked_for_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models, given = Models(), Models()
    models.has_logprobs = False
    end = await run(models)
    assert [len(asked) for _, _, asked in models.levels[:3]] == [3, 600, 600]
    tasks = [task.task for _, task, _ in models.levels[:3]]
    assert tasks == [TASK | {"certainty": "label"}, TASK, TASK | {"samples": 4}]
    said = "its certainty is the agreement of 5 answers"
    assert said in caplog.text
    assert any(said in line for line in end.report["lines"])
    assert end.report["samples"] == 5
    wanted = await run(given, samples=5)
    assert list(end.results) == list(wanted.results)
    assert not any(said in line for line in wanted.report["lines"])


async def test_one_failed_item_does_not_decide_about_log_probabilities() -> None:
    models = Models()
    models.fails = lambda model, text: model == "small" and text in {"0", "1"}
    end = await run(models)
    assert end.report["samples"] is None
    models.has_logprobs = False
    assert (await run(models)).report["samples"] == 5


async def test_single_answers_without_log_probabilities_are_counted() -> None:
    class Mixed(Models):
        def _answer(self, model: str, task: LevelTask, question: Question, sample: int) -> Answer:
            answer = super()._answer(model, task, question, sample)
            if int(str(question.row["text"])) % 3 == 1 and answer.record.get("certainty"):
                answer = replace(answer, record={**answer.record, "certainty": None})
            return answer

    end = await run(Mixed())
    assert end.report["without_certainty"] == 200
    assert any("200 answers of the small model without" in line for line in end.report["lines"])
    assert {one.record["model"] for one in list(end.results)[1::3]} == {"large"}


async def test_items_that_the_small_model_fails_go_to_the_large_one() -> None:
    models = Models()
    models.fails = lambda model, text: model == "small" and int(text) % 3 == 0
    end = await run(models)
    assert all(one.error_class is None for one in end.results)
    assert {one.record["model"] for one in list(end.results)[::3]} == {"large"}
    assert {one.record["certainty"] for one in list(end.results)[::3]} == {None}


async def test_items_that_the_large_model_fails_are_failed() -> None:
    models = Models()
    models.fails = lambda model, text: model == "large" and int(text) % 5 == 0
    end = await run(models, target=0.6)
    failed = [one for one in end.results if one.error_class is not None]
    assert failed
    assert all(one.output is None and int(one.row["text"]) % 5 == 0 for one in failed)


async def test_the_same_answers_ask_the_same_questions() -> None:
    first, again = Models(), Models()
    for models in (first, again):
        await run(models, seed=3)
    assert first.levels == again.levels


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_few_items_go_to_the_large_model(count: int) -> None:
    end = await run(Models(), count)
    assert len(list(end.results)) == count
    assert end.report["large"] == count


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "expected"),
    [
        (1, 1.5, 0.5, True),
        (0.1 + 0.2, 0.3, 0.0, True),
        (1, 1.6, 0.5, False),
        (True, 1, 0.5, False),
        ("a", "a", None, True),
        ("a", "b", None, False),
        (None, None, None, True),
        (None, 0, 5.0, False),
        (False, False, None, True),
    ],
)
def test_when_two_answers_agree(a: Any, b: Any, tolerance: float | None, expected: bool) -> None:
    operator: Any = make_operator(SETTINGS | {"field": "x.y", "tolerance": tolerance})
    assert operator.do_agree({"x": {"y": a}}, {"x": {"y": b}}) is expected


def test_the_plan_is_that_of_the_worst_case() -> None:
    size = SizeEstimate(1000, 50.0, None, 200)
    probe, small, again, large = make_operator(SETTINGS).plan(size)
    assert (small.calls, small.is_small, large.calls, large.is_small) == (1000, True, 1000, False)
    assert (probe.calls, again.calls, again.is_small) == (3, 4000, True)
    assert again.level == "small, again, only without log probabilities"
    assert small.prompt_tokens > 50_000
    assert large.answer_tokens == 200_000
    assert make_operator(SETTINGS | {"samples": 5}).plan(size)[0].calls == 5000


@pytest.mark.parametrize(("items", "probed"), [(0, 0), (2, 2), (47, 3), (94, 3), (147, 3)])
def test_as_many_items_as_there_are_show_whether_there_are_log_probabilities(
    items: int, probed: int
) -> None:
    plan = make_operator(SETTINGS).plan(SizeEstimate(items, 50.0, None, 200))
    assert (plan[0].calls, plan[0].answer_tokens) == (probed, 200 * probed)


@pytest.mark.long
@pytest.mark.parametrize(("delta", "most"), [(0.1, 30), (0.05, 18)])
@pytest.mark.parametrize("has_logprobs", [True, False])
async def test_the_target_is_rarely_missed(delta: float, most: int, has_logprobs: bool) -> None:
    misses = 0
    for seed in range(200):
        models = Models(seed)
        models.has_logprobs = has_logprobs
        end = await run(models, 1000, target=0.95, delta=delta, seed=seed)
        wrong = sum(one.output["label"] != models.truth(one.row["text"]) for one in end.results)
        misses += wrong > 50
    assert misses <= most
