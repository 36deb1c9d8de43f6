"""Input formats: from the settings to the source and the reader that fits its format."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from ...configs.models import InputConfig, RunConfig
from ..core.errors import InputError
from ..core.templates import Template
from ..core.types import Json, Row
from .base import NCI_DATASET, RowSource, describe_line, did_you_mean, find_nci_file
from .lines import unreadable_error
from .readers import find_text_files, read_delimited, read_folder, read_jsonl, read_smi

_SHIPPED: Final = {
    "molecules": ("molecules.csv", "mol_id"),
    "abstracts": ("abstracts.jsonl", "id"),
    "topics": ("topics.csv", "topic_id"),
    "records": ("records.jsonl", "record_id"),
}
DATASETS: Final = (*_SHIPPED, NCI_DATASET)
"""Valid names for ``input.dataset``."""


def open_dataset(name: str) -> RowSource:
    """Open a dataset.

    Args:
        name: One of `DATASETS`.

    Raises:
        InputError: There is no such dataset.
        MissingExtraError: The dataset needs an extra that is not installed.
    """
    if name == NCI_DATASET:
        path = find_nci_file()
        return RowSource(
            f"dataset {name}",
            partial(_nci_rows, path),
            describe_line(path),
            id="mol_id",
            drop_unparsable="smiles",
        )
    if name not in _SHIPPED:
        hint = did_you_mean(name, DATASETS)
        raise InputError(
            f"input.dataset: unknown dataset {name!r}; available: {', '.join(DATASETS)}{hint}"
        )
    file, column = _SHIPPED[name]
    return RowSource(
        f"dataset {name}", partial(_shipped_rows, file), describe_line(Path(file)), id=column
    )


def _shipped_rows(file: str) -> Iterator[tuple[int, Row]]:
    read: Callable[[Path], Iterator[tuple[int, Row]]]
    read = read_jsonl if file.endswith(".jsonl") else partial(read_delimited, delimiter=",")
    with as_file(files("fanfold.configs") / "data" / file) as path:
        yield from read(path)


def _nci_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for line, row in read_smi(path):
        yield line, {"mol_id": row["name"], "smiles": row["smiles"]}


_TEXT_FORMATS: Final[dict[str, Callable[[Path], Iterator[tuple[int, Row]]]]] = {
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".smi": read_smi,
}
_HINTS: Final = {
    ".json": "write one object per line and name it .jsonl (jq -c '.[]' for an array)",
    ".gz": "unpack it first (gunzip)",
    ".xlsx": "save the sheet as .csv",
    ".txt": "rename it after its format, or use the folder of texts as input.path",
    ".md": "rename it after its format, or use the folder of texts as input.path",
}


def open_source(
    config: InputConfig, needed: Collection[str], items: Sequence[Mapping[str, Json]] | None = None
) -> RowSource:
    """Return the source of an input; rows are read later.

    Args:
        config: The settings of the input.
        needed: Required columns.
        items: Rows already in memory, which replace the configured path or dataset.

    Raises:
        InputError: The input does not exist or its format is unsupported.
        MissingExtraError: The dataset needs an extra that is not installed.
    """
    if items is not None:
        return _from_memory(items)
    if config.dataset is not None:
        return open_dataset(config.dataset)
    if config.path is not None:
        return _from_path(Path(config.path), needed)
    raise InputError("input has neither input.path nor input.dataset, and no items are given")


def _from_path(path: Path, needed: Collection[str]) -> RowSource:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        files = find_text_files(path)
        rows = partial(read_folder, path, files)
        return RowSource(f"folder {path}", rows, lambda at: str(path / files[at]), id="file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a regular file; copy its content to a file first")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from .parquet import read_parquet  # noqa: PLC0415 - pyarrow is slow to import

        if not path.stat().st_size:
            raise InputError(f"{path} is empty; input.path must name a file with rows")
        return RowSource(
            str(path), partial(read_parquet, path, needed), lambda row: f"{path}, row {row}"
        )
    if suffix not in _TEXT_FORMATS:
        raise _unknown_format(path, suffix)
    ragged = _TEXT_FORMATS[suffix] is read_jsonl
    return RowSource(
        str(path), partial(_TEXT_FORMATS[suffix], path), describe_line(path), ragged=ragged
    )


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, _list_siblings(path))
        raise InputError(
            f"input.path: {path} does not exist (looked for {path.absolute()}){hint}"
        ) from error
    except OSError as error:
        raise unreadable_error(path, error) from error


def _list_siblings(path: Path) -> list[str]:
    try:
        return [one.name for one in path.parent.iterdir()]
    except OSError:  # only the hint is lost; the missing file is still reported
        return []


def _unknown_format(path: Path, suffix: str) -> InputError:
    known = ", ".join((*_TEXT_FORMATS, ".parquet"))
    hint = _HINTS.get(suffix, "convert or rename the file")
    return InputError(
        f"{path}: unsupported input format: {suffix or 'no suffix'} (supported: {known}, "
        f"or a folder of .txt and .md files); {hint}"
    )


def _from_memory(items: Sequence[Mapping[str, Json]]) -> RowSource:
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise InputError(f"input.items must be a list of objects, not {type(items).__name__}")
    if not items:
        raise InputError("input.items is empty; it must contain at least one object")
    has_id = any(isinstance(item, Mapping) and "id" in item for item in items)
    return RowSource(
        "items",
        partial(_memory_rows, items),
        lambda at: f"items[{at}]",
        id="id" if has_id else None,
        ragged=True,
    )


def _memory_rows(items: Sequence[Mapping[str, Json]]) -> Iterator[tuple[int, Row]]:
    for at, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise InputError(
                f"items[{at}] is not an object but {type(item).__name__}; each item must map "
                "column names to values"
            )
        yield at, dict(item)


def needed_columns(config: RunConfig) -> tuple[str, ...]:
    """Return the columns that the prompt and the reduce stages use, each once."""
    shown = [name for stage in config.reduce for name in getattr(stage, "show", ())]
    return tuple(dict.fromkeys([*Template.parse(config.task.prompt).columns, *shown]))
