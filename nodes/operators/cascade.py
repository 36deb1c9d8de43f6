"""``cascade``: a small model answers all items, and a large one those that are uncertain."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as data_field
from typing import Any, ClassVar, Final

from ...backends.core.fields import FieldPath, split_column
from ...backends.core.money import NANO_PER_USD
from ...backends.core.terminal import count_nouns
from ...backends.core.types import PART_COLUMN, Json, Row
from ..item.part import is_part
from .base import (
    Answer,
    LevelPlan,
    LevelTask,
    Operator,
    OperatorEnd,
    Question,
    SizeEstimate,
    StageResult,
    StageTools,
)
from .item_text import read_items
from .threshold import Allocation, allocate

_SAMPLES: Final = 5
"""Answers of a small model whose server returns no log probabilities."""
_PROBED: Final = 3
"""Items that show whether it does: one of them may fail for a reason of its own."""
_LEAST_TEMPERATURE: Final = 0.7
"""Temperature of the small model's further answers, unless it has one above 0."""
_ROUNDING: Final = 1e-9
"""Difference of numbers that computing with them may cause."""
_FEW_TOKENS: Final = 100
"""Tokens of a chat template and of a schema beside the texts of a task."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cascade(Operator):
    """Answer each item by one of two models; see ``CascadeConfig`` for the settings.

    Attributes:
        task: The section ``task`` of the stage.
        names: Columns that each question has, or fields inside them.
    """

    op: ClassVar[str] = "cascade"
    passes_columns: ClassVar[bool] = True

    field: str = ""
    small: Mapping[str, Any] = data_field(default_factory=dict)
    target: float = 0.95
    delta: float = 0.1
    tolerance: float | None = None
    samples: int | None = None
    seed: int = 0
    task: Mapping[str, Json] = data_field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that the prompt names."""
        return self.names

    def describe_results(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the schema of the task."""
        del rows
        schema: Mapping[str, Any] = self.task["schema"]
        return schema

    async def run(self, tools: StageTools) -> OperatorEnd:
        """Ask the small model about all items, then the large one about samples and the rest."""
        work = _Work(self, tools)
        certainties = await work.ask_small()
        found = await allocate(
            certainties,
            work.ask_sample,
            target=self.target,
            delta=self.delta,
            round_size=tools.streams,
            seed=self.seed,
        )
        await work.ask_large([item for item in found.large if item not in work.large])
        report = await asyncio.to_thread(work.report, found)
        return OperatorEnd(_Results(work, frozenset(found.small), certainties), report)

    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return the calls of both models if the large one answers all items, too."""
        texts = f"{self.task.get('system') or ''}{self.task.get('prompt') or ''}"
        prompt = int(size.items * (size.tokens_per_item + len(texts) / 3 + _FEW_TOKENS))
        answers, more = size.items * size.answer_tokens, self.samples or 1
        plans = [LevelPlan("small", more * size.items, more * prompt, more * answers, True)]
        if self.samples is None:
            probed, most, more = min(_PROBED, size.items), max(1, size.items), _SAMPLES - 1
            name = "small, again, only without log probabilities"
            plans = [
                LevelPlan(
                    "small, log probabilities",
                    probed,
                    probed * prompt // most,
                    probed * answers // most,
                    True,
                ),
                *plans,
                LevelPlan(name, more * size.items, more * prompt, more * answers, True),
            ]
        return [*plans, LevelPlan("large, at most", size.items, prompt, answers)]

    def make_small_task(self, *, graded: bool = False, more: int = 0) -> LevelTask:
        """Return what the small model is asked.

        Args:
            graded: Ask for log probabilities.
            more: Further answers to each item, in place of the first one.
        """
        task = dict(self.task)
        model: dict[str, Json] = {"name": None, "price": None, **self.small.get("model", {})}
        if more:
            task["samples"] = more
            model["temperature"] = model.get("temperature") or _LEAST_TEMPERATURE
        elif graded:
            task["certainty"] = self.field
        return LevelTask(task, model, self.small.get("endpoints"), asks_again=more > 0)

    def do_agree(self, a: Json, b: Json) -> bool:
        """Return True if two answers agree in the field."""
        path = FieldPath.parse(self.field)
        one, other = path.pick_one(a, {}), path.pick_one(b, {})
        if _is_number(one) and _is_number(other):
            return bool(abs(one - other) <= (self.tolerance or 0.0) + _ROUNDING)
        return type(one) is type(other) and bool(one == other)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Work:
    """The answers of both models.

    Attributes:
        small: Answers of the small model, by item.
        large: Where the answers of the large model are, by item: a level and a place in it.
    """

    def __init__(self, cascade: Cascade, tools: StageTools) -> None:
        self.cascade, self.tools = cascade, tools
        self.small: Sequence[Answer] = ()
        self.large = dict[int, tuple[Sequence[Answer], int]]()
        self._levels = list[Sequence[Answer]]()
        self._samples = cascade.samples
        self._rounds = self._uncertain = 0

    async def ask_small(self) -> list[float]:
        """Ask the small model about all items; return its certainty by item."""
        cascade, items = self.cascade, range(len(self.tools.items))
        if self._samples is None and not await self._has_logprobs():
            self._samples = _SAMPLES
            logger.warning("cascade: %s", self._describe_certainty())
        graded = self._samples is None
        self.small = await self._ask("small", cascade.make_small_task(graded=graded), items)
        if self._samples is None:
            return await asyncio.to_thread(self._read_certainties)
        more = self._samples - 1
        again = await self._ask("small, again", cascade.make_small_task(more=more), items)
        return await asyncio.to_thread(self._count_agreement, again, more)

    async def _has_logprobs(self) -> bool:
        """Ask about a few items, to find out whether the server returns log probabilities."""
        items = range(min(_PROBED, len(self.tools.items)))
        task = self.cascade.make_small_task(graded=True)
        answers = await self._ask("small, log probabilities", task, items)
        done = [one for one in answers if one.is_done]
        return not done or any(one.record.get("certainty") is not None for one in done)

    def _describe_certainty(self) -> str:
        """Return what the certainty of the small model is, if it is not what was asked for."""
        return (
            f"the server of the small model returned no log probabilities for "
            f"{self.cascade.field!r}: its certainty is the agreement of {self._samples} answers"
        )

    async def ask_sample(self, items: Sequence[int]) -> list[bool | None]:
        """Ask the large model about a sample; return whether the small one agrees."""
        self._rounds += 1
        await self._ask_large(f"sample {self._rounds}", items)
        return await asyncio.to_thread(lambda: [self._is_agreed(item) for item in items])

    async def ask_large(self, items: Sequence[int]) -> None:
        """Ask the large model about the items that are left for it."""
        if items:
            await self._ask_large("large", items)

    async def _ask_large(self, level: str, items: Sequence[int]) -> None:
        ordered = sorted(items)
        answers = await self._ask(level, LevelTask(self.cascade.task), ordered)
        self.large |= {item: (answers, place) for place, item in enumerate(ordered)}

    async def _ask(self, level: str, task: LevelTask, items: Sequence[int]) -> Sequence[Answer]:
        answers = await self.tools.ask(level, task, self._questions(items))
        self._levels.append(answers)
        return answers

    def _questions(self, items: Sequence[int]) -> Iterator[Question]:
        for item in read_items(self.tools, items):
            yield Question(item.id, self._pick_columns(item.row))

    def _pick_columns(self, row: Row) -> Row:
        found = (split_column(name, row) for name in self.cascade.names)
        columns = {one[0] for one in found if one is not None}
        if is_part(row):  # a part that is too long is asked in pieces
            columns.add(PART_COLUMN)
        return {name: row[name] for name in row if name in columns}

    def read_large(self, item: int) -> Answer:
        """Return the answer of the large model about an item; blocks."""
        answers, place = self.large[item]
        return answers[place]

    def _is_agreed(self, item: int) -> bool | None:
        answer = self.read_large(item)
        if not answer.is_done:
            return None
        return self.cascade.do_agree(self.small[item].output, answer.output)

    def _read_certainties(self) -> list[float]:
        found = list[float]()
        for answer in self.small:
            certainty = answer.record.get("certainty") if answer.is_done else None
            self._uncertain += answer.is_done and certainty is None
            found.append(-math.inf if certainty is None else float(certainty))
        return found

    def _count_agreement(self, again: Sequence[Answer], more: int) -> list[float]:
        """Return the share of further answers that agree with the first one, by item."""
        cascade, others, found = self.cascade, iter(again), list[float]()
        for answer in self.small:
            same = [
                one.is_done and cascade.do_agree(answer.output, one.output)
                for one, _ in zip(others, range(more), strict=False)
            ]
            found.append(sum(same) / more if answer.is_done else -math.inf)
        return found

    def report(self, found: Allocation) -> dict[str, Any]:
        """Return the guarantee and the savings; blocks."""
        cascade, items = self.cascade, len(self.tools.items)
        answers = [self.read_large(item).record for item in sorted(self.large)]
        models = sorted({str(one["model"]) for one in answers if one.get("model")})
        saved = self._compute_saved(answers, len(found.small))
        name = ", ".join(models) or "the large model"
        notes = list[str]()
        if self._samples != cascade.samples:
            notes.append(self._describe_certainty())
        if self._uncertain:
            notes.append(
                f"{count_nouns(self._uncertain, 'answer')} of the small model without log "
                "probabilities; counted as the least certain"
            )
        return {
            "op": cascade.op,
            "items": items,
            "lines": [
                f"agrees with {name} in {cascade.field} on at least {100 * cascade.target:g} % of "
                f"the items, with probability {1 - cascade.delta:g}",
                _describe_savings(found, items, saved),
                *notes,
            ],
            "field": cascade.field,
            "target": cascade.target,
            "delta": cascade.delta,
            "small": len(found.small),
            "large": len(found.large),
            "large_share": round(len(found.large) / items, 4),
            "sampled": len(found.sampled),
            "agreeing": found.agreeing,
            "certainty": found.certainty,
            "samples": self._samples,
            "without_certainty": self._uncertain,
            "rounds": self._rounds,
            "saved_usd": saved,
        }

    def _compute_saved(self, answers: Sequence[Mapping[str, Any]], calls: int) -> float | None:
        """Return the dollars that the large model alone would cost more; None if not known.

        Answers that were not asked here, e.g. because another run has them, show no price.

        Args:
            answers: Records of the large model.
            calls: Its calls that were saved.
        """
        small = self._levels[: len(self._levels) - self._count_large_levels()]
        large, spent = sum(one["nano_usd"] for one in answers), 0
        if not large or any(map(_is_taken_over, answers)):
            return None
        for record in (one.record for level in small for one in level):
            if _is_taken_over(record):
                return None
            spent += record["nano_usd"]
        return float(round((large / len(answers) * calls - spent) / NANO_PER_USD, 6))

    def _count_large_levels(self) -> int:
        return len({id(answers) for answers, _ in self.large.values()})


def _is_taken_over(record: Mapping[str, Any]) -> bool:
    return bool(record.get("reused") or record.get("origin"))


def _describe_savings(found: Allocation, items: int, saved: float | None) -> str:
    dollars, share = "", 100 * len(found.large) / items
    if saved is not None:
        digits = 2 if abs(saved) >= 1 else 6
        dollars = (
            f", {abs(saved):,.{digits}f} USD {'less' if saved >= 0 else 'more'} than with it alone"
        )
    return (
        f"{len(found.large):,} of {count_nouns(items, 'item')} ({share:.0f} %) went to the "
        f"large model, {len(found.sampled):,} of them to measure the agreement; "
        f"{len(found.small):,} of its calls saved{dollars}"
    )


@dataclass(frozen=True)
class _Results:
    """The result of each item, read when it is iterated; blocks.

    Attributes:
        work: The answers.
        kept: Items that keep the answer of the small model.
        certainties: Certainty of the small model by item.
    """

    work: _Work
    kept: frozenset[int]
    certainties: Sequence[float]

    def __iter__(self) -> Iterator[StageResult]:
        work, small = self.work, iter(self.work.small)
        for item in read_items(work.tools, range(len(work.tools.items))):
            answer = next(small)
            if item.index not in self.kept:
                answer = work.read_large(item.index)
            certainty = self.certainties[item.index]
            record = {
                "certainty": None if certainty == -math.inf else certainty,
                **{name: answer.record.get(name) for name in ("model", "endpoint", "raw")},
            }
            yield StageResult(
                item.id, answer.output, item.row, answer.error_class, answer.error, record
            )
