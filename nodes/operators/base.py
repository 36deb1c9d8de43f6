"""What an operator is: a deterministic coroutine that asks the model in levels.

An operator knows nothing of run folders, fleets and budgets. It reads the items of its stage and
awaits ``ask`` once for each level. A level is an ordinary run of the map-reduce graph: it has a
folder, a journal and a share of the budget. When a session continues an operator, the coroutine
starts again from its beginning; the levels that have ended return their answers at once. Therefore
the questions of a level may depend only on the items, the settings, and the answers of earlier
levels: not on time, chance, sets of texts, or the order in which answers arrived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ...backends.core.types import Item, Json, Row


@dataclass(frozen=True, slots=True)
class LevelTask:
    """What is asked in a level.

    Attributes:
        task: Section ``task``: prompt, system, schema and so on; what it lacks has the default of
            that section, not the value of the stage.
        model: Changes to the section ``model`` of the stage, such as a name or a temperature.
        endpoints: Endpoints in place of those of the stage, as in the settings, or None.
        is_requests: The questions are requests in OpenAI's batch format (columns ``url`` and
            ``body``), and ``task`` is empty.
        asks_again: The questions are those of an earlier level, whose answers do not count for
            this one.
    """

    task: Mapping[str, Json]
    model: Mapping[str, Json] = field(default_factory=dict)
    endpoints: Mapping[str, Json] | str | None = None
    is_requests: bool = False
    asks_again: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a level.

    Attributes:
        id: Its name, unique in the level.
        row: The columns that the prompt of the level names.
    """

    id: str
    row: Row


@dataclass(frozen=True, slots=True)
class Answer:
    """How a question ended.

    Attributes:
        id: Name of the question.
        output: The answer; None if it failed.
        error_class: Class of the error, or None.
        error: Its text, or None.
        record: The whole journal record, for whatever else is in it.
    """

    id: str
    output: Json
    error_class: str | None
    error: str | None
    record: Mapping[str, Json]

    @property
    def is_done(self) -> bool:
        """Return True if there is an answer."""
        return self.error_class is None


class Ask(Protocol):
    """Asks the questions of a level."""

    async def __call__(
        self, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> Sequence[Answer]:
        """Ask all questions of a level; return when all have ended.

        Levels follow each other: a second call must not begin before the first has returned.

        Args:
            level: Name of the level for people, such as ``merge 2``.
            task: What is asked.
            questions: The questions, at least one; they are read once, in a thread.

        Returns:
            The answers in the order of the questions; they are read from disk when they are used.

        Raises:
            RunStoppedError: The session ends before the level does.
            BudgetExhaustedError: The budget does not cover the level.
            ConfigurationError: The questions differ from those that an earlier session stored.
        """
        ...


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item that failed in an earlier stage, so that it is no item of this one.

    Attributes:
        item: The item.
        error_class: Class of the error.
        error: Its text.
    """

    item: Item
    error_class: str
    error: str


class Items(Protocol):
    """The items of a stage."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items ``lo`` to ``hi`` (exclusive); blocks."""
        ...

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        """Return the items at some indices, in their order; blocks."""
        ...

    def read_ids(self, lo: int, hi: int) -> list[str]:
        """Return the ids of the items ``lo`` to ``hi`` (exclusive); blocks."""
        ...

    def find_longest_row(self) -> int:
        """Return the bytes of the longest item, with its columns as compact JSON; blocks."""
        ...


async def cannot_count(_text: str) -> int | None:
    """Return None: there is no exact count."""
    return None


def no_failed_items() -> Iterable[FailedItem]:
    """Return no items."""
    return ()


@dataclass(frozen=True)
class StageTools:
    """What an operator may use.

    Attributes:
        items: The items of the stage, in the order of the input.
        columns: Their columns.
        ask: Asks the questions of a level.
        count_tokens: Counts the tokens of texts, as a model of the stage does or by an estimate
            that tends to be too high; one stage counts in one way in all of its sessions.
        context_tokens: The model's context in tokens, or None if no endpoint says it.
        answer_tokens: Most tokens of one answer.
        folder: Folder of the stage, for files that the operator adds; a later session finds them.
        count_exact: Counts the tokens of a text as the model does, None where no endpoint offers
            it; asked for the same texts in the same order, it returns the same in all sessions.
        row_schema: JSON Schema of the rows of the items.
        streams: Questions that are asked at the same time (``limits.streams``); the same in all
            sessions of the stage.
        read_failed: Returns the items that failed in the stages before this one; blocks.
    """

    items: Items
    columns: Sequence[str]
    ask: Ask
    count_tokens: Callable[[Sequence[str]], Awaitable[list[int]]]
    context_tokens: int | None
    answer_tokens: int
    folder: Path = field(default_factory=Path)
    row_schema: Mapping[str, Any] = field(default_factory=dict)
    streams: int = 256
    count_exact: Callable[[str], Awaitable[int | None]] = cannot_count
    read_failed: Callable[[], Iterable[FailedItem]] = no_failed_items


@dataclass(frozen=True, slots=True)
class StageResult:
    """One result of an operator, which is an item of the next stage.

    Attributes:
        id: Its name, unique in the stage.
        output: The result, which fits :attr:`Operator.result_schema`; None if it failed.
        row: Columns beside it.
        error_class: Class of the error, or None.
        error: Its text, or None.
        record: Further fields of its record, such as the model that answered.
    """

    id: str
    output: Json
    row: Row = field(default_factory=dict)
    error_class: str | None = None
    error: str | None = None
    record: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OperatorEnd:
    """What an operator has found.

    Attributes:
        results: The results, in order; they are iterated twice, in a thread.
        report: Facts for the report and ``aggregate.json``, such as the number of levels; ``lines``
            are sentences that the command line prints.
    """

    results: Iterable[StageResult]
    report: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """The expected size of a level, for estimates and the reserve of the budget.

    Attributes:
        level: Its name.
        calls: Number of questions.
        prompt_tokens: Tokens of all prompts.
        answer_tokens: Most tokens of all answers.
        is_small: Whether the small model of a cascade answers.
    """

    level: str
    calls: int
    prompt_tokens: int
    answer_tokens: int
    is_small: bool = False


@dataclass(frozen=True, slots=True)
class SizeEstimate:
    """The expected size of an operator's input.

    Attributes:
        items: Number of items, at most.
        tokens_per_item: Tokens of the text of an item.
        context_tokens: The model's context in tokens, or None if it is unknown.
        answer_tokens: Most tokens of one answer.
    """

    items: int
    tokens_per_item: float
    context_tokens: int | None
    answer_tokens: int


class Operator(ABC):
    """An entry of ``reduce`` that asks the model; the fields of a subclass are its settings."""

    op: ClassVar[str]
    """Its name in ``reduce``."""

    result_schema: ClassVar[Mapping[str, Any]]
    """JSON Schema of its results, if it does not depend on its items."""

    passes_columns: ClassVar[bool] = False
    """Whether its results are items of the stage, with their columns."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns, or fields inside columns, that it reads by name."""
        return ()

    def describe_results(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the JSON Schema of its results.

        Args:
            rows: JSON Schema of its items.

        Raises:
            ConfigurationError: The items do not have what it needs.
        """
        del rows
        return self.result_schema

    def describe_columns(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the JSON Schema of the columns beside its results.

        Args:
            rows: JSON Schema of its items.
        """
        return rows if self.passes_columns else {"type": "object", "properties": {}}

    def count_results(self, items: int) -> int:
        """Return the most results of a number of items."""
        return items

    def choose_answer_tokens(self, context_tokens: int | None) -> int | None:
        """Return the most tokens of one answer if the settings do not say it; None: as a map.

        Args:
            context_tokens: The model's context in tokens, or None if it is unknown.
        """
        del context_tokens
        return None

    def find_warnings(self, answer_tokens: int) -> list[str]:
        """Return a line for each setting that is likely to fail.

        Args:
            answer_tokens: Most tokens of one answer.
        """
        del answer_tokens
        return []

    @abstractmethod
    async def run(self, tools: StageTools) -> OperatorEnd:
        """Reduce the items of a stage.

        Args:
            tools: What it may use.
        """

    @abstractmethod
    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return the levels to expect; rather too many than too few."""
