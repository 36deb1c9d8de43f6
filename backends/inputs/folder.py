"""A folder of texts: one item a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..core.errors import InputError
from ..core.types import Row
from .lines import unreadable, whole_text

SUFFIXES: Final = (".txt", ".md")


def text_files(folder: Path) -> list[Path]:
    """Find the texts of a folder and its subfolders; hidden ones are left out.

    Args:
        folder: The folder; links to other folders are not followed.

    Returns:
        Paths relative to the folder, sorted.

    Raises:
        InputError: The folder cannot be read, or holds no .txt or .md file.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        found += [inside / name for name in files if _is_text(name)]
    if not found:
        raise InputError(
            f"the folder {folder} holds no .txt or .md file; input.path must name a folder of "
            "texts, or a csv, tsv, jsonl, parquet or smi file"
        )
    return sorted(found)


def read_folder(folder: Path, files: list[Path]) -> Iterator[tuple[int, Row]]:
    """Read one text after the other.

    Args:
        folder: The folder.
        files: Paths relative to it.

    Yields:
        The file's position in ``files``, and a row of ``file`` (relative path) and ``text``.

    Raises:
        InputError: A file cannot be read, is empty, binary or no UTF-8.
    """
    for at, file in enumerate(files):
        yield at, {"file": file.as_posix(), "text": whole_text(folder / file)}


def _is_text(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _refuse(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error
