"""How a session of a run has ended; also of a run that ended before, from its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...backends.batch.files import BatchFolder, describe_open_batches
from ...backends.budget.cost import Cost
from ...backends.budget.spend_log import open_spend_logs
from ...backends.core.errors import JournalError
from ...backends.storage.journal import EXTENTS_FILE, Journal, list_lost_files
from ...backends.storage.run_folder import (
    RunFolder,
    get_folder_identity,
    get_run_ids,
    read_aggregate_file,
    read_file_stamp,
)
from ...configs.raw_settings import get_at_path, read_settings
from .next_steps import FINISHED

if TYPE_CHECKING:
    from ...configs.models import BatchConfig


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of one session of a run.

    Attributes:
        exit_code: Exit code.
        folder: The run's folder.
        run_id: The run's id.
        seconds: Wall time of this session.
        progress: Counts of items, requests and tokens.
        aggregate: One entry per aggregator; empty if the run is not finished.
        simulated: Whether the answers are simulated.
        reason: Why it was interrupted, or None.
        budget: Spent amount and cap, by limit.
        cost: Cost of all sessions; None until this session has ended.
        open_batches: Messages about batches whose answers are not collected.
        batch: Its files in OpenAI's batch format; None if the result is read from the folder.
    """

    exit_code: int
    folder: RunFolder
    run_id: str
    seconds: float
    progress: dict[str, Any]
    aggregate: list[dict[str, Any]]
    simulated: bool
    reason: str | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    open_batches: tuple[str, ...] = ()
    batch: BatchConfig | None = None


def read_finished_run(folder: RunFolder) -> RunResult | None:
    """Return the result of a run in which nothing is left to do, from its folder alone; blocks.

    No setting is looked at, so that no ``${VAR}`` needs a value.

    Returns:
        The result; None if an item is open, or if settings, journal or results are not as the last
        session left them, so that a session has something to do.

    Raises:
        JournalError: The journal or a spend log is damaged.
    """
    started, about = time.monotonic(), folder.read_provenance()
    last = about["sessions"][-1] if about["sessions"] else {}
    ids, settings = get_run_ids(about), read_settings(folder.settings).data
    is_same = (
        last.get("outcome") == FINISHED
        and last.get("settings") == folder.digest_settings()
        and about.get("place") == get_folder_identity(folder.path)
        and folder.results.exists()
        and folder.failures.exists()
        and not folder.is_in_use()
        and _is_input_same(about, settings)
        and not any((settings.get("batch") or {}).values())
    )
    if not is_same or not (folder.journal / EXTENTS_FILE).exists():
        return None
    if list_lost_files(folder.journal):
        return None
    try:
        kept = read_aggregate_file(folder)
    except JournalError:  # a session writes it again
        return None
    if kept is None:
        return None
    with Journal(folder.journal, ids, about["input"]["items"]) as journal:
        if journal.count_items().open or journal.extents() != kept.extents:
            return None
        usage, sessions = journal.total_usage(), journal.usage_by_session
    logs = open_spend_logs(folder, ids)
    doubt = logs.unaccounted({session: spent.amount for session, spent in sessions.items()})
    is_priced = kept.progress["usd"] is not None
    return RunResult(
        exit_code=last["exit_code"],
        folder=folder,
        run_id=about["run"],
        seconds=round(time.monotonic() - started, 3),
        progress=kept.progress,
        aggregate=kept.aggregate,
        simulated=bool(about["simulated"]),
        cost=Cost(usage, logs.total_node_time(), doubt, is_priced),
        open_batches=tuple(describe_open_batches(BatchFolder(folder.batches).read())),
    )


def _is_input_same(about: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return True if the input file is as it was, or is not there; a session reads one that is."""
    path, known = get_at_path(settings, ("input", "path")), about["input"].get("stamp")
    if not isinstance(path, str) or not Path(path).exists():  # also if it contains a ${VAR}
        return True
    return known is not None and read_file_stamp(Path(path)) == known
