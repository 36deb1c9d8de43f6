"""Small files in a run's journal folder by which coordinator and workers know of each other."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..backends.sites.watch import Beat

_OPEN: Final = "open-"
_STOP: Final = "stop-"
_BEAT: Final = "beat-"


def stop_file(journal: Path, token: str) -> Path:
    """Return the file that stops the workers of one life of a run."""
    return journal / f"{_STOP}{token}"


def beat_file(journal: Path, token: str, shard: str, attempt: int) -> Path:
    """Return the file that a worker touches while it works on an order."""
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
    queue then ends before it has asked anything.

    Args:
        journal: The folder, or None if workers do not share it.
        token: Names this life.
    """

    def __init__(self, journal: Path | None, token: str) -> None:
        self._journal, self._token = journal, token
        self._beats = dict[Path, _Seen]()

    def begin(self) -> None:
        """Stop the workers of earlier lives, sweep up after them, and open this one; blocks."""
        if self._journal is None:
            return
        end_earlier(self._journal)
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

    def of(self, file: Path) -> Beat:
        """Return what tells a file's last change, as of the last look."""
        seen = self._beats[file] = _Seen()
        return lambda: seen.when

    def forget(self, file: Path) -> None:
        """Look at a file no more."""
        self._beats.pop(file, None)

    def look(self) -> None:
        """Look at all files that somebody asked for; blocks."""
        for file, seen in list(self._beats.items()):
            with suppress(FileNotFoundError):
                seen.note(file.stat().st_mtime_ns)

    def _open(self, journal: Path) -> Path:
        return journal / f"{_OPEN}{self._token}"


def _rename(file: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # it has been renamed before
        file.rename(target)


class _Seen:
    """When a file was last seen to change, by this machine's clock: those of nodes may differ."""

    def __init__(self) -> None:
        self._stamp: int | None = None
        self.when: float | None = None

    def note(self, stamp: int) -> None:
        if stamp != self._stamp:
            self._stamp, self.when = stamp, time.monotonic()
