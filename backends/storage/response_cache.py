"""On-disk cache of responses, shared by processes; claims by lock."""

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
    """Locks by key, one process at a time; a file system that has none is used without.

    All of it blocks. Threads may use it at the same time; they are one process.

    Args:
        path: The file to lock; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: int | None = None

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
        """
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self, key: bytes) -> bool:
        """Lock a key; say whether no other process holds it."""
        return self._lock_key(fcntl.LOCK_EX | fcntl.LOCK_NB, key)

    def release(self, key: bytes) -> None:
        """Let go of a key, if it is ours."""
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
                text = "%s: cannot be locked: %s; processes may send equal requests at one time"
                logger.warning(text, self._path, error.strerror)
                self._close()
            return True

    def close(self) -> None:
        """Let go of all keys."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _byte(key: bytes) -> int:
    return int.from_bytes(key[:8]) >> 2  # offsets end at 2^63


CACHE_VERSION: Final = 1

_OFFSET_BITS: Final = 40
_OPEN_FILES: Final = 64
_BATCH: Final = 512
_LIVE_S: Final = 3600.0
_FEW: Final = 64
_TICK_NS: Final = 2_000_000_000


class ResponseCache:
    """Answers by key, found by every process that uses the folder.

    A process that is killed leaves half a line at the end of its own file, which nobody reads.
    What the loss of power makes of a file is noticed by the lines' checksums: such an answer is
    not there, and asked for again. Nothing is flushed to disk before the system does it.

    Threads may use it at the same time. ``open``, ``refresh``, ``read`` and ``close`` block.

    Args:
        folder: Where the files lie; made when missing.
        simulated: Whether the answers are a simulated fleet's; the two lie apart.
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
        """Return how many answers it knows of."""
        with self._lock:
            return len(self._index)

    def open(self) -> None:
        """Make the folder and read what is there.

        Raises:
            ConfigurationError: The folder cannot be made or read.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
            if self.contested:
                self._claims.open()
        except OSError as error:
            msg = (
                f"cache: {self._folder}: cannot be used: {error.strerror}; name another folder, "
                "or say cache: off"
            )
            raise ConfigurationError(msg) from None

    def refresh(self) -> None:
        """Read on where other processes have written since the last time.

        Raises:
            OSError: The folder cannot be read.
        """
        with self._looking:
            self._scan_folder()

    def _scan_folder(self) -> None:
        changed_ns = self._folder.stat().st_mtime_ns
        with os.scandir(self._folder) as entries:
            looked = [(entry.name, _stat(entry)) for entry in entries if _is_ours(entry)]
        found = [(name, stat) for name, stat in looked if stat is not None]
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
        # Clocks tick: a file made right after the look may leave the folder's time as it is.
        settled = abs(time.time_ns() - changed_ns) > _TICK_NS
        self._changed_ns = changed_ns if settled else 0

    def _scan_live_files(self) -> None:
        """Look where others are writing at the moment; with many of them, leave it to refresh."""
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
        """Become the process that asks for an answer, or be it no longer; it blocks.

        Who has got a claim knows of the answers that its last holder has kept.

        Args:
            requests: Keys, each with whether it is claimed (or given back).

        Returns:
            For each key, whether no other process holds it.
        """
        free = [
            self._claims.acquire(key) if take else self._release_claim(key)
            for key, take in requests
        ]
        refused = {key for (key, _), is_free in zip(requests, free, strict=True) if not is_free}
        taken = {key for key, take in requests if take} - refused
        with suppress(OSError):  # the folder is being cleared
            if taken & self._refused:
                self.refresh()  # somebody had them, and may have kept their answers
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
            with suppress(FileNotFoundError):  # somebody clears the folder
                self._read_on(number, file)

    def _add(self, file: ResponseFile) -> int:
        with self._lock:  # put may just have made it
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
                    break  # being written, or cut by the end of its process
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
            for key, place in batch:
                self._index.put(key, place)
        batch.clear()

    def _check_header(self, line: bytes, file: ResponseFile) -> bool:
        """Look at a file's first line; leave files of another form alone."""
        if parse_header(line) == self._header:
            return True
        file.strange = True
        logger.warning("%s: holds no answers of this kind and version; it is not used", file.path)
        return False

    def find(self, key: bytes) -> int | None:
        """Return the place of a key's answer, or None; it does not block."""
        with self._lock:
            return self._index.find(key)

    def forget(self, key: bytes, place: int) -> None:
        """Take note that there is no answer of a key at a place."""
        with self._lock:
            if self._index.find(key) == place:
                self._index.forget(key)

    def read(self, key: bytes, place: int) -> bytes | None:
        """Return the answer at a place as JSON, or None when it is damaged, gone or another's."""
        number, offset = place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
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
        """Return the file's handle, or None when enough files are open."""
        with self._opening:
            if file.handle is None and self._opened < _OPEN_FILES:
                file.handle = os.open(file.path, os.O_RDONLY)
                self._opened += 1
            return file.handle

    def put(self, key: bytes, answer: bytes) -> None:
        """Keep an answer, for this process at once and for the others when they look.

        What cannot be written is not kept: that is logged once, and costs money, not answers.

        Args:
            key: Of the request, 16 bytes.
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
                text = "%s: cannot be written: %s; no further answers are kept for equal requests"
                logger.warning(text, self._folder, error.strerror)
                return
            assert self._own is not None, "it has just been written to"
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
    """Look at a file; None when somebody has just removed it."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _place(number: int, offset: int) -> int:
    return number << _OFFSET_BITS | offset
