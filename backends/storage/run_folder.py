"""The run folder: layout, lock, atomic writes, raised budget limits, provenance."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from ..core.disk import sync_folder
from ..core.errors import ConfigurationError, JournalError
from ..core.types import Json
from ..core.values import check_counts, is_count

PROVENANCE_VERSION: Final = 2
EVALUATION_VERSION: Final = 1

EVALUATION_REFUSED: Final = (
    "no figure is computed: the answers are simulated and say nothing about a model; evaluate a "
    "run with real endpoints"
)
"""Why a simulated run has no evaluation."""

RESPONSES_FOLDER: Final = "answers"
_TRIES: Final = 3
_BETWEEN_TRIES_S: Final = 0.02
_NEW: Final = ".new-"
"""Name prefix of a folder that is prepared within an existing empty one."""
PLACE_FILE: Final = "stage.json"
"""File that makes a folder a part of a pipeline."""
_PART: Final = re.compile(r"stages/[a-z][a-z0-9_]{0,31}(/levels/[1-9][0-9]{0,8})?")
_NOT_EMPTY: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StagePlace:
    """The place of a run in a pipeline.

    Attributes:
        root: Folder of the pipeline.
        key: Path of the run's folder from there: ``stages/NAME`` or ``stages/NAME/levels/2``.
        kept: What the budget keeps for later stages, by field of an amount.
        limits: The stage's own limits, by name of a budget limit.
    """

    root: Path
    key: str
    kept: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Return the name of the stage."""
        return self.key.split("/")[1]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run.

    A run that is a part of a pipeline shares the budget of the pipeline.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """Return the resolved settings, without secrets."""
        return self.path / "run.yaml"

    @property
    def items(self) -> Path:
        """Return the item store, a snapshot of the input."""
        return self.path / "items.arrow"

    @property
    def order(self) -> Path:
        """Return the order in which the run works on the items; without it, that of the input."""
        return self.path / "order.npy"

    @property
    def journal(self) -> Path:
        """Return the folder of journal files."""
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        """Return the SQLite checkpoints."""
        return self.path / "checkpoints.sqlite"

    @property
    def budget(self) -> Path:
        """Return the folder of the budget's spend logs."""
        return self._budget_root / "budget"

    @property
    def batches(self) -> Path:
        """Return the folder of the records of submitted batches."""
        return self.path / "batches"

    @property
    def raised_limits(self) -> Path:
        """Return the limits raised at a pause, which override the settings."""
        return self._budget_root / "caps.json"

    @property
    def noted_counts(self) -> Path:
        """Return the file of the counts that lists of runs show."""
        return self.path / "counts.json"

    @property
    def silent_endpoints(self) -> Path:
        """Return the file that names endpoints which answered nothing in the last session."""
        return self.path / "silent.json"

    @property
    def _budget_root(self) -> Path:
        place = self.read_place()
        return self.path if place is None else place.root

    @property
    def place(self) -> Path:
        """Return the file that makes the run a part of a pipeline."""
        return self.path / PLACE_FILE

    @property
    def stages(self) -> Path:
        """Return the folder of the stages, if the run is a pipeline."""
        return self.path / "stages"

    @property
    def is_pipeline(self) -> bool:
        """Return True if the run is a pipeline of stages."""
        return self.stages.is_dir()

    def read_place(self) -> StagePlace | None:
        """Return the place of the run in a pipeline, or None if it is a run of its own; blocks.

        A folder that was copied out of its pipeline is a run of its own.

        Raises:
            JournalError: The file is damaged.
        """
        try:
            found: Any = orjson.loads(self.place.read_bytes())
            key, kept = found["key"], found["kept"]
            check_counts(kept, kept, "kept")
            limits = {str(name): _read_limit(cap) for name, cap in found["limits"].items()}
            if not _PART.fullmatch(key):
                raise ValueError(f"key is {key!r}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise JournalError(f"{self.place}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{self.place}: damaged ({error}); a resumed pipeline writes it again"
            raise JournalError(msg) from None
        root = self.path.absolute()
        for _ in key.split("/"):
            root = root.parent
        if not RunFolder(root).provenance.exists():
            return None
        return StagePlace(root, key, kept, limits)

    def write_place(self, place: StagePlace) -> None:
        """Record the place of the run in a pipeline; the file contains no path of the machine.

        It is not flushed to disk, because each session of the pipeline writes it again.
        """
        data = {"v": 1, "key": place.key, "kept": dict(place.kept), "limits": dict(place.limits)}
        write_json(self.place, data, flush=False)

    @property
    def responses(self) -> Path:
        """Return the answers that items of this run share."""
        return self.path / RESPONSES_FOLDER

    @property
    def results(self) -> Path:
        """Return the results table."""
        return self.path / "results.parquet"

    @property
    def failures(self) -> Path:
        """Return the failed items."""
        return self.path / "failures.jsonl"

    @property
    def report(self) -> Path:
        """Return the report, a page of HTML."""
        return self.path / "report.html"

    @property
    def aggregate(self) -> Path:
        """Return the aggregate."""
        return self.path / "aggregate.json"

    @property
    def evaluation(self) -> Path:
        """Return the comparison of the answers with gold values."""
        return self.path / "evaluation.json"

    @property
    def provenance(self) -> Path:
        """Return versions, host, times and the input's digest."""
        return self.path / "provenance.json"

    def read_provenance(self) -> dict[str, Any]:
        """Read the provenance.

        Raises:
            JournalError: The file is damaged or has another version.
        """
        try:
            data: Json = orjson.loads(self.provenance.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise JournalError(f"{self.provenance}: cannot be read: {error}") from None
        version = data.get("v") if isinstance(data, dict) else None
        if version != PROVENANCE_VERSION:
            raise JournalError(
                f"{self.provenance}: the run folder has format {version!r}, and this fanfold reads "
                f"{PROVENANCE_VERSION}: finish the run with the fanfold that started it, or start "
                "a new run"
            )
        return dict(data)

    def write_provenance(self, data: Mapping[str, Json]) -> None:
        """Replace the provenance file in one step."""
        write_json(self.provenance, {"v": PROVENANCE_VERSION, **data})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process; the lock ends with the process, however it ends.

        On a file system without locks the run continues unlocked.

        Raises:
            ConfigurationError: Another process is working on the run.
            JournalError: The lock file cannot be opened.
        """
        try:
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise JournalError(f"{self._lock}: cannot be opened: {error.strerror}") from error
        owner = os.getpid()
        try:
            if not self._take(handle, fcntl.LOCK_EX):
                raise ConfigurationError(make_busy_message(self.path))
            yield
        finally:
            _unlock(handle, owner)

    def digest_settings(self) -> str:
        """Return a digest of the file of the settings, hexadecimal; blocks.

        Raises:
            JournalError: It cannot be read.
        """
        try:
            return hashlib.blake2b(self.settings.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise JournalError(f"{self.settings}: cannot be read: {error.strerror}") from error

    def is_in_use(self) -> bool:
        """Return True if a process is working on the run, as far as the file system has locks.

        Raises:
            JournalError: The lock cannot be read.
        """
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise JournalError(f"{self._lock}: cannot be opened: {error.strerror}") from error
        owner = os.getpid()
        try:
            return not self._take(handle, fcntl.LOCK_SH)
        finally:
            _unlock(handle, owner)

    @property
    def _lock(self) -> Path:
        return self.journal / "lock"

    def _take(self, handle: int, kind: int) -> bool:
        """Try to lock several times: a process that only checks holds the lock for a moment."""
        for _ in range(_TRIES):
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(_BETWEEN_TRIES_S)
            except OSError as error:
                logger.warning("%s: no locks on this file system (%s)", self.path, error.strerror)
                return True
            else:
                return True
        return False


def _unlock(handle: int, owner: int) -> None:
    """Release a lock and close its file.

    A process forked in the meantime has a copy of the handle. Closing this handle would leave the
    lock with that copy, so the lock is released explicitly, by its owner only.

    Args:
        handle: The file.
        owner: Id of the process that acquired the lock.
    """
    if os.getpid() == owner:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def is_part_key(key: str) -> bool:
    """Return True if a text is the key of a run in a pipeline."""
    return _PART.fullmatch(key) is not None


def make_busy_message(what: object) -> str:
    """Return the message that refuses a second session of a run or of a graph's thread."""
    return (
        f"{what}: another process or invocation is working on this run; wait for it or stop it "
        "(LangGraph Server waits or replaces by multitask_strategy)"
    )


def write_json(path: Path, data: Json, *, flush: bool = True) -> None:
    """Write JSON in one step: a reader sees the old file or the new one.

    Args:
        path: The file.
        data: Its content.
        flush: Whether it is on disk at the end.

    Raises:
        JournalError: The file cannot be written.
    """
    text = orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_bytes(path, text, flush=flush)


def write_bytes(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Write a file in one step.

    Args:
        path: The file.
        data: Its content.
        flush: Whether it is on disk at the end.

    Raises:
        JournalError: The file cannot be written; the old one is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # "x": never follow a link that already exists
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise JournalError(f"{path}: cannot be written: {error.strerror}") from error


def read_extents(folder: RunFolder) -> dict[str, int] | None:
    """Return how far the journal was read for the aggregate; None if there is no aggregate yet.

    Raises:
        JournalError: The aggregate's file is damaged.
    """
    found = read_aggregate_file(folder)
    return None if found is None else found.extents


def read_aggregate(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the aggregate; none if there is none yet.

    Raises:
        JournalError: The aggregate's file is damaged.
    """
    found = read_aggregate_file(folder)
    return [] if found is None else found.aggregate


class KeptAggregate(NamedTuple):
    """The file of the aggregate.

    Attributes:
        extents: How far the journal was read for it, by file name.
        aggregate: One entry per entry of ``reduce``.
        progress: The counts of the run.
    """

    extents: dict[str, int]
    aggregate: list[dict[str, Any]]
    progress: dict[str, Any]


def read_aggregate_file(folder: RunFolder) -> KeptAggregate | None:
    """Return the file of the aggregate; None if there is none yet.

    Raises:
        JournalError: It is damaged.
    """
    try:
        found = orjson.loads(folder.aggregate.read_bytes())
        extents: dict[str, int] = found["journal"]
        check_counts(extents, extents, "journal")
        aggregate, progress = [dict(entry) for entry in found["aggregate"]], dict(found["progress"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{folder.aggregate}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder.aggregate}: damaged ({error}); 'fanfold resume' writes it again"
        raise JournalError(msg) from None
    return KeptAggregate(extents, aggregate, progress)


def write_evaluation(
    folder: RunFolder, evaluations: Sequence[Mapping[str, Any]], simulated: bool
) -> None:
    """Write the evaluation of a run; that of a simulated run says why there is none.

    Raises:
        JournalError: The file cannot be written.
    """
    content: dict[str, Any] = {
        "version": EVALUATION_VERSION,
        "simulated": simulated,
        "evaluations": [] if simulated else list(evaluations),
    }
    write_json(folder.evaluation, content | ({"refused": EVALUATION_REFUSED} if simulated else {}))


def remove_evaluation(folder: RunFolder) -> None:
    """Remove the evaluation of earlier answers, if there is one.

    Raises:
        JournalError: The file cannot be removed.
    """
    try:
        folder.evaluation.unlink(missing_ok=True)
    except OSError as error:
        raise JournalError(f"{folder.evaluation}: cannot be removed: {error.strerror}") from error


def read_evaluation(folder: RunFolder) -> dict[str, Any] | None:
    """Return the content of a run's evaluation; None if it has none.

    Raises:
        JournalError: The file is damaged, or of another version.
    """
    path = folder.evaluation
    hint = f"; 'fanfold evaluate {folder.path}' writes it again"
    try:
        found: Json = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise JournalError(f"{path}: cannot be read: {error}{hint}") from None
    if not isinstance(found, dict) or found.get("version") != EVALUATION_VERSION:
        raise JournalError(f"{path}: is not an evaluation of version {EVALUATION_VERSION}{hint}")
    return found


def check_path_text(path: Path) -> None:
    """Check that the name of a folder is text, which its files and databases need.

    Raises:
        ConfigurationError: Its absolute path is not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        shown = ascii(str(path.absolute())).strip("'")
        msg = f"{shown}: the path of a run folder must be UTF-8 text; choose another, or rename it"
        raise ConfigurationError(msg) from None


def open_folder(path: Path) -> RunFolder:
    """Open an existing run folder.

    Raises:
        ConfigurationError: The folder is missing, not a run folder, or its path is not UTF-8.
    """
    folder = RunFolder(path)
    check_path_text(path)
    if not path.is_dir():
        raise ConfigurationError(f"{path}: no such run folder")
    items = () if folder.is_pipeline else (folder.items,)
    files = (folder.settings, *items, folder.provenance)
    missing = [p.name for p in files if not p.exists()]
    if missing or not folder.journal.is_dir():
        missing_names = ", ".join(missing) or "journal/"
        msg = f"{path}: not a run folder of fanfold (missing: {missing_names})"
        if not folder.settings.exists() and any(path.iterdir()):
            msg += "; a new run needs a folder that is empty or does not exist: name another"
        raise ConfigurationError(msg)
    return folder


_STAMP_BYTES: Final = 7


def read_file_stamp(path: Path) -> list[int] | None:
    """Return size and modification time (ns) of an input file, to detect changes.

    Of a folder or a pattern it is the size of all files, and a digest of their names, sizes and
    times; None if there is no file.
    """
    if path.is_file():
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]
    if path.is_dir():
        found = path.rglob("*")
    elif set("*?[") & set(path.name):
        found = (one for one in path.parent.iterdir() if fnmatchcase(one.name, path.name))
    else:
        return None
    digest, size, files = hashlib.blake2b(digest_size=_STAMP_BYTES), 0, 0
    for file in sorted(found):
        if not file.is_file():
            continue
        stat, files = file.stat(), files + 1
        size += stat.st_size
        name = os.fsencode(file.relative_to(path.parent))
        digest.update(b"%b\0%d %d\n" % (name, stat.st_size, stat.st_mtime_ns))
    return [size, int.from_bytes(digest.digest())] if files else None


def get_folder_identity(path: Path) -> dict[str, int]:
    """Return device and inode, which distinguish a folder from its copies under any name.

    Raises:
        JournalError: The folder cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from error
    return {"device": found.st_dev, "inode": found.st_ino}


def place_to_be(folder: RunFolder) -> dict[str, int]:
    """Return what :func:`get_folder_identity` will return for a folder in preparation.

    Args:
        folder: Folder from :func:`create_folder`.

    Raises:
        JournalError: The folder cannot be read.
    """
    path = folder.path
    return get_folder_identity(
        path.parent if path.name.startswith(_NEW) else path
    )  # renaming keeps the inode


def get_run_ids(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a run's id, followed by the ids that its folder had before it was copied.

    Args:
        about: The run's provenance.
    """
    return (about["run"], *about.get("earlier", ()))


def get_own_ids(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a run's id, followed by those that this very folder had.

    The number of a file system may change; ids of a run that was copied are not among them.

    Args:
        about: The run's provenance.
    """
    return (about["run"], *about.get("own", ()))


def read_state(folder: RunFolder, about: Mapping[str, Any]) -> str:
    """Return the state of a run: running, or how its last session ended.

    Args:
        folder: The run's folder.
        about: Its provenance.

    Raises:
        JournalError: The lock cannot be read.
    """
    if folder.is_in_use():
        return "running"
    sessions = about["sessions"]
    return (sessions[-1]["outcome"] if sessions else None) or "killed; resumable"


def is_folder_of_run(path: Path, run: str) -> bool:
    """Return True if a folder belongs to a run, by its current or an earlier id."""
    try:
        return run in get_run_ids(RunFolder(path).read_provenance())
    except JournalError:
        return False


def is_vacant(path: Path) -> bool:
    """Return True if a new run may be created at ``path``: nothing there, or an empty folder.

    Raises:
        ConfigurationError: ``path`` is not a folder, cannot be read, or is not UTF-8.
    """
    check_path_text(path)
    try:
        return not path.exists() or all(one.name.startswith(_NEW) for one in path.iterdir())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be a run folder: {error.strerror}") from None


@contextmanager
def create_folder(path: Path) -> Iterator[RunFolder]:
    """Create a run folder that appears under its name only when the block succeeds.

    An existing empty folder is filled, not replaced: its permissions, group and striping stay,
    and it may be a mount point or a working directory. The folder is on disk at the end, if the
    block has flushed its files.

    Raises:
        ConfigurationError: The folder cannot be created, or another process or invocation has
            created it meanwhile.
        JournalError: It cannot be flushed to disk.
    """
    path = path.resolve()  # a symbolic link to an empty folder stays a link
    made, filled = [p for p in path.parents if not p.exists()], path.is_dir()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        partial = path / f"{_NEW}{token}" if filled else path.with_name(f".{path.name}.{token}")
        partial.mkdir()  # permissions follow the umask, unlike with mkdtemp
        (partial / "journal").mkdir()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be created: {error.strerror}") from None
    try:
        yield RunFolder(partial)
        if filled:
            _fill(partial, path)
        else:
            _rename_partial(partial, path)
        flush_folders(path, path.parent, *(parent.parent for parent in made))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made if not path.exists() else ():
            with suppress(OSError):  # another process has put something there meanwhile
                parent.rmdir()


def flush_folders(*paths: Path) -> None:
    """Make new entries of folders durable.

    Raises:
        JournalError: A folder cannot be flushed to disk.
    """
    for path in paths:
        try:
            sync_folder(path)
        except OSError as error:
            raise JournalError(f"{path}: cannot be flushed to disk: {error.strerror}") from error


def _rename_partial(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)  # replaces an empty folder
    except OSError as error:
        if error.errno in _NOT_EMPTY:
            raise _taken(path) from error
        raise ConfigurationError(f"{path}: cannot be created: {error.strerror}") from error


def _fill(partial: Path, path: Path) -> None:
    """Move what was prepared into an existing folder; creating the journal claims the folder."""
    if not is_vacant(path):
        raise _taken(path)
    try:
        (path / "journal").mkdir()
        for file in (partial / "journal").iterdir():
            file.rename(path / "journal" / file.name)
        (partial / "journal").rmdir()
        for file in sorted(partial.iterdir(), key=lambda one: one.name == "provenance.json"):
            file.rename(path / file.name)
    except FileExistsError as error:
        raise ConfigurationError(make_busy_message(path)) from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be created: {error.strerror}") from error


def _taken(path: Path) -> ConfigurationError:
    """Return the error for a path at which a new run folder cannot be created."""
    if RunFolder(path).provenance.exists():  # created by another process meanwhile
        return ConfigurationError(make_busy_message(path))
    return ConfigurationError(f"{path}: contains other files; choose another --out")


def utc_timestamp() -> str:
    """Return the current time as ISO 8601 text in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


_COUNTS_VERSION: Final = 1


def write_noted_counts(folder: RunFolder, counts: Mapping[str, Json]) -> None:
    """Write the counts of a run, as its last session knows them.

    Args:
        folder: The run's folder.
        counts: ``done``, ``failed`` and ``usd``.

    Raises:
        JournalError: The file cannot be written.
    """
    noted = {"v": _COUNTS_VERSION, "noted": utc_timestamp(), **counts}
    write_json(folder.noted_counts, noted)


def read_noted_counts(folder: RunFolder) -> dict[str, Any] | None:
    """Return the counts that the last session noted, and when; None if there are none.

    Raises:
        JournalError: The file is damaged.
    """
    path = folder.noted_counts
    found = _read_versioned(path, _COUNTS_VERSION)
    if found is None:
        return None
    counts = {name: found.get(name) for name in ("noted", "done", "failed", "usd")}
    usd = counts["usd"]
    is_amount = isinstance(usd, int | float) and not isinstance(usd, bool) and usd >= 0
    if not (
        isinstance(counts["noted"], str)
        and is_count(counts["done"])
        and is_count(counts["failed"])
        and (usd is None or is_amount)
    ):
        raise JournalError(f"{path}: has no counts; remove it")
    return counts


_SILENT_VERSION: Final = 1


def write_silent_endpoints(folder: RunFolder, silent: Mapping[str, float]) -> None:
    """Write which endpoints answer nothing; without any, there is no file.

    Args:
        folder: The run's folder.
        silent: By endpoint, the begin of its silence in seconds since 1970.

    Raises:
        JournalError: The file cannot be written.
    """
    if silent:
        write_json(folder.silent_endpoints, {"v": _SILENT_VERSION, "since": dict(silent)})
        return
    try:
        folder.silent_endpoints.unlink(missing_ok=True)
    except OSError as error:
        msg = f"{folder.silent_endpoints}: cannot be removed: {error.strerror}"
        raise JournalError(msg) from error


def read_silent_endpoints(folder: RunFolder) -> dict[str, float]:
    """Return which endpoints answered nothing for ten minutes of work while others answered.

    Returns:
        By endpoint, the begin of its silence in seconds since 1970; of the last session.

    Raises:
        JournalError: The file is damaged.
    """
    path = folder.silent_endpoints
    found = _read_versioned(path, _SILENT_VERSION)
    if found is None:
        return {}
    try:
        return {str(name): float(since) for name, since in found["since"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(f"{path}: cannot be read: {error}; remove it") from None


def _read_versioned(path: Path, version: int) -> dict[str, Any] | None:
    """Return what a JSON file holds; None if there is no file.

    Raises:
        JournalError: It cannot be read, or has another form or version.
    """
    try:
        found: Any = orjson.loads(path.read_bytes())
        if found["v"] != version:
            raise ValueError(f"version {found['v']!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise JournalError(f"{path}: cannot be read: {error}; remove it") from None
    return dict(found)


_VERSION: Final = 2


def read_prefix(provenance: Mapping[str, Any]) -> int | None:
    """Return the length of prefixes by which the items of a run are ordered, or None."""
    order = provenance.get("order")
    prefix = order.get("prefix") if isinstance(order, dict) else None
    return prefix if type(prefix) is int and prefix > 0 else None


def read_raised_limits(path: Path) -> dict[str, Json]:
    """Return the raised limits by setting name; empty when none was raised.

    Raises:
        JournalError: The file is damaged.
    """
    return dict(_read(path)["caps"])


def read_requested_limits(path: Path) -> set[str]:
    """Return the names of the limits that requests have set.

    Raises:
        JournalError: The file is damaged.
    """
    return set(_read(path)["requested"])


def _read_limit(value: object) -> float:
    """Return a limit of a budget; a whole number stays one, because requests are counted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a limit")
    return value


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data: Any = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {"caps": {}, "requested": []}
    except (OSError, orjson.JSONDecodeError) as error:
        raise JournalError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("v") != _VERSION:
        raise JournalError(f"{path}: not a file of this version of fanfold; remove it, and resume")
    return dict(data)


def write_raised_limits(
    path: Path, caps: Mapping[str, Json], requested: Set[str] = frozenset()
) -> None:
    """Write the raised limits in one step.

    Args:
        path: The file.
        caps: The limits by setting name.
        requested: Names set by requests; they stay within the limits that their graph is bound to.

    Raises:
        JournalError: The file cannot be written.
    """
    write_json(path, {"v": _VERSION, "caps": dict(caps), "requested": sorted(requested)})
