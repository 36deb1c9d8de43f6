"""Files of batches: requests, answers, and the records of what was submitted."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, Self, TypeAlias

import orjson

from ..core.disk import sync_folder
from ..core.errors import ConfigurationError, JournalError
from ..core.money import Amount
from ..core.terminal import count_nouns
from ..core.types import CHAT_URL, Usage
from ..core.values import check_counts, is_count, parse_json
from ..storage.run_folder import write_bytes, write_json

if TYPE_CHECKING:
    from ...configs.backend import BackendConfig

STAGE: Final = "map"
"""Stage of the requests; a run has one."""

_FORMAT: Final = 1
_STATES: Final = ("posting", "refused", "submitted", "collected")
_NO_ANSWER: Final = 500
"""Status of a line without one."""

BatchState: TypeAlias = Literal["posting", "refused", "submitted", "collected"]


def make_custom_id(run: str, index: int, attempt: int) -> str:
    """Return the ``custom_id`` of a request: ``RUN:STAGE:INDEX:ATTEMPT``."""
    return f"{run}:{STAGE}:{index}:{attempt}"


def digest_body(body: Mapping[str, Any]) -> bytes:
    """Return the digest by which a resumed run knows a request again."""
    data = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).digest()


def encode_request(custom_id: str, body: Mapping[str, Any]) -> bytes:
    """Return a line of OpenAI's batch format."""
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT_URL, "body": body}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True, slots=True)
class LineRecord:
    """What a run folder keeps of one request.

    Attributes:
        index: Index of the item.
        attempt: Number of the item's request, from 1.
        digest: Digest of the body.
        most: The most tokens that it may use.
    """

    index: int
    attempt: int
    digest: bytes
    most: Usage


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What a run folder keeps of one batch.

    Attributes:
        number: Its number in the run, from 1.
        session: The session that made it.
        input_file: Its file of requests.
        output_folder: The folder for its answers, which no other batch has.
        sha256: Digest of the file.
        lines: Number of requests.
        most_tokens: The most tokens that they may use.
        state: ``posting``: may have been submitted; ``refused``: was not; ``submitted``: was, by
            ``batch_id``; ``collected``: its answers have been read.
        batch_id: The service's name for it.
        submitted_at: Unix time in seconds when it was submitted.
        answered: Answers among the lines read.
        failed: Errors among them.
        missing: Requests without a line.
        foreign: Lines read that belong to no request of it.
        spent: The most that it has used, as plain data of an amount; None without a budget.
        reason: What the service said about a batch that it refused, or that failed.
    """

    number: int
    session: int
    input_file: str
    output_folder: str
    sha256: str
    lines: int
    most_tokens: int
    state: BatchState = "posting"
    batch_id: str | None = None
    submitted_at: float | None = None
    answered: int = 0
    failed: int = 0
    missing: int = 0
    foreign: int = 0
    spent: dict[str, int] | None = None
    reason: str | None = None

    @property
    def is_open(self) -> bool:
        """Return True if the service may have it, or has answers that are not read."""
        return self.state in {"posting", "submitted"}

    @property
    def is_void(self) -> bool:
        """Return True if it ended without a line of output."""
        return self.state == "collected" and not self.answered and not self.failed

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Parse plain data.

        Raises:
            ValueError: It is no record of a batch.
        """
        if not isinstance(data, dict) or data.get("v") != _FORMAT:
            raise ValueError("not a record of a batch of this version of fanfold")
        fields = {key: value for key, value in data.items() if key != "v"}
        counts = ("number", "session", "lines", "most_tokens")
        check_counts(fields, (*counts, "answered", "failed", "missing", "foreign"), "batch")
        texts = ("input_file", "output_folder", "sha256")
        if not all(isinstance(fields.get(key), str) and fields[key] for key in texts):
            raise ValueError("a path or a digest is missing")
        if any(fields.get(key) is None for key in counts) or fields.get("state") not in _STATES:
            raise ValueError("a number or the state is missing")
        for key, kinds in (("batch_id", str), ("reason", str), ("submitted_at", (int, float))):
            if fields.get(key) is not None and not isinstance(fields[key], kinds):
                raise ValueError(f"{key} is {fields[key]!r}")
        if fields.get("spent") is not None:
            Amount.from_json(fields["spent"])
        if fields["state"] == "submitted" and not fields.get("batch_id"):
            raise ValueError("it is submitted and has no id")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from None


class BatchFolder:
    """Records of a run's batches in its run folder; every method blocks.

    Each batch has two files: ``0001.lines`` with its requests, written once before it is submitted,
    and ``0001.json`` with its state. A batch without the second was never submitted.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def state_path(self, number: int) -> Path:
        """Return the file with the state of a batch."""
        return self._path / f"{number:04}.json"

    def lines_path(self, number: int) -> Path:
        """Return the file with the requests of a batch."""
        return self._path / f"{number:04}.lines"

    def read(self) -> list[BatchRecord]:
        """Return the batches, oldest first.

        Raises:
            JournalError: A file is damaged.
        """
        found = list[BatchRecord]()
        for path in sorted(self._path.glob("[0-9]*.json"), key=lambda path: path.name):
            try:
                found.append(BatchRecord.from_json(orjson.loads(path.read_bytes())))
            except (OSError, ValueError) as error:
                raise JournalError(f"{path}: the record of a batch is damaged: {error}") from None
        return sorted(found, key=lambda record: record.number)

    def next_number(self) -> int:
        """Return the number of the next batch."""
        numbers = (path.stem for path in self._path.glob("[0-9]*.*"))
        return 1 + max((int(name) for name in numbers if name.isdigit()), default=0)

    def write_lines(self, number: int, lines: Sequence[LineRecord]) -> None:
        """Keep the requests of a batch.

        Raises:
            JournalError: The file cannot be written.
        """
        made = not self._path.exists()
        try:
            self._path.mkdir(exist_ok=True)
            if made:
                sync_folder(self._path.parent)
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be made: {error.strerror}") from error
        data = b"".join(
            orjson.dumps(
                [one.index, one.attempt, one.digest.hex(), one.most.prompt, one.most.completion],
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for one in lines
        )
        write_bytes(self.lines_path(number), data)

    def read_lines(self, record: BatchRecord) -> list[LineRecord]:
        """Return the requests of a batch.

        Raises:
            JournalError: The file is damaged.
        """
        path = self.lines_path(record.number)
        try:
            found = [_parse_line(line) for line in path.read_bytes().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise JournalError(f"{path}: the requests of a batch are damaged: {error}") from None
        if len(found) != record.lines:
            msg = f"{path}: {count_nouns(len(found), 'request')}, but the batch has {record.lines}"
            raise JournalError(msg)
        return found

    def write(self, record: BatchRecord) -> None:
        """Replace the state of a batch; on return it is on disk.

        Raises:
            JournalError: The file cannot be written.
        """
        path = self.state_path(record.number)
        write_json(path, {"v": _FORMAT, **asdict(record)})
        try:
            sync_folder(self._path)
        except OSError as error:
            raise JournalError(f"{path}: cannot be flushed: {error.strerror}") from error

    def discard(self, record: BatchRecord, folder: Path, run: str) -> None:
        """Remove a batch that the service refused, with its file of requests.

        Args:
            record: The batch.
            folder: The folder of the files.
            run: The run's id; a file of a run that this one is a copy of stays.

        Raises:
            JournalError: A file cannot be removed.
        """
        file = Path(record.input_file)
        try:
            if file.parent == folder and file.name.startswith(_make_stem(run)):
                file.unlink(missing_ok=True)
            self.state_path(record.number).unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"{error.filename}: cannot be removed: {error.strerror}") from error


def _make_stem(run: str) -> str:
    """Return the beginning of the names of a run's files of requests."""
    return f"fanfold-{run}-"


def _parse_line(line: bytes) -> LineRecord:
    index, attempt, digest, prompt, completion = orjson.loads(line)
    if not all(map(is_count, (index, attempt, prompt, completion))):
        raise ValueError("not a request of a batch")
    return LineRecord(index, attempt, bytes.fromhex(digest), Usage(prompt, completion))


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that appears under its name, durable, when the block succeeds.

    Raises:
        ConfigurationError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        msg = (
            f"backend.dir: {path} cannot be written: {error.strerror}; free disk space or set "
            "another folder, then resume"
        )
        raise ConfigurationError(msg) from error


@dataclass(frozen=True, slots=True)
class RequestFile:
    """A file of requests that was written.

    Attributes:
        path: The file.
        output_folder: The folder for its answers; it does not exist yet.
        sha256: Its digest.
    """

    path: Path
    output_folder: Path
    sha256: str


def write_requests(folder: Path, run: str, number: int, lines: Iterable[bytes]) -> RequestFile:
    """Write the requests of a batch under a name that no file had before.

    Args:
        folder: The folder on the cluster's file system.
        run: The run's id.
        number: The batch's number.
        lines: The encoded requests.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    stem = f"{_make_stem(run)}{number:04}-{secrets.token_hex(4)}"
    path, digest = folder / f"{stem}.jsonl", hashlib.sha256()
    with _new_file(path) as file:
        for line in lines:
            digest.update(line)
            file.write(line)
    return RequestFile(path, folder / f"{stem}.out", digest.hexdigest())


def check_batch_settings(config: BackendConfig) -> None:
    """Check that the folder of the settings can hold files of batches, if they ask for batches.

    Blocks.

    Raises:
        ConfigurationError: It cannot.
    """
    if not config.is_batch or config.dir is None:
        return
    path = Path(config.dir)
    if not path.is_dir():
        msg = (
            f"backend.dir: {path} is not a folder here; make it on the cluster's file system, and "
            "run fanfold where that is mounted under the same path"
        )
        raise ConfigurationError(msg)
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        msg = f"backend.dir: {path} cannot be read and written; set another folder"
        raise ConfigurationError(msg)


LineKey: TypeAlias = tuple[int, int]
"""Index of an item, and number of its request."""


@dataclass(slots=True)
class BatchOutput:
    """What the output folder of a batch contains.

    Attributes:
        files: Number of files.
        answers: Status and body by request; of several lines with the same name, the first good
            one.
        foreign: Lines that belong to no request of the batch, or cannot be read.
    """

    files: int = 0
    answers: dict[LineKey, tuple[int, bytes]] = field(default_factory=dict)
    foreign: int = 0

    def add(self, line: bytes, run: str, wanted: Mapping[LineKey, object]) -> None:
        """Add one line of a file, if it answers a request."""
        try:
            data = parse_json(line)
        except (ValueError, RecursionError):
            self.foreign += 1
            return
        key = _parse_custom_id(data, run)
        if key is None or key not in wanted:
            self.foreign += 1
            return
        known = self.answers.get(key)
        if known is None or known[0] != _OK:
            status, body = _parse_response(data)
            if known is None or status == _OK:
                self.answers[key] = status, body


_OK: Final = 200


def _parse_custom_id(data: Any, run: str) -> LineKey | None:
    """Return the request that a line of output names, or None."""
    name = data.get("custom_id") if isinstance(data, dict) else None
    if not isinstance(name, str):
        return None
    found = re.fullmatch(rf"{re.escape(run)}:{STAGE}:([0-9]{{1,18}}):([0-9]{{1,9}})", name)
    return None if found is None else (int(found[1]), int(found[2]))


def _parse_response(data: Mapping[str, Any]) -> tuple[int, bytes]:
    """Return status and body of a line; an error without a status has 500."""
    response, error = data.get("response"), data.get("error")
    response = response if isinstance(response, dict) else {}
    given, body = response.get("status_code"), response.get("body")
    valid = type(given) is int and 100 <= given <= 599  # noqa: PLR2004 - HTTP's own numbers
    status = int(given) if valid and given is not None else _NO_ANSWER
    if body is None or (error and status == _OK):
        body = {"error": error or "a line without an answer"}
        return (_NO_ANSWER if status == _OK else status), _dump(body)
    return status, _dump(body)


def _dump(body: Any) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:  # nested too deep
        return b'{"error": "an answer that cannot be read"}'


def read_output(
    folder: Path, runs: Sequence[str], wanted: Mapping[LineKey, object], most_bytes: int
) -> BatchOutput:
    """Read the answers of a batch; blocks.

    All JSON lines in its folder are read, because names of files and keys of the service's result
    are not part of any description.

    Args:
        folder: The batch's output folder.
        runs: The ids of the run.
        wanted: The requests of the batch.
        most_bytes: A longer line is not read.

    Raises:
        OSError: A file cannot be read.
    """
    output = BatchOutput()
    names = [f'"{run}:'.encode() for run in runs]
    for path in sorted(folder.rglob("*.jsonl")) if folder.is_dir() else ():
        if not path.is_file():
            continue
        output.files += 1
        with path.open("rb") as file:
            for line in _iter_lines(file, most_bytes):
                run = next((run for run, name in zip(runs, names, strict=True) if name in line), "")
                if line.strip():
                    output.add(line, run, wanted)
    return output


def _iter_lines(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Yield the lines of a file; of a line that is too long, its beginning."""
    while line := file.readline(most_bytes + 1):
        yield line
        while not line.endswith(b"\n") and (line := file.readline(most_bytes + 1)):
            pass


def summarize_batches(records: Sequence[BatchRecord]) -> dict[str, int]:
    """Return the number of batches by state, and the sums of their lines."""
    collected = [record for record in records if record.state == "collected"]
    return {
        "submitted": sum(record.state == "submitted" for record in records),
        "in_doubt": sum(record.state == "posting" for record in records),
        "collected": len(collected),
        "requests": sum(record.lines for record in records),
        "answered": sum(record.answered for record in collected),
        "failed": sum(record.failed for record in collected),
        "missing": sum(record.missing for record in collected),
    }


def describe_open_batches(records: Iterable[BatchRecord]) -> list[str]:
    """Return messages about batches whose answers are not collected."""
    open_ = [record for record in records if record.is_open]
    if not open_:
        return []
    lines, tokens = sum(r.lines for r in open_), sum(r.most_tokens for r in open_)
    what = count_nouns(len(open_), "batch", "batches")
    found = [
        f"{what} with {count_nouns(lines, 'request')} cannot be recalled and may cost up to "
        f"{tokens:,} tokens; "
        "resume the run to collect the answers"
    ]
    found += [
        f"batch {r.number}: it is not known whether the service has it ({r.input_file})"
        for r in open_
        if r.state == "posting"
    ]
    return found
