"""Exact token counts for an operator, which are the same in all sessions of its stage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Final

import orjson

from ...backends.budget.tokens import TokenCounter, open_token_counter
from ...backends.core.errors import JournalError
from ...backends.discovery.connect import ReadyEndpoints

_FILE: Final = "token_counts.jsonl"


class StageTokens:
    """Counts the tokens of texts as the model does, and keeps the counts in the stage's folder.

    The groups of a level depend on them, so that a later session must get the same ones, also if
    the servers have changed. Calls are answered from the file in their order.

    Args:
        folder: Folder of the stage.
        find_endpoints: Returns the endpoints of the stage, when they are needed.

    Raises:
        JournalError: The file cannot be read.
    """

    def __init__(
        self, folder: Path, find_endpoints: Callable[[], Awaitable[ReadyEndpoints]]
    ) -> None:
        self._path, self._find_endpoints = folder / _FILE, find_endpoints
        self._kept = _read_lines(self._path)
        self._calls = 0
        self._counter: TokenCounter | None = None
        self._file: FileIO | None = None

    async def count(self, text: str) -> int | None:
        """Return the tokens of a text, or None if no endpoint counts them.

        Raises:
            JournalError: The count cannot be written.
        """
        digest = blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
        if self._calls < len(self._kept):
            line = orjson.loads(self._kept[self._calls])
            if line[0] == digest:
                self._calls += 1
                return None if line[1] is None else int(line[1])
            del self._kept[self._calls :]  # the texts changed, and with them all further ones
        if self._counter is None:
            self._counter = open_token_counter(await self._find_endpoints())
        found = await self._counter.count({"messages": [{"role": "user", "content": text}]})
        tokens = found.tokens if found.exact else None
        await asyncio.to_thread(self._append, orjson.dumps([digest, tokens]) + b"\n")
        return tokens

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._file = FileIO(self._path, "ab")
                os.truncate(self._path, sum(map(len, self._kept)))  # the rest is cut or outdated
            self._file.write(line)
            self._kept.append(line)
            self._calls += 1
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written: {error.strerror}") from error

    async def aclose(self) -> None:
        """Close the file and all connections."""
        if self._file is not None:
            self._file.close()
        if self._counter is not None:
            await self._counter.aclose()


def _read_lines(path: Path) -> list[bytes]:
    """Return the lines of earlier sessions, up to one that is damaged."""
    kept = list[bytes]()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return kept
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            digest, tokens = orjson.loads(line)
        except (ValueError, TypeError):
            break
        is_count = tokens is None or type(tokens) is int
        if not line.endswith(b"\n") or not isinstance(digest, str) or not is_count:
            break
        kept.append(line)
    return kept
