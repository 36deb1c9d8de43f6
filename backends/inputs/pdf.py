"""PDF files as rows with their texts, read by processes of bounded time and memory."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.aio import check_stopped
from ..core.errors import MissingExtraError
from ..core.types import Row

logger = logging.getLogger(__name__)

PDF_SUFFIX: Final = ".pdf"
PROBLEM_COLUMN: Final = "fanfold:problem"
"""Column that says why a file has no text; items do not have it."""
SECONDS: Final = 60.0
"""Time for one file."""
_MOST_PROCESSES: Final = 8
_MOST_ANSWER: Final = 200_000_000
"""Bytes of an answer."""
_PROCESS: Final = Path(__file__).with_name("pdf_process.py")
_KEPT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
"""Variables of the environment that the processes get."""
_SHOWN: Final = 5
_CHECK_S: Final = 0.2
"""Seconds between two looks whether the run was stopped."""


def read_pdfs(
    folder: Path, files: Sequence[Path], seconds: float = SECONDS
) -> Iterator[tuple[int, Row]]:
    """Read PDF files, several at a time.

    A file that cannot be read, or that has no text, is a row with a problem, which fails its item.

    Args:
        folder: The folder.
        files: Paths relative to it.
        seconds: Most time for one file.

    Yields:
        The file's position in ``files``, and a row of ``file`` (relative path), ``text``, ``pages``
        (their number), ``pages_without_text`` (their numbers) and `PROBLEM_COLUMN`.

    Raises:
        MissingExtraError: pypdfium2 is not installed.
    """
    if find_spec("pypdfium2") is None:
        raise MissingExtraError("reading PDF files", "pdf")
    count = max(1, min(_MOST_PROCESSES, len(files), os.cpu_count() or 1))
    readers = _Readers(seconds)
    waiting, scanned = deque[tuple[int, Future[dict[str, Any]]]](), list[str]()
    pool = ThreadPoolExecutor(count, thread_name_prefix="fanfold-pdf")
    try:
        for at, file in enumerate(files):
            waiting.append((at, pool.submit(readers.read, folder / file)))
            if len(waiting) > 2 * count:
                yield _finish(files, scanned, *waiting.popleft())
        while waiting:
            yield _finish(files, scanned, *waiting.popleft())
    finally:
        readers.kill()
        pool.shutdown(cancel_futures=True)
        readers.close()
    if scanned:
        more = f" and {len(scanned) - _SHOWN:,} more" if len(scanned) > _SHOWN else ""
        logger.warning(
            "pages without text, probably scanned, in %s%s; recognise their text (OCR) first",
            ", ".join(scanned[:_SHOWN]),
            more,
        )


def _finish(
    files: Sequence[Path], scanned: list[str], at: int, future: Future[dict[str, Any]]
) -> tuple[int, Row]:
    while not future.done():
        check_stopped()
        wait({future}, timeout=_CHECK_S)
    row = _make_row(files[at].as_posix(), future.result())
    if row["pages_without_text"] and row[PROBLEM_COLUMN] is None:
        scanned.append(f"{row['file']} ({len(row['pages_without_text'])} of {row['pages']})")
    return at, row


def _make_row(name: str, answer: Mapping[str, Any]) -> Row:
    row: Row = {"file": name, "text": None, "pages": None, "pages_without_text": []}
    pages = answer.get("pages")
    if not isinstance(pages, list) or not all(isinstance(one, str) for one in pages):
        return row | {PROBLEM_COLUMN: f"{name}: cannot be read as PDF: {answer.get('error')}"}
    empty = [number for number, text in enumerate(pages, start=1) if not text.strip()]
    row |= {"pages": len(pages), "pages_without_text": empty}
    if len(empty) == len(pages):
        return row | {
            PROBLEM_COLUMN: f"{name}: none of its {len(pages):,} pages has text; it is probably "
            "scanned: recognise its text (OCR) first"
        }
    return row | {"text": "\n\n".join(pages), PROBLEM_COLUMN: None}


def _explain_end(code: int) -> str:
    """Return why there is no text if the process has ended; PDFium aborts without memory."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"its reader ended {how}: the file is damaged, or needs more than 2 GiB of memory"


class _Readers:
    """One process for each thread; a process that fails or takes too long is replaced."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._local, self._is_closed = seconds, threading.local(), False
        self._lock, self._processes = threading.Lock(), set[subprocess.Popen[bytes]]()

    def read(self, path: Path) -> dict[str, Any]:
        """Return what the process says about a file, or an error."""
        process = self._get_process()
        if process is None:
            return {"error": "the run was stopped"}
        assert process.stdin is not None, "standard input is a pipe"
        try:
            process.stdin.write(orjson.dumps(str(path.absolute())) + b"\n")
            process.stdin.flush()
            answer = self._wait(process)
        except BrokenPipeError:
            answer = None
        if isinstance(answer, dict):
            return answer
        self._end(process)
        if answer is not None:
            return {"error": answer}
        return {"error": _explain_end(process.returncode)}

    def kill(self) -> None:
        """Kill all processes: threads that wait for an answer see that theirs has ended."""
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.kill()

    def close(self) -> None:
        """Close what is left of the processes; no thread uses them any more."""
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            self._end(process)

    def _get_process(self) -> subprocess.Popen[bytes] | None:
        found: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if found is not None and found.poll() is None:
            return found
        with self._lock:
            if self._is_closed:
                return None
            found = subprocess.Popen(
                [sys.executable, "-P", str(_PROCESS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                start_new_session=True,  # this process handles a terminal's interrupt
            )
            self._processes.add(found)
        self._local.process = found
        return found

    def _wait(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | str | None:
        """Return the answer, why there is none, or None if the process has ended."""
        assert process.stdout is not None, "standard output is a pipe"
        end, parts, size = time.monotonic() + self._seconds, list[bytes](), 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while (left := end - time.monotonic()) > 0:
                if not selector.select(left):
                    continue
                part = os.read(process.stdout.fileno(), 1 << 20)
                if not part:
                    return None
                parts.append(part)
                size += len(part)
                if part.endswith(b"\n"):
                    found = orjson.loads(b"".join(parts))
                    return found if isinstance(found, dict) else None
                if size > _MOST_ANSWER:
                    return "its text is too large"
        return f"it takes longer than {self._seconds:g} s"

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was not written belongs to a process that has ended
                    continue
        with self._lock:
            self._processes.discard(process)
