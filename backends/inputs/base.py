"""What to read (`InputSpec`) and what was found (`InputSummary`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ..core.errors import InputError
from ..core.types import Item, Json

OnDuplicate: TypeAlias = Literal["error", "first", "suffix"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Where the items come from and how they are named.

    Attributes:
        path: A csv, tsv, jsonl, ndjson, parquet or smi file, or a folder of .txt and .md files.
        dataset: Name of a dataset that comes with fanfold or with an extra.
        items: Rows already in memory.
        id: Column with the items' names. None: the dataset's own id column; the file name for a
            folder; the key ``id`` for ``items`` if any of them has it; else row numbers from 1.
        limit: Number of items after which reading stops, at least 1; None reads all.
        on_duplicate: What a repeated id means: an error; ``first`` keeps the first row;
            ``suffix`` names the others ``x#2``, ``x#3``, ….
        smiles: Column to check with RDKit; items that it cannot parse carry a problem.

    Raises:
        InputError: Not exactly one of path, dataset and items, or a limit below 1.
    """

    path: Path | None = None
    dataset: str | None = None
    items: Sequence[Mapping[str, Json]] | None = None
    id: str | None = None
    limit: int | None = None
    on_duplicate: OnDuplicate = "error"
    smiles: str | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself before any file is opened."""
        given = [key for key in ("path", "dataset", "items") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"input.{key}" for key in given) or "none of them"
            raise InputError(
                "input needs exactly one of input.path, input.dataset and input.items; "
                f"it has {found}"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(
                f"input.limit is {self.limit}; it must be at least 1, or null for all rows"
            )


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that became no item.

    Attributes:
        id: The row's name.
        reason: Why it was left out.
    """

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What the input holds, once read and checked.

    Attributes:
        items: Number of items.
        columns: Names of the columns over all items, in order of appearance.
        digest: BLAKE2b (128 bits, hexadecimal) over ids and rows in order, after the limit.
        skipped: The rows left out, at most the first 1,000.
        skipped_total: Number of rows left out.
        invalid: Number of items that carry a problem.
        source: The input in words, e.g. ``molecules.csv`` or ``dataset molecules``.
        first: The first item.
    """

    items: int
    columns: tuple[str, ...]
    digest: str
    skipped: tuple[Skipped, ...]
    skipped_total: int
    invalid: int
    source: str
    first: Item
