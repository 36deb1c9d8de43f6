"""``fanfold report``: a run as one page, and the page that a run writes at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...backends.core.errors import ConfigurationError
from ...backends.storage.run_folder import open_folder
from ..report.page import write_report
from ..report.pipeline_page import write_pipeline_report
from ..run.console import print_messages

_PACKAGE: Final = (__package__ or "").partition(".")[0]


def show_report(path: Path, target: Path | None) -> None:
    """Write the report of a run or a pipeline.

    Args:
        path: The run folder.
        target: The file; None is ``report.html`` in the run folder.

    Raises:
        ConfigurationError: The folder is no run folder, or the file cannot be written.
        JournalError: A file of the run is damaged, or the report cannot be written.
    """
    if target is not None and target.is_dir():
        raise ConfigurationError(f"-o {target}: is a folder; name a file")
    if target is not None and not target.parent.is_dir():
        raise ConfigurationError(f"-o {target}: the folder {target.parent} does not exist")
    is_pipeline = open_folder(path).is_pipeline
    written = write_pipeline_report(path, target) if is_pipeline else write_report(path, target)
    size = written.stat().st_size
    print_messages([f"Report: {written} ({size / 1e6:,.1f} MB)"])
