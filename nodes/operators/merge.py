"""``merge``: the answers about the parts of each document, put together without a call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Final

from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import find_properties
from ...backends.core.samples import SampleFold, concat_answers, make_rule
from ...backends.core.terminal import count_nouns
from ...backends.core.types import PART_COLUMN, Item, Row
from .base import LevelPlan, Operator, OperatorEnd, SizeEstimate, StageResult, StageTools
from .parts import (
    PARTS,
    PARTS_SCHEMA,
    LostDocument,
    describe_lost,
    describe_parts,
    find_lost_documents,
    read_part,
)

_SLICE: Final = 256


@dataclass(frozen=True)
class Merge(Operator):
    """Put the answers about parts together; see ``MergeConfig`` for the settings."""

    op: ClassVar[str] = "merge"
    passes_columns: ClassVar[bool] = True
    result_schema: ClassVar[Mapping[str, Any]] = {}

    field: str = ""
    how: str = "concat"
    text: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the answers and of the parts."""
        return (self.field, PART_COLUMN)

    def describe_results(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the schema of merged answers.

        Raises:
            ConfigurationError: The items are no parts of documents.
        """
        columns = find_properties(rows)
        if not {self.field, PART_COLUMN} <= columns.keys():
            have = ", ".join(columns)
            raise ConfigurationError(
                f"merge needs the columns {self.field!r} and {PART_COLUMN!r}, which input.split "
                f"adds; the items have {have}"
            )
        schema = columns[self.field]
        return dict(_make_fold(schema).fold_schema(schema) or {})

    def describe_columns(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the schema of the columns of documents."""
        left_out = {self.field, PART_COLUMN, self.text}
        kept = {k: v for k, v in rows["properties"].items() if k not in left_out}
        return {**rows, "properties": kept | {PARTS: PARTS_SCHEMA}}

    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return no levels: the model is not asked."""
        del size
        return []

    async def run(self, tools: StageTools) -> OperatorEnd:
        """Return one result for each document."""
        documents = _Documents(self, tools)
        counts = await asyncio.to_thread(documents.count)
        found = count_nouns(counts["documents"], "document")
        lines = [f"{found} from {count_nouns(counts['parts'], 'part')}"]
        if counts["missing"]:
            are = "is" if counts["missing"] == 1 else "are"
            missing = count_nouns(counts["missing"], "part")
            lines.append(f"{missing} {are} missing: failed, or not selected")
        if documents.lost:
            lines.append(describe_lost(documents.lost))
        report = {"op": self.op, "items": len(tools.items), **counts, "lines": lines}
        return OperatorEnd(documents, report)


class _Documents:
    """The results, read from the items whenever they are iterated."""

    def __init__(self, merge: Merge, tools: StageTools) -> None:
        self._merge, self._tools = merge, tools
        schema = find_properties(tools.row_schema).get(merge.field)
        self._fold = _make_fold(schema)
        self._schema = {"type": "string"} if schema is None else schema
        self.lost: list[LostDocument] = []

    def count(self) -> dict[str, int]:
        """Count documents, parts and missing parts, and find the lost documents; blocks."""
        found, known = {"documents": 0, "parts": 0, "missing": 0}, set[str]()
        for parts in self._group():
            about = read_part(parts[0])
            known.add(about["document"])
            found["documents"] += 1
            found["parts"] += len(parts)
            found["missing"] += max(0, about["of"] - len(parts))
        self.lost = find_lost_documents(self._tools.read_failed(), known)
        return found | {"lost_documents": len(self.lost)}

    def __iter__(self) -> Iterator[StageResult]:
        """Yield the documents; blocks."""
        for parts in self._group():
            answers = [item.row[self._merge.field] for item in parts]
            folded = self._fold.fold(answers).output
            output = folded
            if self._merge.how == "concat":
                output = concat_answers(folded, answers, self._schema, self._schema)
            about = read_part(parts[0])
            places = describe_parts([(item.id, read_part(item)) for item in parts], about["of"])
            row = self._keep_columns(parts[0].row) | {PARTS: places}
            yield StageResult(about["document"], output, row)
        for lost in self.lost:
            yield lost.to_result(self._keep_columns(lost.row))

    def _group(self) -> Iterator[list[Item]]:
        """Yield the parts of each document, which follow each other."""
        items = self._iter_items()
        for _, some in groupby(items, key=lambda item: read_part(item)["document"]):
            yield list(some)

    def _iter_items(self) -> Iterator[Item]:
        for lo in range(0, len(self._tools.items), _SLICE):
            yield from self._tools.items.read(lo, min(len(self._tools.items), lo + _SLICE))

    def _keep_columns(self, row: Row) -> Row:
        left_out = (self._merge.field, PART_COLUMN, self._merge.text)
        return {name: value for name, value in row.items() if name not in left_out}


def _make_fold(schema: Mapping[str, Any] | None) -> SampleFold:
    return SampleFold(_LEAST, make_rule(None, schema))


_LEAST: Final = 2
"""Samples of a fold, which its result only counts."""
