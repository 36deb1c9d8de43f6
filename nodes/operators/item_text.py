"""The text of an item in the prompts of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Final, TypeVar

import orjson

from ...backends.core.templates import Template
from ...backends.core.types import Item
from .base import StageTools

_SLICE: Final = 256
_GAP: Final = 32
"""Distance of indices up to which one read is faster than two."""
_T = TypeVar("_T")


def list_text_columns(text: str | None) -> tuple[str, ...]:
    """Return the columns that the setting ``text`` of an operator names."""
    return () if text is None else _parse_text(text).columns


def render_item(item: Item, text: str | None) -> str:
    """Return the text of an item: by a template, or all of its columns as JSON."""
    if text is None:
        return orjson.dumps(item.row).decode()
    return _parse_text(text).render(item.row)


@lru_cache(maxsize=8)
def _parse_text(text: str) -> Template:
    """Return the setting ``text`` as a template, parsed once for all items."""
    return Template.parse(text, "reduce.text")


def read_items(tools: StageTools, indices: Iterable[int]) -> Iterator[Item]:
    """Yield the items at some indices, which mostly rise, in reads of some hundred; blocks."""
    return _read(tools.items.read, indices)


def read_ids(tools: StageTools, indices: Iterable[int]) -> Iterator[str]:
    """Yield the ids of the items at some indices, as `read_items` does; blocks."""
    return _read(tools.items.read_ids, indices)


def _read(read: Callable[[int, int], list[_T]], indices: Iterable[int]) -> Iterator[_T]:
    """Yield what ``read`` returns for each index; a read includes short gaps between them."""
    for some in _group_near(indices):
        lo, hi = some[0], some[-1] + 1
        found = read(lo, hi)
        yield from found if len(some) == len(found) else (found[at - lo] for at in some)


def _group_near(indices: Iterable[int]) -> Iterator[list[int]]:
    left = iter(indices)
    while chunk := list(islice(left, _SLICE)):
        if chunk == list(range(chunk[0], chunk[0] + len(chunk))):
            yield chunk
        else:
            yield from _split_far(chunk)


def _split_far(indices: Iterable[int]) -> Iterator[list[int]]:
    some = list[int]()
    for index in indices:
        if some and not (0 < index - some[-1] <= _GAP and index - some[0] < _SLICE):
            yield some
            some = []
        some.append(index)
    if some:
        yield some


def escape_braces(text: str) -> str:
    """Return a text with its braces doubled, so that it is constant in a template."""
    return text.replace("{", "{{").replace("}", "}}")
