"""``fanfold resume``: a run goes on, or has ended already."""

from __future__ import annotations

from pathlib import Path

from ...backends.storage.run_folder import open_folder
from ...configs.overrides import Overrides
from ..run.run_result import read_finished_run
from ..run.stage_folder import check_single_run
from .options import OutputMode
from .report_at_end import write_report_at_end
from .run_end import print_result


def resume_folder(path: Path, overrides: Overrides, output: OutputMode) -> int:
    """Resume a run, or show the end of a finished one; return the exit code."""
    folder = open_folder(path)
    if not folder.is_pipeline:
        check_single_run(folder)
    if not (overrides.starts_session or folder.is_pipeline):
        ended = read_finished_run(folder)
        if ended is not None:
            code = print_result(ended, output)
            if not folder.report.is_file():
                write_report_at_end(path, code, output)
            return code
    from .run import resume_in_session  # imports LangGraph

    loaded = overrides.resolve(str(folder.settings))[0] if overrides.changes_settings else None
    return resume_in_session(folder, loaded, overrides, output)
