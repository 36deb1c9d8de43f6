"""Input formats: from the settings to the source and the reader that fits its format."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from ...configs.models import InputConfig, RunConfig
from ..core.errors import InputError
from ..core.types import Json, Row
from .base import NCI_DATASET, RowSource, describe_line, did_you_mean, find_nci_file
from .batch_requests import read_requests
from .lines import is_gzip, unreadable_error
from .pdf import PDF_SUFFIX, PROBLEM_COLUMN, read_pdfs
from .readers import (
    TEXT_SUFFIXES,
    find_files,
    name_json_position,
    read_delimited,
    read_folder,
    read_json,
    read_jsonl,
    read_smi,
)

if TYPE_CHECKING:
    from .column_types import ArrowTypes

_SHIPPED: Final = {
    "molecules": ("molecules.csv", "mol_id"),
    "abstracts": ("abstracts.jsonl", "id"),
    "topics": ("topics.csv", "topic_id"),
    "records": ("records.jsonl", "record_id"),
    "tables": ("tables.jsonl", "table_id"),
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


_Reader: TypeAlias = Callable[[Path, InputConfig, Collection[str]], Iterator[tuple[int, Row]]]


def _read_csv(path: Path, config: InputConfig, _: Collection[str]) -> Iterator[tuple[int, Row]]:
    return read_delimited(path, ",", quotes=config.quotes is not False)


def _read_tsv(path: Path, config: InputConfig, _: Collection[str]) -> Iterator[tuple[int, Row]]:
    return read_delimited(path, "\t", quotes=config.quotes is True)


def _read_parquet(path: Path, _: InputConfig, needed: Collection[str]) -> Iterator[tuple[int, Row]]:
    from .parquet import read_parquet  # noqa: PLC0415 - pyarrow is slow to import

    if not path.stat().st_size:
        raise InputError(f"{path} is empty; input.path must name a file with rows")
    return read_parquet(path, needed)


def _read_parquet_types(path: Path) -> ArrowTypes:
    from .parquet import read_types  # noqa: PLC0415 - pyarrow is slow to import

    return read_types(path)


@dataclass(frozen=True, slots=True)
class InputFormat:
    """A format of input files.

    Attributes:
        read: Reads a file; yields the position and the row.
        position: What a position counts; a function if that depends on the file.
        ragged: Whether the rows of one file may differ in their columns.
        packed: Whether files may be packed with gzip.
        types: Returns the types that a file declares for its columns.
    """

    read: _Reader
    position: str | Callable[[Path], str] = "line"
    ragged: bool = False
    packed: bool = True
    types: Callable[[Path], ArrowTypes] = lambda _: {}

    def describe(self, path: Path, at: int) -> str:
        """Return a position of a file in words."""
        kind = self.position if isinstance(self.position, str) else self.position(path)
        return f"{path}, {kind} {at}"


_JSONL: Final = InputFormat(lambda path, *_: read_jsonl(path), ragged=True)

FORMATS: Final[dict[str, InputFormat]] = {
    ".csv": InputFormat(_read_csv),
    ".tsv": InputFormat(_read_tsv),
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".json": InputFormat(lambda path, *_: read_json(path), name_json_position, ragged=True),
    ".smi": InputFormat(lambda path, *_: read_smi(path)),
    ".parquet": InputFormat(_read_parquet, "row", packed=False, types=_read_parquet_types),
}
"""The formats of input files, by suffix. To add one, add its reader here."""

_HINTS: Final = {
    ".xlsx": "save the sheet as .csv",
    ".zip": "unpack it first (unzip)",
    ".bz2": "unpack it first (bunzip2)",
    ".xz": "unpack it first (unxz)",
    ".zst": "unpack it first (unzstd)",
    ".txt": "rename it after its format, or use the folder of texts as input.path",
    ".md": "rename it after its format, or use the folder of texts as input.path",
}
_PATTERN: Final = re.compile(r"[*?\[]")
_SPAN: Final = 2**40
"""Positions that each file of several may have."""
_SHOWN_FILES: Final = 3


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
    if config.is_batch:
        return read_requests(_open_rows(config, (), items))
    return _open_rows(config, needed, items)


def _open_rows(
    config: InputConfig, needed: Collection[str], items: Sequence[Mapping[str, Json]] | None
) -> RowSource:
    if items is not None:
        return _from_memory(items)
    if config.dataset is not None:
        return open_dataset(config.dataset)
    if config.path is not None:
        return _from_path(Path(config.path), config, needed)
    raise InputError("input has neither input.path nor input.dataset, and no items are given")


def _from_path(path: Path, config: InputConfig, needed: Collection[str]) -> RowSource:
    if not path.exists() and is_pattern(path):
        return _from_files(f"pattern {path}", path.parent, find_matches(path), config, needed)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return _from_files(f"folder {path}", path, find_files(path), config, needed)
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a regular file; copy its content to a file first")
    if path.suffix.lower() == PDF_SUFFIX:
        return _from_pdfs(str(path), path.parent, [Path(path.name)])
    form = FORMATS.get(get_format_suffix(path), _JSONL if config.is_batch else None)
    if form is None or (is_gzip(path) and not form.packed):
        raise _unknown_format(path)
    return RowSource(
        str(path),
        partial(form.read, path, config, needed),
        partial(form.describe, path),
        ragged=form.ragged,
        types=partial(form.types, path),
    )


def _from_files(
    name: str, folder: Path, files: Sequence[Path], config: InputConfig, needed: Collection[str]
) -> RowSource:
    """Return the source of several files of one kind.

    Args:
        name: The input in words.
        folder: The folder of the files.
        files: Their paths, relative to the folder or absolute.
        config: The settings of the input.
        needed: Required columns.

    Raises:
        InputError: No file has a known format, or they have several.
    """
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        suffix = get_format_suffix(file)
        kind = "text" if suffix in TEXT_SUFFIXES else suffix
        if kind in ("text", PDF_SUFFIX) or (
            suffix in FORMATS and (FORMATS[suffix].packed or not is_gzip(file))
        ):
            by_kind.setdefault(kind, []).append(file)
    if len(by_kind) > 1:
        by_kind.pop(PDF_SUFFIX, None)  # what was parsed counts, not what it was parsed from
    if not by_kind:
        found = ", ".join(str(file) for file in files[:_SHOWN_FILES]) or "none"
        raise InputError(
            f"the {name} has no file of a known format ({_list_formats()}; found: {found})"
        )
    if len(by_kind) > 1:
        counts = ", ".join(
            f"{len(found):,} {kind} ({found[0]})" for kind, found in sorted(by_kind.items())
        )
        raise InputError(
            f"the {name} has files of several kinds: {counts}; choose one by a pattern, such as "
            f"input.path: {folder}/*{get_format_suffix(next(iter(by_kind.values()))[0])}"
        )
    ((kind, chosen),) = by_kind.items()
    if kind == "text":
        rows = partial(read_folder, folder, chosen)
        return RowSource(name, rows, lambda at: str(folder / chosen[at]), id="file")
    if kind == PDF_SUFFIX:
        return _from_pdfs(name, folder, chosen)
    form = FORMATS[kind]

    def read() -> Iterator[tuple[int, Row]]:
        for number, file in enumerate(chosen):
            for position, row in form.read(folder / file, config, needed):
                yield number * _SPAN + position, row

    def describe(at: int) -> str:
        number, position = divmod(at, _SPAN)
        return form.describe(folder / chosen[number], position)

    def read_types() -> ArrowTypes:
        from .column_types import unify_types  # noqa: PLC0415 - pyarrow is slow to import

        return unify_types(form.types(folder / file) for file in chosen)

    return RowSource(name, read, describe, ragged=True, types=read_types)


def _from_pdfs(name: str, folder: Path, files: Sequence[Path]) -> RowSource:
    return RowSource(
        name,
        partial(read_pdfs, folder, files),
        lambda at: str(folder / files[at]),
        id="file",
        problem=PROBLEM_COLUMN,
    )


def get_format_suffix(path: Path) -> str:
    """Return the suffix of a file's format in lower case, without ``.gz``."""
    return Path(path.stem if is_gzip(path) else path.name).suffix.lower()


def is_pattern(path: Path) -> bool:
    """Return True if the last part of a path is a pattern of file names."""
    return _PATTERN.search(path.name) is not None


def is_present(path: Path) -> bool:
    """Return True if an input exists; a pattern exists if a file matches it."""
    if path.exists() or not is_pattern(path):
        return path.exists()
    try:
        return bool(find_matches(path))
    except InputError:
        return False


def find_matches(pattern: Path) -> list[Path]:
    """Return the names of the files that match a pattern, in order, without hidden ones.

    Raises:
        InputError: There are none.
    """
    try:
        names = sorted(
            one.name
            for one in pattern.parent.iterdir()
            if fnmatchcase(one.name, pattern.name) and one.name[0] != "." and one.is_file()
        )
    except OSError as error:
        raise unreadable_error(pattern.parent, error) from error
    if not names:
        raise InputError(f"input.path: no file matches {pattern}")
    return [Path(name) for name in names]


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, _list_siblings(path))
        where = "" if path.is_absolute() else f" (looked for {path.absolute()})"
        raise InputError(f"input.path: {path} does not exist{where}{hint}") from error
    except OSError as error:
        raise unreadable_error(path, error) from error


def _list_siblings(path: Path) -> list[str]:
    try:
        return [one.name for one in path.parent.iterdir()]
    except OSError:  # only the hint is lost; the missing file is still reported
        return []


def _list_formats() -> str:
    return f"{', '.join(FORMATS)}, {', '.join(TEXT_SUFFIXES)}, {PDF_SUFFIX}"


def _unknown_format(path: Path) -> InputError:
    hint = _HINTS.get(path.suffix.lower(), "convert or rename the file")
    if is_gzip(path) and get_format_suffix(path) in FORMATS:
        hint = "unpack it first (gunzip): Parquet files are packed inside"
    shown = path.name.removeprefix(path.stem) or "no suffix"
    return InputError(
        f"{path}: unsupported input format: {shown} (supported: {', '.join(FORMATS)}, all but "
        f"Parquet also with .gz, PDF files, and folders of them or of .txt and .md files); {hint}"
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
    images = [] if config.task.images is None else config.task.images.columns
    return tuple(dict.fromkeys([*config.parse_prompt().columns, *images, *shown]))
