"""The text of an item in the prompts of an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import orjson

from ...backends.core.templates import Template
from ...backends.core.types import Item
from .base import StageTools

_SLICE: Final = 256


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


def read_items(tools: StageTools, indices: Sequence[int]) -> Iterator[Item]:
    """Yield items by rising indices, consecutive ones in reads of some hundred; blocks."""
    for at in range(0, len(indices), _SLICE):
        some = indices[at : at + _SLICE]
        starts = [0, *(n for n, (a, b) in enumerate(pairwise(some), 1) if b != a + 1)]
        for lo, hi in pairwise([*starts, len(some)]):
            yield from tools.items.read(some[lo], some[hi - 1] + 1)


def escape_braces(text: str) -> str:
    """Return a text with its braces doubled, so that it is constant in a template."""
    return text.replace("{", "{{").replace("}", "}}")
