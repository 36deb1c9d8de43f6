"""``fanfold results``: the results so far, as a file or on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from ...backends.core.errors import ConfigurationError
from ...backends.core.terminal import count_nouns
from ...backends.storage.results import write_csv, write_jsonl, write_parquet
from ...backends.storage.run_folder import open_folder
from ..run.console import open_data_stream, print_messages
from ..run.result_rows import ResultSource, open_result_source
from ..run.stage_folder import find_run

_FORMATS: Final = ("jsonl", "csv", "parquet")
_SUFFIXES: Final = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def export_results(  # noqa: PLR0913 - one for each option of the command
    path: Path,
    given: str | None,
    target: Path | None,
    safe_csv: bool = False,
    optional: Sequence[str] = (),
    *,
    samples: bool = False,
    stage: str | None = None,
) -> None:
    """Write one row per finished item.

    Args:
        path: The run folder, or that of a pipeline.
        given: The format; None follows the suffix of ``target``.
        target: The file; None is stdout.
        safe_csv: Whether cells that start a formula are quoted.
        optional: Names of optional columns.
        samples: Write one row per sample, in place of one for all samples of a row.
        stage: Of a pipeline, the stage (``NAME`` or ``NAME/LEVEL``); None is the last with results.

    Raises:
        ConfigurationError: The format is unknown or does not fit, the file cannot be written, or
            there are no samples.
    """
    form = _choose_format(given, target)
    if form == "parquet" and target is None:
        raise ConfigurationError("--format parquet is binary; give a file with -o FILE")
    if safe_csv and form != "csv":
        raise ConfigurationError(f"--safe-csv requires --format csv, not {form}")
    folder = open_folder(find_run(path, stage))
    if target is not None:
        _check_target(target)
    with open_result_source(folder, optional, samples=samples) as source:
        if target is None:
            _write_text(source, form, open_data_stream(form == "jsonl"), safe_csv)
            return
        if form == "parquet":
            rows = write_parquet(source.iter_rows(), target, source.layout)
        else:
            with _open_target(target) as stream:
                rows = _write_text(source, form, stream, safe_csv)
        total = len(source.store) // (1 if source.fold is None else source.fold.samples)
        print_messages([f"{target}: {rows:,} of {count_nouns(total, 'item')} as {form}"])


def _choose_format(given: str | None, target: Path | None) -> str:
    """Return the format of results: the given one, that of the suffix, or JSON lines.

    Raises:
        ConfigurationError: It is unknown, or it and the suffix are two formats.
    """
    by_suffix = None if target is None else _SUFFIXES.get(target.suffix.lower())
    if given is not None and given not in _FORMATS:
        raise ConfigurationError(f"--format {given}: choose one of {', '.join(_FORMATS)}")
    if target is None:
        return given or "jsonl"
    if given is not None and by_suffix not in (None, given):
        msg = f"-o {target}: the suffix says {by_suffix}, but --format says {given}; change one"
        raise ConfigurationError(msg)
    form = given or by_suffix
    if form is None:
        known = ", ".join(_SUFFIXES)
        msg = f"-o {target}: the suffix names no format ({known}); give --format as well"
        raise ConfigurationError(msg)
    return form


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ConfigurationError(f"-o {target}: is a folder; name a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"-o {target}: the folder {target.parent} does not exist")


def _open_target(target: Path) -> IO[bytes]:
    try:
        return target.open("wb")
    except OSError as error:
        raise ConfigurationError(f"{target}: cannot be written: {error.strerror}") from None


def _write_text(source: ResultSource, form: str, stream: IO[bytes], safe_csv: bool) -> int:
    """Write the results; return the number of rows."""
    if form == "csv":
        return write_csv(source.iter_rows(), stream, source.layout, safe=safe_csv)
    return write_jsonl(source.iter_rows(), stream, source.layout)
