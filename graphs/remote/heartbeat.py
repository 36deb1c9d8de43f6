"""Small files in a run's journal folder by which coordinator and workers know of each other."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ...backends.core.errors import LedgerError
from ...backends.workers.member import Beat

logger = logging.getLogger(__name__)

_OPEN: Final = "open-"
_STOP: Final = "stop-"
_BEAT: Final = "beat-"
LOOKS: Final = 4
"""So many looks in a row, at least, must find a worker silent before it counts as lost."""


def stop_file(journal: Path, token: str) -> Path:
    """Return the file that stops the workers of one life of a run."""
    return journal / f"{_STOP}{token}"


def beat_file(journal: Path, token: str, shard: str, attempt: int) -> Path:
    """Return the file that a worker touches while it works on an order, and that allows it to."""
    return journal / f"{_BEAT}{token}-{shard}-{attempt}"


def end_earlier(journal: Path) -> None:
    """Stop the workers of earlier lives and sweep up after them, whoever works in this one; blocks.

    Args:
        journal: The run's journal folder.
    """
    for file in journal.glob(f"{_BEAT}*"):
        file.unlink(missing_ok=True)
    for file in journal.glob(f"{_OPEN}*"):
        _rename(file, stop_file(journal, file.name.removeprefix(_OPEN)))


class Signs:
    """The files of one life of a run.

    While a life lasts there is ``open-TOKEN``. Renamed to ``stop-TOKEN`` it stops the workers; a
    life that was killed has left it, and the next one renames it: what is still in an engine's
    queue then ends before it has asked anything. An order has a file of its own, made before it is
    sent: its worker writes that it has begun, touches it from time to time, and stops once it is
    gone.

    Args:
        journal: The folder, or None if workers do not share it.
        token: Names this life.
        silence_s: Seconds of silence after which a worker counts as lost.
    """

    def __init__(self, journal: Path | None, token: str, silence_s: float) -> None:
        self._journal, self._token = journal, token
        self._beats = dict[Path, _Seen]()
        self._most_s, self._looked = silence_s / LOOKS, time.monotonic()
        self._blind = False

    def begin(self) -> None:
        """Open this life; blocks."""
        if self._journal is not None:
            self._open(self._journal).touch()

    def stop(self) -> None:
        """Stop the workers of this life; blocks."""
        if self._journal is not None:
            _rename(self._open(self._journal), stop_file(self._journal, self._token))

    def end(self, still_out: bool) -> None:
        """Close this life; if orders are still out, they stop. Blocks."""
        if self._journal is None:
            return
        if still_out:
            self.stop()
        self._open(self._journal).unlink(missing_ok=True)
        for file in self._journal.glob(f"{_BEAT}{self._token}-*"):
            file.unlink(missing_ok=True)

    def allow(self, file: Path) -> None:
        """Make an order's file, not touched by any worker yet; blocks.

        Raises:
            LedgerError: It cannot be made.
        """
        try:
            file.touch()
            made = file.stat().st_mtime_ns
        except OSError as error:
            msg = f"{file}: cannot be made: {error.strerror}; mend the folder, then resume"
            raise LedgerError(msg) from error
        if (seen := self._beats.get(file)) is not None:
            seen.made = made

    def withdraw(self, file: Path) -> None:
        """Take an order back: its worker stops, should it still live. Blocks."""
        self.forget(file)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:  # its worker then ends items that others end as well
            logger.warning("%s: cannot be removed: %s", file, error.strerror)

    def of(self, file: Path) -> Beat:
        """Return what tells for how long a file has not changed, as of the last look."""
        seen = self._beats[file] = _Seen()
        return lambda: seen.silent_s

    def forget(self, file: Path) -> None:
        """Look at a file no more."""
        self._beats.pop(file, None)

    def look(self) -> None:
        """Look at all files that somebody asked for; blocks.

        What passes while nobody looks, or while the file system answers nobody, is no worker's
        silence: one look adds a part of the patience at most.
        """
        passed, failed = min(time.monotonic() - self._looked, self._most_s), list[str]()
        for file, seen in list(self._beats.items()):
            try:
                stamp = file.stat().st_mtime_ns
            except FileNotFoundError:
                seen.note(None, passed)
            except OSError as error:
                failed.append(f"{file}: cannot be looked at: {error.strerror}")
            else:
                seen.note(stamp, passed)
        self._looked = time.monotonic()
        if failed and not self._blind:  # told once, for thousands of files may be looked at
            text = "%s (%d such files); their workers are waited for until it can be"
            logger.warning(text, failed[0], len(failed))
        self._blind = bool(failed)

    def _open(self, journal: Path) -> Path:
        return journal / f"{_OPEN}{self._token}"


def _rename(file: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # it has been renamed before
        file.rename(target)


class _Seen:
    """For how long a file has not changed, by this machine's clock: those of nodes may differ.

    Attributes:
        made: When it was made or last seen to change (ns since 1970); None before it is made.
        silent_s: Seconds since it was last seen to change; None before a worker has touched it.
    """

    def __init__(self) -> None:
        self.made: int | None = None
        self.silent_s: float | None = None

    def note(self, stamp: int | None, passed_s: float) -> None:
        if stamp is not None and self.made is not None and stamp != self.made:
            self.made, self.silent_s = stamp, 0.0
        elif self.silent_s is not None:
            self.silent_s += passed_s
