"""From an `InputSpec` to the source that it names."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ..core.errors import InputError
from ..core.types import Json, Row
from .base import InputSpec
from .datasets import open_dataset
from .delimited import read_delimited, read_smi
from .folder import read_folder, text_files
from .jsonl import read_jsonl
from .lines import unreadable
from .messages import did_you_mean
from .readers import read_parquet
from .sources import Source, at_line

_TEXT_FORMATS: Final[dict[str, Callable[[Path], Iterator[tuple[int, Row]]]]] = {
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".smi": read_smi,
}
_HINTS: Final = {
    ".json": "write one object a line and name it .jsonl (jq -c '.[]' of an array)",
    ".gz": "unpack it first (gunzip)",
    ".xlsx": "save the sheet as .csv",
    ".txt": "rename it after its format, or name the folder that holds the texts",
    ".md": "rename it after its format, or name the folder that holds the texts",
}


def open_source(spec: InputSpec, needed: Collection[str]) -> Source:
    """Find the source of a spec; rows are read later.

    Args:
        spec: What to read.
        needed: Columns that something needs.

    Returns:
        The source.

    Raises:
        InputError: There is nothing that could be read.
        MissingExtraError: The dataset comes with an extra that is not installed.
    """
    if spec.dataset is not None:
        return open_dataset(spec.dataset)
    if spec.path is not None:
        return _from_path(spec.path, needed)
    return _from_memory(spec.items if spec.items is not None else ())


def _from_path(path: Path, needed: Collection[str]) -> Source:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        files = text_files(path)
        rows = partial(read_folder, path, files)
        return Source(f"folder {path}", rows, lambda at: str(path / files[at]), id="file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is no regular file; copy its content to a file first")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        if not path.stat().st_size:
            raise InputError(f"{path} is empty; input.path must name a file with rows")
        return Source(
            str(path), partial(read_parquet, path, needed), lambda row: f"{path}, row {row}"
        )
    if suffix not in _TEXT_FORMATS:
        raise _unknown_format(path, suffix)
    ragged = _TEXT_FORMATS[suffix] is read_jsonl
    return Source(str(path), partial(_TEXT_FORMATS[suffix], path), at_line(path), ragged=ragged)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, _beside(path))
        raise InputError(
            f"input.path: {path} does not exist (looked for {path.absolute()}){hint}"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _beside(path: Path) -> list[str]:
    try:
        return [one.name for one in path.parent.iterdir()]
    except OSError:  # only a hint is lost; the missing file is reported all the same
        return []


def _unknown_format(path: Path, suffix: str) -> InputError:
    known = ", ".join((*_TEXT_FORMATS, ".parquet"))
    hint = _HINTS.get(suffix, "convert or rename the file")
    return InputError(
        f"{path}: the suffix {suffix!r} names no format that can be read ({known}, or a folder "
        f"of .txt and .md files); {hint}"
    )


def _from_memory(items: Sequence[Mapping[str, Json]]) -> Source:
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise InputError(f"input.items must be a list of objects, not {type(items).__name__}")
    if not items:
        raise InputError("input.items is empty; it must hold at least one object")
    has_id = any(isinstance(item, Mapping) and "id" in item for item in items)
    return Source(
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
                f"items[{at}] is no object but {type(item).__name__}; each item must map names "
                "of columns to values"
            )
        yield at, dict(item)
