"""Writes an item store, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing, suppress
from hashlib import blake2b
from io import IOBase
from pathlib import Path
from typing import Final

import pyarrow as pa

from ..core.errors import LedgerError
from .layout import SCHEMA, SUMMARY_KEY, Header
from .screening import Entry, Screen

_BATCH_ROWS: Final = 256
_BATCH_BYTES: Final = 2**20
_DIGEST_BYTES: Final = 16


def write_store(target: Path, screen: Screen) -> None:
    """Write the screen's items to a temporary file beside the target, then rename it.

    Args:
        target: The store's path; its folder must exist.
        screen: Yields the items; whatever it raises passes through.

    Raises:
        LedgerError: The file cannot be written.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that somebody has put there
            _write(file, screen)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:  # of writing only: sources turn their own into InputError
        raise LedgerError(
            f"the items cannot be written to {target}: {error.strerror or error}; free some space "
            "or choose another folder for the run"
        ) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def _write(file: IOBase, screen: Screen) -> None:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    starts: list[int] = []
    items = 0
    with pa.ipc.new_file(file, SCHEMA) as sink, closing(screen.entries()) as entries:
        for batch in _batches(entries):
            _feed(digest, batch)
            sink.write_batch(_columns(batch))
            starts.append(items)
            items += len(batch)
        header = Header(
            starts=tuple(starts),
            items=items,
            columns=tuple(screen.columns),
            digest=digest.hexdigest(),
            skipped=tuple(screen.skipped),
            skipped_total=screen.skipped_total,
            invalid=screen.invalid,
            source=screen.source,
        )
        sink.write_batch(_columns([]), custom_metadata={SUMMARY_KEY: header.dumps()})


def _batches(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    """Group entries, so that neither many rows nor long ones make a batch large."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.row)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _columns(batch: list[Entry]) -> pa.RecordBatch:
    ids = pa.array([entry.id for entry in batch], pa.string())
    rows = pa.array([entry.row for entry in batch], pa.binary())
    problems = pa.array([entry.problem for entry in batch], pa.string())
    return pa.record_batch([ids, rows, problems], schema=SCHEMA)


def _feed(digest: blake2b, batch: list[Entry]) -> None:
    """Add ids and rows, each after its length, so that no two inputs read alike."""
    for entry in batch:
        name = entry.id.encode()
        digest.update(b"%d %d " % (len(name), len(entry.row)) + name + entry.row)
