"""How a run goes on: the commands that continue it, and what its failures need."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from itertools import count
from typing import Any, Final

from ...backends.budget.cost import Cost, read_budget
from ...backends.core.errors import EXIT_BUDGET, TruncatedAnswerError
from ...backends.core.remedies import find_remedy
from ...backends.core.terminal import count_nouns
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import ItemCounts
from ...backends.storage.run_folder import RunFolder, get_run_ids
from ...configs.raw_settings import get_at_path, read_settings

FINISHED: Final = "finished"
"""Outcome of a session that ended all items."""


def find_next_command(
    folder: RunFolder,
    about: Mapping[str, Any],
    counts: ItemCounts,
    cost: Cost,
    classes: Collection[str],
) -> str | None:
    """Return the command that continues a run.

    Args:
        folder: The run's folder.
        about: Its provenance.
        counts: Its items by state.
        cost: Its cost.
        classes: The error classes of its failed items.

    Returns:
        None while a session works on it, and if no command alone helps: nothing is left to do, or
        the failed items need another input or other settings.
    """
    if folder.is_in_use() or folder.read_place() is not None:
        return None
    last = about["sessions"][-1] if about["sessions"] else {}
    if not counts.open and last.get("outcome") == FINISHED:
        if any(find_remedy(name).is_retry for name in classes):
            return retry_command(folder)
        is_cut = TruncatedAnswerError.__name__ in classes
        return longer_answers_command(folder) if is_cut else None
    options = ""
    if last.get("exit_code") == EXIT_BUDGET:
        limits = read_budget(folder, cost)
        options = "".join(f" --budget-{name.replace('_', '-')} N" for name in limits)
    return f"fanfold resume {shlex.quote(str(folder.path))}{options}"


def find_commands_by_class(folder: RunFolder, classes: Collection[str]) -> dict[str, str | None]:
    """Return by error class the command that processes its items again with a chance of success.

    Args:
        folder: The run's folder.
        classes: The error classes of its failed items.

    Returns:
        None for classes whose remedy needs another input or other settings first.
    """
    if folder.read_place() is not None:
        return dict.fromkeys(classes)
    commands = dict[str, str | None]()
    for name in classes:
        if find_remedy(name).is_retry:
            commands[name] = retry_command(folder)
        elif name == TruncatedAnswerError.__name__:
            commands[name] = longer_answers_command(folder)
        else:
            commands[name] = None
    return commands


def continue_lines(folder: RunFolder, classes: Collection[str], running: bool) -> Iterator[str]:
    """Yield how failed items are processed again.

    Args:
        folder: The run's folder.
        classes: The error classes of the run.
        running: Whether a session is working on the run.
    """
    if (place := folder.read_place()) is not None:
        yield (
            "failed items are not passed on to later stages; a new run that takes over the answers "
            f"asks them again: {ask_failed_command(RunFolder(place.root))}"
        )
        return
    fixed = [name for name in classes if not find_remedy(name).is_retry]
    if retried := [name for name in classes if name not in fixed]:
        when = "when the run has ended, retry" if running else "retry"
        helps = f" (helps {', '.join(retried)})" if fixed else ""
        yield f"{when} failed items{helps} with: {retry_command(folder)}"
    if TruncatedAnswerError.__name__ in fixed and (command := longer_answers_command(folder)):
        yield f"{TruncatedAnswerError.__name__}: ask again with a higher limit: {command}"
        fixed.remove(TruncatedAnswerError.__name__)
    if fixed:
        yield f"{', '.join(fixed)}: {_describe_new_run(folder)}"


def _describe_new_run(folder: RunFolder) -> str:
    """Return how a remedy that needs a new run is applied; requests cannot be taken over."""
    if _read_setting(folder, "input", "format") == "openai_batch":
        return "the remedy needs a new run in another folder"
    settings, command = shlex.quote(str(folder.settings)), ask_failed_command(folder)
    return (
        f"correct the input, or change a setting with --set KEY=VALUE or in a copy of {settings}, "
        f"and extend the run: {command}"
    )


def ask_failed_command(folder: RunFolder) -> str:
    """Return the command of a new run that takes over the answers and asks failed items again."""
    options = f"{_extend_options(folder)} --ask-again failed"
    return f"fanfold run {shlex.quote(str(folder.settings))} {options}"


def longer_answers_command(folder: RunFolder) -> str | None:
    """Return the command that asks truncated answers again with twice the tokens.

    Returns:
        None if the items are requests, each with a limit of its own, or the limit is unknown.
    """
    limit = _read_setting(folder, "model", "max_tokens")
    if _read_setting(folder, "input", "format") == "openai_batch" or not isinstance(limit, int):
        return None
    settings, options = shlex.quote(str(folder.settings)), _extend_options(folder)
    return f"fanfold run {settings} --set model.max_tokens={2 * limit} {options}"


def _extend_options(folder: RunFolder) -> str:
    """Return the options that extend a run in a folder beside it that does not exist yet."""
    path = folder.path
    beside = (path.with_name(f"{path.name}-{number}") for number in count(2))
    new = next(one for one in beside if not one.exists())
    return f"--from {shlex.quote(str(path))} --out {shlex.quote(str(new))}"


def _read_setting(folder: RunFolder, section: str, name: str) -> Any:
    return get_at_path(read_settings(folder.settings).data, (section, name))


def truncated_notice(folder: RunFolder) -> str | None:
    """Return a warning if retried items would be truncated at the same limit again; blocks.

    Raises:
        JournalError: The journal is damaged.
    """
    about = folder.read_provenance()
    with Journal(folder.journal, get_run_ids(about), about["input"]["items"]) as journal:
        failed = journal.count_failures().get(TruncatedAnswerError.__name__, 0)
    command = longer_answers_command(folder) if failed else None
    if command is None:
        return None
    limit = _read_setting(folder, "model", "max_tokens")
    return (
        f"WARNING: {count_nouns(failed, 'truncated answer')} will be asked again with the same "
        f"model.max_tokens ({limit:,}) and likely be truncated again; ask with a higher limit: "
        f"{command}"
    )


def retry_command(folder: RunFolder) -> str:
    """Return the command that retries the failed items of a run."""
    return f"fanfold resume {shlex.quote(str(folder.path))} --retry-failed"
