"""``extract``: each element of a list in the items becomes an item of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from ...backends.core.fields import ELEMENTS, describe_elements, pick_elements, split_elements
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Item, Json, Row
from .base import LevelPlan, Operator, OperatorEnd, SizeEstimate, StageResult, StageTools

_SLICE: Final = 256
_PER_ITEM: Final = 5
"""Elements of an item in estimates."""


@dataclass
class _Counts:
    """What became of the items and elements.

    Attributes:
        without: Items without any element: the list is missing, null or empty.
        no_list: Items that have another value in place of a list.
        empty: Elements that are null, or lack the field that the path ends with.
        cut: Elements above ``limit``.
        elements: Elements that became items.
        most: Most elements of one item.
    """

    without: int = 0
    no_list: int = 0
    empty: int = 0
    cut: int = 0
    elements: int = 0
    most: int = 0


@dataclass(frozen=True)
class Extract(Operator):
    """Make an item of each element of a list; see ``ExtractConfig`` for the settings."""

    op: ClassVar[str] = "extract"
    passes_columns: ClassVar[bool] = True
    result_schema: ClassVar[Mapping[str, Any]] = {}

    path: str = ""
    limit: int = 1000

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column, or the field inside a column, that has the list."""
        return (self.path.partition(ELEMENTS)[0],)

    def describe_results(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the schema of the elements.

        Raises:
            ConfigurationError: The path leads to no list.
        """
        return describe_elements(self.path, rows)

    def describe_columns(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the schema of the columns beside the elements: without the list itself."""
        column, keys = split_elements(self.path, rows["properties"])
        properties = dict(rows["properties"])
        if len(keys) == 1 or keys[0] == ELEMENTS:
            del properties[column]
        return {**rows, "properties": properties}

    def count_results(self, items: int) -> int:
        """Return a usual number of elements; how many there are is not known before."""
        return items * min(self.limit, _PER_ITEM)

    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return no levels: the model is not asked."""
        del size
        return []

    async def run(self, tools: StageTools) -> OperatorEnd:
        """Return the elements of all items, in their order."""
        elements = _Elements(self, tools)
        counts = await asyncio.to_thread(elements.count)
        report = {
            "op": self.op,
            "items": len(tools.items),
            "elements": counts.elements,
            "items_without": counts.without,
            "items_no_list": counts.no_list,
            "empty_elements": counts.empty,
            "elements_above_limit": counts.cut,
            "most_of_an_item": counts.most,
            "lines": list(self._describe(counts, len(tools.items))),
        }
        return OperatorEnd(elements, report)

    def _describe(self, counts: _Counts, items: int) -> Iterator[str]:
        elements = count_nouns(counts.elements, "element")
        yield f"{elements} of {self.path} in {count_nouns(items, 'item')}"
        for count, noun, words in (
            (counts.without, "item", "without any"),
            (counts.no_list, "item", "without a list there"),
            (counts.empty, "element", "left out as null"),
            (counts.cut, "element", f"left out above the limit of {self.limit:,} an item"),
        ):
            if count:
                yield f"{count_nouns(count, noun)} {words}"


@dataclass
class _Elements:
    """The results, read from the items whenever they are iterated."""

    extract: Extract
    tools: StageTools
    taken: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.taken = frozenset()

    def count(self) -> _Counts:
        """Count all elements, and note ids that derived items must not have; blocks."""
        counts, taken = _Counts(), set[str]()
        for item in self._items():
            if "#" in item.id:
                taken.add(item.id)
            self._pick(item, counts)
        self.taken = frozenset(taken)
        return counts

    def __iter__(self) -> Iterator[StageResult]:
        """Yield the results; blocks."""
        counts = _Counts()
        for item in self._items():
            number, rest = 0, None
            for element in self._pick(item, counts):
                number += 1
                while (name := f"{item.id}#{number}") in self.taken:
                    number += 1
                rest = rest if rest is not None else _drop_list(item.row, self.extract.path)
                yield StageResult(name, element, rest)

    def _items(self) -> Iterator[Item]:
        for lo in range(0, len(self.tools.items), _SLICE):
            yield from self.tools.items.read(lo, min(len(self.tools.items), lo + _SLICE))

    def _pick(self, item: Item, counts: _Counts) -> list[Json]:
        found = pick_elements(self.extract.path, item.row)
        if found is None:
            counts.no_list += 1
            return []
        kept = [element for element in found if element is not None]
        counts.empty += len(found) - len(kept)
        counts.cut += max(0, len(kept) - self.extract.limit)
        kept = kept[: self.extract.limit]
        counts.without += not kept
        counts.elements += len(kept)
        counts.most = max(counts.most, len(kept))
        return kept


def _drop_list(row: Row, path: str) -> Row:
    """Return the columns without the list, which each of its elements would repeat."""
    column, keys = split_elements(path, row)
    if len(keys) == 1 or keys[0] == ELEMENTS:
        return {name: value for name, value in row.items() if name != column}
    return {**row, column: _drop_key(row[column], keys)}


def _drop_key(value: Json, keys: tuple[str, ...]) -> Json:
    if not isinstance(value, dict):
        return value
    key, *rest = keys
    if not rest or rest[0] == ELEMENTS:
        return {name: one for name, one in value.items() if name != key}
    return {**value, key: _drop_key(value.get(key), tuple(rest))}
