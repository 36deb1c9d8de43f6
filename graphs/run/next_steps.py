"""How a run goes on: the commands that continue it, and what its failures need."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from ...backends.budget.cost import Cost, read_budget
from ...backends.core.errors import EXIT_BUDGET
from ...backends.core.remedies import find_remedy
from ...backends.storage.journal_file import ItemCounts
from ...backends.storage.run_folder import RunFolder
from ...configs.loader import read_settings
from ...configs.raw_settings import get_at_path

FINISHED: Final = "finished"
"""Outcome of a session that ended all items."""


def find_next_command(
    folder: RunFolder, about: Mapping[str, Any], counts: ItemCounts, cost: Cost
) -> str | None:
    """Return the command that continues a run, or None if there is nothing to do, or a session."""
    if folder.is_in_use() or folder.read_place() is not None:
        return None
    last = about["sessions"][-1] if about["sessions"] else {}
    if not counts.open and last.get("outcome") == FINISHED:
        return retry_command(folder) if counts.failed else None
    options = ""
    if last.get("exit_code") == EXIT_BUDGET:
        limits = read_budget(folder, cost)
        options = "".join(f" --budget-{name.replace('_', '-')} N" for name in limits)
    return f"fanfold resume {shlex.quote(str(folder.path))}{options}"


def continue_lines(folder: RunFolder, classes: Collection[str], running: bool) -> Iterator[str]:
    """Yield how failed items are processed again.

    Args:
        folder: The run's folder.
        classes: The error classes of the run.
        running: Whether a session is working on the run.
    """
    if folder.read_place() is not None:
        yield "failed items are not passed on to later stages; a new run asks them again"
        return
    if any(find_remedy(name).is_retry for name in classes):
        when = "when the run has ended, retry" if running else "retry"
        yield f"{when} failed items with: {retry_command(folder)}"
    if fixed := [name for name in classes if not find_remedy(name).is_retry]:
        yield f"{', '.join(fixed)}: {_describe_new_run(folder)}"


def _describe_new_run(folder: RunFolder) -> str:
    """Return how a remedy that needs a new run is applied; requests cannot be taken over."""
    if get_at_path(read_settings(folder.settings).data, ("input", "format")) == "openai_batch":
        return "the remedy needs a new run in another folder"
    command = f"fanfold run NEW.yaml --from {shlex.quote(str(folder.path))}"
    return f"change the settings or the input, and extend the run: {command}"


def retry_command(folder: RunFolder) -> str:
    """Return the command that retries the failed items of a run."""
    return f"fanfold resume {shlex.quote(str(folder.path))} --retry-failed"
