"""``fanfold ls``: the runs in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...backends.budget.cost import read_cost
from ...backends.core.errors import ConfigurationError, FanfoldError
from ...backends.core.money import NANO_PER_USD
from ...backends.core.values import is_count
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    open_folder,
    read_noted_counts,
    read_state,
)
from ..run.console import print_json, print_messages
from ..run.rich_console import Terminal
from ..run.stage_folder import describe_stage, find_models, is_operator, list_stage_runs
from .format import format_usd_amount
from .tables import Column, make_table

_MOST_READ: Final = 4 << 20
"""Bytes of a journal that are read to count the items of a session that has not ended."""

_UNKNOWN: Final = "?"
_NOTED: Final = "~"
_NOTHING: Final = "-"


@dataclass(frozen=True, slots=True)
class _Run:
    """A run as a list shows it; counts and dollars are None if unknown.

    Attributes:
        folder: Its folder, as a command takes it.
        name: Its name in the settings.
        run: Its id.
        state: Running, or how its last session ended.
        stage: Of a running pipeline, the stage or level that was begun last; else None.
        items: Items in all; of a pipeline, those of its input.
        done: Items with an answer; of a pipeline, in its first stage.
        failed: Items that failed; of a pipeline, in all of its stages.
        ended: Items that have ended; of a pipeline, in its first stage.
        usd: Dollars so far.
        model: Name of the model.
        date: When the last session ended, or began.
        simulated: Whether the answers are simulated; None if no endpoint has answered yet.
        noted: When the counts were noted, if the run may have gone on since; None for the counts
            of the journal, or of the end of the last session.
    """

    folder: str
    name: str
    run: str
    state: str
    stage: str | None
    items: int
    done: int | None
    failed: int | None
    ended: int | None
    usd: float | None
    model: str
    date: str
    simulated: bool | None
    noted: str | None = None


def list_runs(path: Path, as_json: bool) -> None:
    """List a run folder, or the run folders directly in a folder, the latest first.

    Raises:
        ConfigurationError: The folder does not exist or cannot be read.
    """
    runs, damaged = list[_Run](), dict[str, str]()
    for folder in _find_folders(path):
        try:
            runs.append(_read_run(folder))
        except FanfoldError as error:
            damaged[str(folder)] = error.message
        except OSError as error:
            damaged[str(folder)] = f"{folder}: cannot be read: {error.strerror or error}"
    runs.sort(key=lambda run: (run.date, run.folder), reverse=True)
    if as_json:
        print_json({"runs": runs, "damaged": damaged})
        return
    if runs:
        console = Terminal()
        for part in make_table(_columns(runs), console.width, framed=False):
            console.print(part)
        if any(run.done is None for run in runs):
            print_messages([f"{_UNKNOWN}: not counted; 'fanfold status DIR' reads the journal"])
        if any(_NOTED in _format_items(run) for run in runs):
            what = "as noted every 10 seconds; 'fanfold status DIR' reads the journal"
            print_messages([f"{_NOTED}: {what}"])
    print_messages([f"not listed: {reason}" for reason in damaged.values()])
    if not runs and not damaged:
        print_messages([f"{path}: no run folder, and none directly in it"])


def _find_folders(path: Path) -> Iterator[Path]:
    """Yield the folder and its children, as far as they look like run folders."""
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be listed: {error.strerror}") from None
    if _is_candidate(path):
        yield path
    yield from filter(_is_candidate, children)


def _is_candidate(path: Path) -> bool:
    """Return True if a folder is a run folder, whole or not; hidden ones are in preparation."""
    if path.name.startswith("."):
        return False
    try:
        return (path / "journal").is_dir() or (path / "provenance.json").is_file()
    except OSError:
        return False


def _read_run(path: Path) -> _Run:
    """Read what a list shows of a run.

    Raises:
        FanfoldError: It is not a whole run folder.
    """
    folder = open_folder(path)
    about = folder.read_provenance()
    try:
        state = read_state(folder, about)
        last = about["sessions"][-1] if about["sessions"] else {}
        is_running = state == "running"
        runs = list_stage_runs(folder) if folder.is_pipeline and is_running else []
        read = _count_stages if folder.is_pipeline else _count_items
        counts = read(folder, about, {} if is_running else last)
        return _Run(
            folder=str(path),
            name=str(about["name"]),
            run=str(about["run"]),
            state=str(state),
            stage=describe_stage(runs[-1]) if runs else None,
            items=int(about["input"]["items"]),
            done=counts.done,
            failed=counts.failed,
            ended=counts.ended,
            usd=counts.usd,
            model=find_models(folder, about),
            date=str(last.get("ended") or last.get("started") or ""),
            simulated=None if about["simulated"] is None else bool(about["simulated"]),
            noted=counts.noted,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        msg = f"{folder.provenance}: damaged ({type(error).__name__}: {error})"
        raise ConfigurationError(msg) from None


@dataclass(frozen=True, slots=True)
class _Counts:
    """Items by state, dollars, and when they were noted; None if unknown."""

    done: int | None = None
    failed: int | None = None
    ended: int | None = None
    usd: float | None = None
    noted: str | None = None


def _count_items(folder: RunFolder, about: Mapping[str, Any], last: Mapping[str, Any]) -> _Counts:
    """Return the counts of a run.

    A session has them at its end. While it runs, or after a kill, the journal has them; for a large
    one, the session's last note is shown.
    """
    if is_count(last.get("done")) and is_count(last.get("failed")):
        usd = last.get("usd")
        return _make_counts(
            last["done"], last["failed"], usd if isinstance(usd, int | float) else None
        )
    if sum(file.stat().st_size for file in folder.journal.glob("*.jsonl")) > _MOST_READ:
        noted = read_noted_counts(folder)
        if noted is None:
            return _Counts()
        return _make_counts(noted["done"], noted["failed"], noted["usd"], str(noted["noted"]))
    ids = get_run_ids(about)
    with Journal(folder.journal, ids, about["input"]["items"]) as journal:
        counts, cost = journal.count_items(), read_cost(folder, ids, journal.usage_by_session)
    usd = None if cost.nano_usd is None else cost.nano_usd / NANO_PER_USD
    return _make_counts(counts.done, counts.failed, usd)


def _make_counts(done: int, failed: int, usd: float | None, noted: str | None = None) -> _Counts:
    return _Counts(done, failed, done + failed, usd, noted)


def _count_run(run: RunFolder) -> _Counts:
    about = run.read_provenance()
    return _count_items(run, about, about["sessions"][-1] if about["sessions"] else {})


def _count_stages(folder: RunFolder, about: Mapping[str, Any], last: Mapping[str, Any]) -> _Counts:
    """Return the done and ended items of the first stage, the failed ones of all, and dollars."""
    if all(is_count(last.get(key)) for key in ("done", "failed", "failed_in_stages")):
        ended = last["done"] + last["failed"]
        return _Counts(last["done"], last["failed_in_stages"], ended, last.get("usd"))
    found = [_count_run(run) for run in list_stage_runs(folder)]
    noted = min((one.noted for one in found if one.noted), default=None)
    if any(one.done is None for one in found):
        return _Counts()
    usd = sum(one.usd or 0.0 for one in found) or None
    failed = sum(one.failed or 0 for one in found)
    from ..run.stage_folder import is_finished

    first = RunFolder(folder.stages / about["stages"][0])
    if found and not is_operator(first.path):
        return _Counts(found[0].done, failed, found[0].ended, usd, noted)
    ended = about["input"]["items"] if is_finished(first) else 0  # the items of an operator
    return _Counts(ended, failed, ended, usd, noted)


def _columns(runs: list[_Run]) -> list[Column]:
    """Return the columns, the most important first."""
    return [
        Column("run", [run.folder for run in runs], is_key=True),
        Column("state", [_format_state(run) for run in runs]),
        Column("items", [_format_items(run) for run in runs], is_number=True),
        Column("failed", [_format_count(run.failed) for run in runs], is_number=True),
        Column("simulated", [_format_simulated(run.simulated) for run in runs]),
        Column("cost", [_format_cost(run) for run in runs], is_number=True),
        Column("model", [run.model for run in runs]),
        Column("date (UTC)", [run.date[:16].replace("T", " ") for run in runs], is_number=True),
        Column("name", [run.name for run in runs]),
    ]


def _format_state(run: _Run) -> str:
    """Return the state without its reason, which may be a sentence."""
    state = run.state.partition(": ")[0]
    return state if run.stage is None else f"{state}: {run.stage}"


def _format_items(run: _Run) -> str:
    """Return the number of items, and how many of them have ended if not all have."""
    if run.ended is None:
        return f"{_UNKNOWN}/{run.items:,}"
    mark = _NOTED if run.noted else ""
    return f"{run.items:,}" if run.ended == run.items else f"{mark}{run.ended:,}/{run.items:,}"


def _format_count(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count:,}"


def _format_cost(run: _Run) -> str:
    if run.usd is not None:
        return format_usd_amount(run.usd)
    return _UNKNOWN if run.done is None else _NOTHING


def _format_simulated(simulated: bool | None) -> str:
    return (
        {True: "yes", False: "no"}.get(simulated, _NOTHING) if simulated is not None else _NOTHING
    )
