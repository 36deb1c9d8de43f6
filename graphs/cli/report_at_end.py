"""The report that ``run`` and ``resume`` write at their end, in a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

from ...backends.core.errors import EXIT_INTERRUPTED
from ..run.console import print_messages
from .options import OutputMode

_PACKAGE: Final = (__package__ or "").partition(".")[0]


def write_report_at_end(path: Path, code: int, output: OutputMode) -> None:
    """Write the report of a run that has ended, on a terminal; whatever fails is a warning.

    Args:
        path: The run folder.
        code: Exit code of the run; an interrupted one should end at once.
        output: How the command prints.
    """
    if output.no_report or output.as_json or code == EXIT_INTERRUPTED or not sys.stderr.isatty():
        return
    if not output.quiet:
        print_messages(["Writing the report (Ctrl-C skips it)"])
    command = [sys.executable, "-P", "-m", _PACKAGE, "report", str(path)]
    try:
        found = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except KeyboardInterrupt:
        reason: str | None = "interrupted"
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        reason = lines[-1].removeprefix("Error: ") if found.returncode else None
        if reason is None and not output.quiet:
            print_messages(lines[-1:])
    if reason is not None:
        again = f"fanfold report {shlex.quote(str(path))}"
        print_messages([f"WARNING: no report was written ({reason}); write it with: {again}"])
