"""``summarize``: one summary of many items, by a tree of summaries that keeps their sources."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import orjson

from ...backends.core.fields import split_column
from ...backends.core.types import Item, Json, Row
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
from .item_text import escape_braces, list_text_columns, read_items, render_item

SHOWN_IDS: Final = 5
"""Ids of items that a statement shows; ``sources`` has all."""
_MOST_GROUP: Final = 6000
_OVERHEAD: Final = 600
"""Tokens of a prompt besides the texts of its group and ``prompt``."""
_SLICE: Final = 256
_LEAST: Final = 2
"""Summaries that a merge takes at least, so that every level has fewer than the one before."""
_ALL: Final = "all"
"""Id of the only summary."""

_LEAF: Final = """\
{instruction}

Below are texts, each after its id in square brackets. Summarize what they state, in at most \
{statements} statements. For each statement list the ids of the texts it is based on, exactly as \
they are written.

{texts}"""
_MERGE: Final = """\
{instruction}

Below are statements from summaries, each after its id in square brackets. Merge them into at most \
{statements} statements: combine those that say the same, keep what is new. For each statement \
list the ids of the statements it is based on, exactly as they are written.

{texts}"""


def _answer_schema(most: int) -> dict[str, Any]:
    statement = {
        "type": "object",
        "additionalProperties": False,
        "required": ["text", "ids"],
        "properties": {
            "text": {"type": "string", "minLength": 1},
            "ids": {"type": "array", "items": {"type": "string"}},
        },
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["statements"],
        "properties": {"statements": {"type": "array", "items": statement, "maxItems": most}},
    }


@dataclass(frozen=True, slots=True)
class _Statement:
    """A statement with the ids of all items that it is based on, in the order of the input."""

    text: str
    sources: tuple[str, ...]


@dataclass(slots=True)
class _Node:
    """A summary within the tree.

    Attributes:
        group: The group that it belongs to.
        statements: Its statements.
        failed: Questions below it that failed.
        unknown: Ids in answers that were not in their group.
    """

    group: str
    statements: list[_Statement] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unknown: int = 0


@dataclass(frozen=True)
class Summarize(Operator):
    """Summarize all items, or each group of them; see ``SummarizeConfig`` for the settings."""

    op: ClassVar[str] = "summarize"
    result_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["statements", "items", "failed", "unknown_ids"],
        "properties": {
            "statements": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["text", "ids", "sources"],
                    "properties": {
                        "text": {"type": "string"},
                        "ids": {"type": "array", "items": {"type": "string"}},
                        "sources": {"type": "array", "items": {"type": "string"}},
                    },
                },
            },
            "items": {"type": "integer"},
            "failed": {"type": "array", "items": {"type": "string"}},
            "unknown_ids": {"type": "integer"},
        },
    }

    prompt: str = ""
    text: str | None = None
    group_by: str | None = None
    group_tokens: int | None = None
    statements: int = 10
    system: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of ``text`` and ``group_by``."""
        return (
            *list_text_columns(self.text),
            *((self.group_by,) if self.group_by is not None else ()),
        )

    async def run(self, tools: StageTools) -> OperatorEnd:
        """Summarize groups of items, then merge the summaries until each group has one."""
        most = self._most_tokens(tools.context_tokens, tools.answer_tokens)
        counts = dict[str, int]()
        leaves = await self._pack_items(tools, most, counts)
        answers = await tools.ask("leaves", self._task(_LEAF), self._ask_items(tools, leaves))
        nodes = await asyncio.to_thread(self._read_leaves, tools, leaves, answers)
        level = 1
        while len(nodes) > len(counts):
            level += 1
            groups = await self._pack_nodes(tools, nodes, most)
            asked = [group for group in groups if len(group) > 1]
            task = self._task(_MERGE)
            answers = await tools.ask(f"merge {level}", task, self._ask_nodes(asked))
            merged = iter(answers)
            nodes = [
                group[0] if len(group) == 1 else self._merge(group, next(merged))
                for group in groups
            ]
        results = [self._present(node, counts[node.group]) for node in nodes]
        report = {
            "op": self.op,
            "items": sum(counts.values()),
            "groups": len(counts),
            "levels": level,
            "failed": sum(len(node.failed) for node in nodes),
            "unknown_ids": sum(node.unknown for node in nodes),
        }
        return OperatorEnd(results, report)

    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return the levels of one tree over all items."""
        most = self._most_tokens(size.context_tokens, size.answer_tokens)
        fixed = _OVERHEAD + len(self.prompt) + len(self.system)
        per_group = max(1.0, most // max(1.0, size.tokens_per_item))
        calls, tokens = -(-size.items // int(per_group)), size.items * size.tokens_per_item
        plans, level = list[LevelPlan](), 1
        answer = size.answer_tokens
        while True:
            name = "leaves" if level == 1 else f"merge {level}"
            plans.append(LevelPlan(name, calls, int(tokens) + calls * fixed, calls * answer))
            if calls == 1:
                return plans
            tokens, level = float(calls * answer), level + 1
            calls = -(-calls // max(_LEAST, int(most // max(1, answer))))

    def _most_tokens(self, context: int | None, answer: int) -> int:
        """Return the most tokens of the texts of one group."""
        if self.group_tokens is not None:
            return self.group_tokens
        left = _MOST_GROUP if context is None else context - answer - _OVERHEAD
        return max(100, min(_MOST_GROUP, left - len(self.prompt) // 3))

    def _task(self, template: str) -> LevelTask:
        task = {
            "system": self.system,
            "prompt": template.replace("{instruction}", escape_braces(self.prompt)).replace(
                "{statements}", str(self.statements)
            ),
            "schema": _answer_schema(self.statements),
        }
        return LevelTask(task)

    async def _pack_items(
        self, tools: StageTools, most: int, counts: dict[str, int]
    ) -> list[tuple[str, list[int]]]:
        """Return the leaves, each with the name of its group and the indices of its items.

        Args:
            tools: What the operator may use.
            most: Most tokens of a leaf.
            counts: Receives the items of each group.
        """
        packed = dict[str, list[list[int]]]()
        used = dict[str, int]()
        async for item, tokens in self._count_items(tools):
            group = self._read_group(item.row)
            counts[group] = counts.get(group, 0) + 1
            leaves = packed.setdefault(group, [])
            if not leaves or used[group] + tokens > most:
                leaves.append([])
                used[group] = 0
            leaves[-1].append(item.index)
            used[group] += tokens
        return [(group, leaf) for group, leaves in packed.items() for leaf in leaves]

    async def _count_items(self, tools: StageTools) -> AsyncIterator[tuple[Item, int]]:
        for lo in range(0, len(tools.items), _SLICE):
            hi = min(len(tools.items), lo + _SLICE)
            some = await asyncio.to_thread(tools.items.read, lo, hi)
            texts = [self._render(item) for item in some]
            for item, tokens in zip(some, await tools.count_tokens(texts), strict=True):
                yield item, tokens

    def _read_group(self, row: Row) -> str:
        if self.group_by is None:
            return _ALL
        value = _pick(row, self.group_by)
        return value if isinstance(value, str) else orjson.dumps(value).decode()

    def _render(self, item: Item) -> str:
        return f"[{item.id}] {render_item(item, self.text)}"

    def _ask_items(
        self, tools: StageTools, leaves: Sequence[tuple[str, list[int]]]
    ) -> Iterator[Question]:
        for number, (_, indices) in enumerate(leaves, start=1):
            texts = [self._render(item) for item in read_items(tools, indices)]
            yield Question(f"leaf {number}", {"texts": "\n\n".join(texts)})

    def _read_leaves(
        self,
        tools: StageTools,
        leaves: Sequence[tuple[str, list[int]]],
        answers: Iterable[Answer],
    ) -> list[_Node]:
        nodes = list[_Node]()
        for (group, indices), answer in zip(leaves, answers, strict=True):
            ids = {item.id: (item.id,) for item in read_items(tools, indices)}
            nodes.append(_make_node(group, answer, ids))
        return nodes

    async def _pack_nodes(
        self, tools: StageTools, nodes: Sequence[_Node], most: int
    ) -> list[list[_Node]]:
        """Return the summaries to merge, in order; those of one group only."""
        texts = ["\n\n".join(statement.text for statement in node.statements) for node in nodes]
        groups, used = list[list[_Node]](), 0
        for node, tokens in zip(nodes, await tools.count_tokens(texts), strict=True):
            last = groups[-1] if groups else []
            fits = used + tokens <= most or len(last) < _LEAST
            if not last or last[0].group != node.group or not fits:
                groups.append([])
                used = 0
            groups[-1].append(node)
            used += tokens
        return groups

    @staticmethod
    def _ask_nodes(groups: Iterable[Sequence[_Node]]) -> Iterator[Question]:
        for number, group in enumerate(groups, start=1):
            statements = (one for node in group for one in node.statements)
            texts = [f"[s{at}] {one.text}" for at, one in enumerate(statements, start=1)]
            yield Question(f"merge {number}", {"texts": "\n\n".join(texts)})

    @staticmethod
    def _merge(group: Sequence[_Node], answer: Answer) -> _Node:
        statements = [one for node in group for one in node.statements]
        ids = {f"s{at}": one.sources for at, one in enumerate(statements, start=1)}
        merged = _make_node(group[0].group, answer, ids)
        if not answer.is_done:
            merged.statements = statements  # nothing is lost; the next level is longer
        merged.failed = [name for node in group for name in node.failed] + merged.failed
        merged.unknown += sum(node.unknown for node in group)
        return merged

    @staticmethod
    def _present(node: _Node, items: int) -> StageResult:
        statements = [
            {"text": one.text, "ids": list(one.sources[:SHOWN_IDS]), "sources": list(one.sources)}
            for one in node.statements
        ]
        output = {
            "statements": statements,
            "items": items,
            "failed": node.failed,
            "unknown_ids": node.unknown,
        }
        return StageResult(node.group, output)


def _make_node(group: str, answer: Answer, ids: Mapping[str, tuple[str, ...]]) -> _Node:
    """Return the summary in an answer; ids that were not in the question are left out."""
    if not answer.is_done:
        return _Node(group, failed=[answer.id])
    node = _Node(group)
    for found in answer.output["statements"]:
        known = [name for name in dict.fromkeys(found["ids"]) if name in ids]
        node.unknown += len(found["ids"]) - len(known)
        sources = dict.fromkeys(source for name in known for source in ids[name])
        node.statements.append(_Statement(found["text"], tuple(sources)))
    return node


def _pick(row: Row, name: str) -> Json:
    found = split_column(name, row)
    if found is None:
        return None
    value = row[found[0]]
    for key in found[1]:
        value = value.get(key) if isinstance(value, dict) else None
    return value
