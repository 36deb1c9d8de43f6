"""Splitting of delimited text into cells (RFC 4180).

The standard library's ``csv`` refuses cells above a limit that can be raised for the whole
process only, and tells of an unclosed quote only at the end of the file; hence this splitter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from .lines import MAX_LINE_BYTES


@dataclass(frozen=True, slots=True)
class Splitter:
    """Splits lines into records; a quoted cell may run over several lines.

    Blanks around a quoted cell are no part of it. A quote inside an unquoted cell is plain text.

    Attributes:
        path: The file, for messages.
        delimiter: ``","`` or a tab.
    """

    path: Path
    delimiter: str

    def records(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
        """Split lines into records.

        Args:
            lines: Line numbers and lines without their ends.

        Yields:
            The number of the record's first line, and its cells.

        Raises:
            InputError: A quote is never closed, or text follows a closing quote.
        """
        for number, line in lines:
            if '"' in line:
                yield number, self._quoted(number, line, lines)
            else:
                yield number, line.split(self.delimiter)

    def _quoted(self, number: int, line: str, lines: Iterator[tuple[int, str]]) -> list[str]:
        cells: list[str] = []
        at = 0
        while True:
            start = _past_blanks(line, at)
            if line.startswith('"', start):
                cell, number, line, at = self._cell(number, line, start + 1, lines)
                cells.append(cell)
                if at == len(line):
                    return cells
                if not line.startswith(self.delimiter, at):
                    raise InputError(
                        f"{self.path}, line {number}: text follows the closing quote of cell "
                        f"{len(cells)}; write a quote inside a quoted cell twice"
                    )
            else:
                end = line.find(self.delimiter, at)
                if end < 0:
                    return [*cells, line[at:]]
                cells.append(line[at:end])
                at = end
            at += len(self.delimiter)

    def _cell(
        self, number: int, line: str, at: int, lines: Iterator[tuple[int, str]]
    ) -> tuple[str, int, str, int]:
        """Read a quoted cell from after its opening quote; return where it ended."""
        parts: list[str] = []
        opened, size = number, 0
        while True:
            end = line.find('"', at)
            if end >= 0:
                if not line.startswith('"', end + 1):
                    parts.append(line[at:end])
                    return "".join(parts), number, line, _past_blanks(line, end + 1)
                parts.append(line[at : end + 1])
                at = end + 2
                continue
            parts += line[at:], "\n"
            size += len(line)
            number, line = next(lines, (0, ""))
            if not number or size > MAX_LINE_BYTES:
                raise InputError(
                    f"{self.path}, line {opened}: a quote opens here and is never closed; "
                    "write a quote inside a quoted cell twice"
                )
            at = 0


def _past_blanks(line: str, at: int) -> int:
    while line.startswith(" ", at):
        at += 1
    return at
