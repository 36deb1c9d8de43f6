"""The door of the room: read an input, check all of it, keep it as an item store."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .base import InputSpec, InputSummary
from .item_store import ItemStore
from .screening import Screen
from .source import open_source
from .writer import write_store


def spill(spec: InputSpec, target: Path, columns: Collection[str]) -> InputSummary:
    """Read and check an input and write its items to a store.

    It blocks: from a coroutine call it through `asyncio.to_thread`. Rows are read one by one;
    memory grows with the number of ids only (about 100 bytes each, to find repeated ones).

    Args:
        spec: What to read.
        target: The store's path; its folder must exist. A store that stands there is replaced.
        columns: Columns that the task needs.

    Returns:
        What was found.

    Raises:
        InputError: The input cannot be read, or its rows do not fit; nothing was written.
        MissingExtraError: An extra is needed and not installed; nothing was written.
        LedgerError: The store cannot be written.
    """
    needed = {*columns, *(name for name in (spec.id, spec.smiles) if name is not None)}
    write_store(target, Screen(spec, open_source(spec, needed), columns))
    with ItemStore(target) as store:
        return store.summary()
