"""The text of an item in the prompts of an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import orjson

from ...backends.core.templates import Template
from ...backends.core.types import Item
from .base import StageTools


def list_text_columns(text: str | None) -> tuple[str, ...]:
    """Return the columns that the setting ``text`` of an operator names."""
    return () if text is None else Template.parse(text, "reduce.text").columns


def render_item(item: Item, text: str | None) -> str:
    """Return the text of an item: by a template, or all of its columns as JSON."""
    if text is None:
        return orjson.dumps(item.row).decode()
    return Template.parse(text, "reduce.text").render(item.row)


def read_items(tools: StageTools, indices: Sequence[int]) -> Iterator[Item]:
    """Yield items by rising indices, each run of consecutive ones in one read; blocks."""
    if not indices:
        return
    starts = [0, *(at for at, (a, b) in enumerate(pairwise(indices), 1) if b != a + 1)]
    for lo, hi in pairwise([*starts, len(indices)]):
        yield from tools.items.read(indices[lo], indices[hi - 1] + 1)


def escape_braces(text: str) -> str:
    """Return a text with its braces doubled, so that it is constant in a template."""
    return text.replace("{", "{{").replace("}", "}}")
