"""Datasets by name: small ones that fanfold ships, and one that RDKit ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from ..core.errors import InputError
from ..core.types import Row
from .chemistry import NCI, nci_file
from .delimited import read_delimited, read_smi
from .jsonl import read_jsonl
from .messages import did_you_mean
from .sources import Source, at_line

_SHIPPED: Final = {
    "molecules": ("molecules.csv", "mol_id"),
    "abstracts": ("abstracts.jsonl", "id"),
    "topics": ("topics.csv", "topic_id"),
    "records": ("records.jsonl", "record_id"),
}
DATASETS: Final = (*_SHIPPED, NCI)
"""Names that ``input.dataset`` may have."""


def open_dataset(name: str) -> Source:
    """Open a dataset.

    Args:
        name: One of `DATASETS`.

    Returns:
        The source.

    Raises:
        InputError: There is no such dataset.
        MissingExtraError: The dataset comes with an extra that is not installed.
    """
    if name == NCI:
        path = nci_file()
        return Source(
            f"dataset {name}",
            partial(_nci_rows, path),
            at_line(path),
            id="mol_id",
            drop_unparsable="smiles",
        )
    if name not in _SHIPPED:
        hint = did_you_mean(name, DATASETS)
        raise InputError(
            f"input.dataset: there is no dataset {name!r}; there are {', '.join(DATASETS)}{hint}"
        )
    file, column = _SHIPPED[name]
    return Source(f"dataset {name}", partial(_shipped_rows, file), at_line(Path(file)), id=column)


def _shipped_rows(file: str) -> Iterator[tuple[int, Row]]:
    read: Callable[[Path], Iterator[tuple[int, Row]]]
    read = read_jsonl if file.endswith(".jsonl") else partial(read_delimited, delimiter=",")
    with as_file(files("fanfold.configs") / "data" / file) as path:
        yield from read(path)


def _nci_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for line, row in read_smi(path):
        yield line, {"mol_id": row["name"], "smiles": row["smiles"]}
