"""Output files of a run in OpenAI's batch format; the journal decides what they contain."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import ConfigurationError
from .journal import Journal
from .journal_file import get_current_run_id
from .results import explain_write_errors, replace_file
from .run_folder import get_own_ids, get_run_ids

_LINE: Final = re.compile(rb'\{"id":"batch_req_([0-9a-f]{16})_([0-9]{1,15})","custom_id":')
_START: Final = b'{"id":"batch_req_'
_DONE_END: Final = b',"error":null}\n'
_LINES: Final = 256
"""Lines that are written together."""
_ERROR_NAME: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OK: Final = 200


def make_line(record: Mapping[str, Any], run: str) -> bytes:
    """Return the line of an item from its journal record.

    Args:
        record: The record.
        run: The run's id.
    """
    name = f"batch_req_{run}_{record['index']}"
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    if record["status"] == "done":
        body = record["output"]
        response = {"status_code": _OK, "request_id": _get_request_id(body) or name, "body": body}
    else:
        code = _ERROR_NAME.sub("_", str(record["error_class"]).removesuffix("Error")).lower()
        error = {"code": code, "message": record["error"]}
        response = _make_refusal(record, name)
    return (
        orjson.dumps({"id": name, "custom_id": record["id"], "response": response, "error": error})
        + b"\n"
    )


def _get_request_id(body: Any) -> str | None:
    found = body.get("id") if isinstance(body, dict) else None
    return found if isinstance(found, str) and found else None


def _make_refusal(record: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the response of a failed item if a server refused it; its record has the status."""
    try:
        found = orjson.loads(record.get("raw") or "null")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("status_code"), int):
        return None
    body = {"error": {"code": found.get("code"), "message": record["error"]}}
    return {"status_code": found["status_code"], "request_id": name, "body": body}


class BatchFiles:
    """The output files of a run, each item once; all methods block.

    Lines are added in the order in which items end. Files that do not agree with the journal, for
    example because failed items are retried, are written again as a whole.

    Args:
        journal: The run's journal.
        about: The run's provenance. Files of a run that its folder was copied from are left alone.
        items: Number of items of the run.
        output: The file of answers.
        errors: The file of failed items; None puts them into ``output``.
    """

    def __init__(
        self,
        journal: Journal,
        about: Mapping[str, Any],
        items: int,
        output: Path,
        errors: Path | None,
    ) -> None:
        self._journal, self._run = journal, get_own_ids(about)
        self._copied_from = frozenset(get_run_ids(about)) - set(self._run)
        self._written = bytearray(items)
        self._paths = {True: output, False: errors or output}
        self._sizes = dict.fromkeys(self._paths.values(), 0)
        self._is_stale = False

    def open(self) -> None:
        """Repair the files, so that they contain each item of the journal that has ended.

        Raises:
            ConfigurationError: A file has content that is not of this run.
            JournalError: A file cannot be read or written.
        """
        agrees = True
        for path in self._sizes:
            with explain_write_errors(str(path)):
                agrees &= self._read_file(path)
        if not agrees:
            self._rebuild()
            return
        ended = (i for i in range(len(self._written)) if self._journal.is_finished(i))
        self.write(i for i in ended if not self._written[i])

    def write(self, indices: Iterable[int]) -> None:
        """Add the lines of items that have ended.

        Raises:
            JournalError: A file cannot be written, or a record cannot be read.
        """
        left = iter(indices)
        while some := list(islice(left, _LINES)):
            lines: dict[Path, list[bytes]] = {path: [] for path in self._sizes}
            for index in some:
                if self._written[index]:
                    self._is_stale = True  # its record was replaced by a better one
                else:
                    path, line = self._make_line(index)
                    lines[path].append(line)
                    self._written[index] = True
            for path, added in lines.items():
                with explain_write_errors(str(path)), path.open("ab") as file:
                    self._is_stale |= file.tell() != self._sizes[path]  # others changed it
                    file.writelines(added)
                    self._sizes[path] = file.tell()

    def close(self) -> None:
        """Flush the files to disk; write them again if they do not agree with the journal.

        They do not if a record was replaced, or if others changed a file meanwhile.

        Raises:
            JournalError: A file cannot be written.
        """
        for path in self._sizes:
            with explain_write_errors(str(path)), path.open("ab") as file:
                self._is_stale |= file.tell() != self._sizes[path]
                os.fsync(file.fileno())
        if self._is_stale:
            self._rebuild()

    def _make_line(self, index: int) -> tuple[Path, bytes]:
        record = self._journal.read_record(index)
        path = self._paths[record["status"] == "done"]
        return path, make_line(record, get_current_run_id(self._run))

    def _read_file(self, path: Path) -> bool:
        """Mark the items of a file as written; cut off an incomplete last line.

        Returns:
            Whether each line is that of an ended item which has no other line.
        """
        if not path.exists():
            return True
        if not path.is_file():
            raise ConfigurationError(f"{path}: is not a regular file; choose another output")
        with path.open("r+b") as file:
            end = 0
            for number, line in enumerate(file):
                index = self._read_line(line)
                if index is None:
                    self._check_owner(path, line)
                if number == 0 and index is None and not _is_beginning(line):
                    msg = (
                        f"{path}: contains something else than the output of this batch; choose "
                        "another file for the output, or delete this one"
                    )
                    raise ConfigurationError(msg)
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                if index is None or self._written[index] or not self._agrees(path, line, index):
                    return False
                self._written[index] = True
                end += len(line)
        self._sizes[path] = end
        return True

    def _read_line(self, line: bytes) -> int | None:
        """Return the index of a line's item, or None if the line is not of this run."""
        found = _LINE.match(line)
        if found is None or found[1].decode() not in self._run:
            return None
        index = int(found[2])
        return index if index < len(self._written) else None

    def _check_owner(self, path: Path, line: bytes) -> None:
        """Check that a line is not of the run from which this one was copied.

        Raises:
            ConfigurationError: It is.
        """
        found = _LINE.match(line)
        if found is None or (run := found[1].decode()) not in self._copied_from:
            return
        msg = (
            f"{path}: is the output of run {run}, and this run is a copy of it; choose other files "
            "with --set batch.output=FILE (and batch.errors), or move this one away: what has "
            "ended is then written again from the journal"
        )
        raise ConfigurationError(msg)

    def _agrees(self, path: Path, line: bytes, index: int) -> bool:
        done = line.endswith(_DONE_END)
        return (
            b"\0" not in line  # a power loss leaves zeros in place of what was not on disk yet
            and self._journal.is_finished(index)
            and done == self._journal.is_done(index)
            and path == self._paths[done]
        )

    def _rebuild(self) -> None:
        """Write the files again from the journal, in the order of the input."""
        for path in self._sizes:
            with replace_file(path) as file:
                for index in range(len(self._written)):
                    if not self._journal.is_finished(index):
                        self._written[index] = False
                        continue
                    target, line = self._make_line(index)
                    if target == path:
                        file.write(line)
                        self._written[index] = True
                self._sizes[path] = file.tell()
        self._is_stale = False


def _is_beginning(line: bytes) -> bool:
    """Return True if the first line of a file is the beginning of one that was not finished."""
    return not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line))
