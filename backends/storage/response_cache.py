"""On-disk cache of responses, shared by processes; claims by file lock."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import orjson

from ..core.errors import ConfigurationError
from .response_files import (
    MAX_ANSWER_LINE_BYTES,
    KeyIndex,
    ResponseFile,
    format_line,
    parse_answer,
    parse_header,
    parse_key,
    read_line_at,
)

_LOCKED_ERRORS: Final = frozenset({errno.EAGAIN, errno.EACCES})

logger = logging.getLogger(__name__)


class ClaimLocks:
    """Locks by key for one process at a time; without effect on file systems without locks.

    All methods block. Several threads may use them; they count as one process.

    Args:
        path: The file to lock; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: int | None = None

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: The file cannot be opened.
        """
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self, key: bytes) -> bool:
        """Lock a key; return True if no other process holds it."""
        return self._lock_key(fcntl.LOCK_EX | fcntl.LOCK_NB, key)

    def release(self, key: bytes) -> None:
        """Release a key, if this process holds it."""
        self._lock_key(fcntl.LOCK_UN, key)

    def _lock_key(self, how: int, key: bytes) -> bool:
        with self._lock:
            if self._handle is None:
                return True
            try:
                fcntl.lockf(self._handle, how, 1, _byte(key))
            except OSError as error:
                if error.errno in _LOCKED_ERRORS:
                    return False
                text = "%s: cannot be locked: %s; several processes may send equal requests"
                logger.warning(text, self._path, error.strerror)
                self._close()
            return True

    def close(self) -> None:
        """Release all keys."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _byte(key: bytes) -> int:
    return int.from_bytes(key[:8]) >> 2  # file offsets are below 2^63


CACHE_VERSION: Final = 1

_OFFSET_BITS: Final = 40
_OPEN_FILES: Final = 64
_BATCH: Final = 512
_LIVE_S: Final = 3600.0
_FEW: Final = 64
_TICK_NS: Final = 2_000_000_000


class ResponseCache:
    """Answers by key, shared by all processes that use the folder.

    A process that is killed leaves a partial line at the end of its own file, which is ignored.
    Checksums detect lines damaged by a power failure; such an answer counts as missing and is
    requested again. Nothing is flushed to disk explicitly.

    Several threads may use it at the same time. ``open``, ``refresh``, ``read`` and ``close``
    block.

    Args:
        folder: Folder of the files; created when missing.
        simulated: Whether the answers are a simulated fleet's; they are stored separately.
        writer: Name of this process for its file, e.g. ``node17-4242``.
        contested: Whether other processes may use the folder at the same time.

    Attributes:
        contested: As given.
    """

    def __init__(
        self, folder: Path, *, simulated: bool, writer: str, contested: bool = True
    ) -> None:
        kind = "simulated" if simulated else "real"
        self._folder = folder / f"{kind}-v{CACHE_VERSION}"
        self._header = {"v": CACHE_VERSION, "simulated": simulated}
        self._writer = writer
        self._index = KeyIndex()
        self._files: list[ResponseFile] = []
        self._numbers: dict[str, int] = {}
        self._own: int | None = None
        self._lock, self._opening, self._opened = threading.Lock(), threading.Lock(), 0
        self._is_closed = False
        self.contested = contested
        self._refused = set[bytes]()
        self._claims = ClaimLocks(self._folder / "claims")
        self._looking, self._changed_ns, self._live = threading.Lock(), 0, list[int]()

    def __len__(self) -> int:
        """Return the number of known answers."""
        with self._lock:
            return len(self._index)

    def open(self) -> None:
        """Create the folder if necessary, and read the existing answers.

        Raises:
            ConfigurationError: The folder cannot be created or read.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
            if self.contested:
                self._claims.open()
        except OSError as error:
            msg = (
                f"cache: {self._folder}: cannot be used: {error.strerror}; use another folder, "
                "or set cache: off"
            )
            raise ConfigurationError(msg) from None

    def refresh(self) -> None:
        """Read what other processes have written since the last call.

        Raises:
            OSError: The folder cannot be read.
        """
        with self._looking:
            self._scan_folder()

    def _scan_folder(self) -> None:
        changed_ns = self._folder.stat().st_mtime_ns
        with os.scandir(self._folder) as entries:
            entries_read = [(entry.name, _stat(entry)) for entry in entries if _is_ours(entry)]
        found = [(name, stat) for name, stat in entries_read if stat is not None]
        newest = max((stat.st_mtime for _, stat in found), default=0.0)
        live = list[int]()
        for name, stat in found:
            number = self._numbers.get(name)
            if number is None:
                number = self._add(ResponseFile(self._folder / name))
            if number != self._own:
                self._read_to(number, stat.st_size)
                live += [number] * (stat.st_mtime > newest - _LIVE_S)
        self._live = live
        # Clocks are coarse: a file created right after the scan may not change the folder's time.
        settled = abs(time.time_ns() - changed_ns) > _TICK_NS
        self._changed_ns = changed_ns if settled else 0

    def _scan_live_files(self) -> None:
        """Read files with recent writes; if there are many, leave them to ``refresh``."""
        if len(self._live) > _FEW:
            return
        with self._looking:
            if self._folder.stat().st_mtime_ns != self._changed_ns:
                self._scan_folder()
                return
            for number in self._live:
                if (stat := _stat(self._files[number].path)) is not None:
                    self._read_to(number, stat.st_size)

    def update_claims(self, requests: Sequence[tuple[bytes, bool]]) -> list[bool]:
        """Claim or release the right to request answers; blocks.

        A process that gets a claim also learns the answers stored by its last holder.

        Args:
            requests: Keys, each with True to claim it and False to release it.

        Returns:
            For each key, True if no other process holds it.
        """
        free = [
            self._claims.acquire(key) if take else self._release_claim(key)
            for key, take in requests
        ]
        refused = {key for (key, _), is_free in zip(requests, free, strict=True) if not is_free}
        taken = {key for key, take in requests if take} - refused
        with suppress(OSError):  # the folder is being cleared
            if taken & self._refused:
                self.refresh()  # the last holder may have stored answers
            elif taken:
                self._scan_live_files()
        self._refused = (self._refused - taken) | refused
        return free

    def _release_claim(self, key: bytes) -> bool:
        self._claims.release(key)
        return True

    def _read_to(self, number: int, size: int) -> None:
        file = self._files[number]
        if size > file.known_bytes and not file.strange:
            with suppress(FileNotFoundError):  # the folder is being cleared
                self._read_on(number, file)

    def _add(self, file: ResponseFile) -> int:
        with self._lock:  # put may have just created it
            number = self._numbers.setdefault(file.path.name, len(self._files))
            if number == len(self._files):
                self._files.append(file)
            return number

    def _read_on(self, number: int, file: ResponseFile) -> None:
        batch: list[tuple[bytes, int]] = []
        with file.path.open("rb") as lines:
            lines.seek(file.known_bytes)
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # being written, or cut off by the end of its process
                if file.known_bytes == 0 and not self._check_header(line, file):
                    return
                if (key := parse_key(line)) is not None:
                    batch.append((key, _place(number, file.known_bytes)))
                file.known_bytes += len(line)
                if len(batch) == _BATCH:
                    self._index_batch(batch)
        self._index_batch(batch)

    def _index_batch(self, batch: list[tuple[bytes, int]]) -> None:
        with self._lock:
            for key, position in batch:
                self._index.put(key, position)
        batch.clear()

    def _check_header(self, line: bytes, file: ResponseFile) -> bool:
        """Check a file's first line; ignore files of another format."""
        if parse_header(line) == self._header:
            return True
        file.strange = True
        logger.warning("%s: other kind or version of answers; file not used", file.path)
        return False

    def find(self, key: bytes) -> int | None:
        """Return the position of a key's answer, or None; does not block."""
        with self._lock:
            return self._index.find(key)

    def forget(self, key: bytes, position: int) -> None:
        """Remove a key from the index if it still refers to the given position."""
        with self._lock:
            if self._index.find(key) == position:
                self._index.forget(key)

    def read(self, key: bytes, position: int) -> bytes | None:
        """Return the answer at a position as JSON; None if damaged, gone or of another key."""
        number, offset = position >> _OFFSET_BITS, position & ((1 << _OFFSET_BITS) - 1)
        file = self._files[number]
        try:
            handle = self._handle(file)
            if handle is not None:
                return parse_answer(read_line_at(handle, offset), key)
            with file.path.open("rb") as own:
                return parse_answer(read_line_at(own.fileno(), offset), key)
        except OSError:
            return None

    def _handle(self, file: ResponseFile) -> int | None:
        """Return the file's handle, or None when too many files are open."""
        with self._opening:
            if file.handle is None and self._opened < _OPEN_FILES:
                file.handle = os.open(file.path, os.O_RDONLY)
                self._opened += 1
            return file.handle

    def put(self, key: bytes, answer: bytes) -> None:
        """Store an answer, for this process at once and for others at their next refresh.

        An answer that cannot be written is not stored. This is logged once; no answer is lost.

        Args:
            key: Key of the request, 16 bytes.
            answer: JSON on one line.
        """
        line = format_line(key, answer)
        with self._lock:
            if self._is_closed or len(line) > MAX_ANSWER_LINE_BYTES:
                return
            try:
                file = self._files[self._own] if self._own is not None else self._create_file()
                file.append(line)
            except OSError as error:
                self._is_closed = True
                text = "%s: cannot be written: %s; further answers are not cached"
                logger.warning(text, self._folder, error.strerror)
                return
            assert self._own is not None, "the file was written just now"
            self._index.put(key, _place(self._own, file.known_bytes - len(line)))

    def _create_file(self) -> ResponseFile:
        file = ResponseFile(self._folder / f"{self._writer}-{secrets.token_hex(4)}.jsonl")
        file.handle = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._own = self._numbers[file.path.name] = len(self._files)
        self._files.append(file)
        header = {**self._header, "by": self._writer}
        file.append(orjson.dumps(header, option=orjson.OPT_APPEND_NEWLINE))
        return file

    def close(self) -> None:
        """Close all files."""
        self._claims.close()
        with self._lock, self._opening:
            self._is_closed, self._opened = True, _OPEN_FILES
            for file in self._files:
                if file.handle is not None:
                    os.close(file.handle)
                    file.handle = None


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".jsonl") and not entry.name.startswith(".")


def _stat(file: os.DirEntry[str] | Path) -> os.stat_result | None:
    """Return a file's status; None if it has just been removed."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _place(number: int, offset: int) -> int:
    return number << _OFFSET_BITS | offset
