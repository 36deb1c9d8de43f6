"""A sample of the items, spread over the whole input."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ...backends.core.errors import InvalidItemError
from ...backends.core.templates import Template
from ...backends.core.types import Item, Message
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import ItemStore, spill
from ...backends.inputs.source import input_spec, needed_columns
from ...configs.models import RunConfig
from ...nodes.item.prepare import asked


def spread(total: int, count: int, seed: str = "") -> list[int]:
    """Return so many indices, one by chance out of each of as many equal parts.

    Inputs are often sorted, by length for one; the first items tell little about the others.

    Args:
        total: How many items there are.
        count: How many indices to return, at most all.
        seed: The same seed gives the same indices.
    """
    if count >= total:
        return list(range(total))
    dice = random.Random(seed)
    edges = [part * total // count for part in range(count + 1)]
    return [dice.randrange(lo, hi) for lo, hi in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some items of an input, as they would be asked.

    Attributes:
        summary: What the input holds.
        messages: What would be sent for each item first.
        first_id: Name of the input's first item that can be asked, else of the first.
        first: What would be sent for it; empty if there is none.
    """

    summary: InputSummary
    messages: tuple[list[Message], ...]
    first_id: str
    first: list[Message]


def take_sample(config: RunConfig, count: int) -> Sample:
    """Read an input and render a sample of it; blocks.

    Args:
        config: The settings.
        count: Items to render.

    Raises:
        InputError: The input cannot be read, or does not fit the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.arrow"
        summary = spill(input_spec(config, None), file, needed_columns(config))
        with ItemStore(file) as store:
            chosen = spread(len(store), count, summary.digest)
            rendered = tuple(messages for _, messages in _rendered(config, store, chosen))
            first = next(_rendered(config, store, range(len(store))), (summary.first, []))
    return Sample(summary, rendered, first[0].id, first[1])


def _rendered(
    config: RunConfig, store: ItemStore, indices: Sequence[int]
) -> Iterator[tuple[Item, list[Message]]]:
    """Yield the items that can be asked, with what would be sent."""
    prompt = Template.parse(config.task.prompt)
    for index in indices:
        (item,) = store.read(index, index + 1)
        if item.problem is None:
            try:
                yield item, asked(config.task.system, prompt, item.row)
            except InvalidItemError:
                continue  # it will fail without a call
