"""Reads an item store."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import pyarrow as pa

from ..core.errors import LedgerError
from ..core.types import Item
from .base import InputSummary, Skipped
from .layout import SUMMARY_KEY, VERSION, VERSION_KEY, Header


class ItemStore:
    """The items of a run, read from their file by index.

    Memory does not grow with the number of items, but for one number for each batch (of at most
    256 items). The file is not mapped into memory: pages of a map count as the process's memory,
    and a map whose file shrinks on a shared file system ends the process. Threads may read at the
    same time.
    """

    def __init__(self, path: Path) -> None:
        """Open a store.

        Args:
            path: The store's path.

        Raises:
            LedgerError: There is no such file, or it is no whole item store.
        """
        self._path = path
        with self._reported():
            self._file = pa.OSFile(str(path), "r")
            try:
                self._reader = pa.ipc.open_file(self._file)
                self._header = self._load_header()
            except BaseException:
                self._file.close()
                raise

    def __len__(self) -> int:
        """Return the number of items."""
        return self._header.items

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns over all items, in order of appearance."""
        return self._header.columns

    @property
    def digest(self) -> str:
        """Digest over ids and rows, hexadecimal."""
        return self._header.digest

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Rows that became no item, the first 1,000."""
        return self._header.skipped

    @property
    def invalid(self) -> int:
        """Number of items that carry a problem."""
        return self._header.invalid

    def read(self, lo: int, hi: int) -> list[Item]:
        """Read a range of items.

        Args:
            lo: Index of the first item, from 0.
            hi: Index after the last item, at most ``len(store)``.

        Returns:
            The ``hi - lo`` items in order.

        Raises:
            IndexError: The range is not within the store.
            LedgerError: The file is damaged.
        """
        if not 0 <= lo <= hi <= len(self):
            raise IndexError(f"items {lo} to {hi} of {len(self)} in {self._path}")
        with self._reported():
            return list(self._items(lo, hi))

    def summary(self) -> InputSummary:
        """Return what was found when the input was read.

        Returns:
            The summary, as `spill` gave it.

        Raises:
            LedgerError: The file is damaged.
        """
        header = self._header
        return InputSummary(
            items=header.items,
            columns=header.columns,
            digest=header.digest,
            skipped=header.skipped,
            skipped_total=header.skipped_total,
            invalid=header.invalid,
            source=header.source,
            first=self.read(0, 1)[0],
        )

    def close(self) -> None:
        """Release the file; calling it again does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _items(self, lo: int, hi: int) -> Iterator[Item]:
        starts = self._header.starts
        at = bisect_right(starts, lo) - 1
        while lo < hi:
            batch = self._reader.get_batch(at)
            skip = lo - starts[at]
            part = batch.slice(skip, min(hi - lo, batch.num_rows - skip))
            columns: list[list[Any]] = [column.to_pylist() for column in part.columns]
            ids, rows, problems = columns
            for index, (name, row, problem) in enumerate(
                zip(ids, rows, problems, strict=True), start=lo
            ):
                yield Item(index, name, orjson.loads(row), problem)
            lo += part.num_rows
            at += 1

    def _load_header(self) -> Header:
        version = (self._reader.schema.metadata or {}).get(VERSION_KEY)
        if version is None:
            raise ValueError("it holds something else")
        if version.decode() != VERSION:
            raise ValueError(f"it has the layout {version.decode()}, this fanfold reads {VERSION}")
        last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
        header = Header.loads(last.custom_metadata[SUMMARY_KEY])
        if len(header.starts) != self._reader.num_record_batches - 1:
            raise ValueError("its summary counts other batches than it has")
        return header

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise LedgerError(
                f"{self._path} is no whole item store of fanfold: {reason}; if the run folder is "
                "yours and this file was damaged, begin a new run in another folder"
            ) from error
