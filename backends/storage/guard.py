"""Failures to write, told with the file's name; files replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..core.errors import LedgerError


@contextmanager
def refusals(target: str) -> Iterator[None]:
    """Turn an OSError of the block into a LedgerError that names ``target``."""
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"{target}: the results cannot be written: {error.strerror or error}; "
            "the journal still holds them: make room or choose another place, and try again"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside ``path`` that takes its place when the block ends well.

    Raises:
        LedgerError: The file cannot be written; the old one is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    with refusals(str(path)):
        partial.unlink(missing_ok=True)
        file = partial.open("xb")  # never through a link that somebody has put there
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def name_of(stream: IO[bytes]) -> str:
    """Return what to call a stream in a message."""
    name = getattr(stream, "name", None)
    return name if isinstance(name, str) else "the output stream"
