"""The commands that look: status, results, presets; and the simulated fleet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from rich.table import Table
from rich.text import Text

from ...backends.budget.cost import (
    Cost,
    budget_so_far,
    cost_so_far,
    dollars,
    doubts,
    nodes,
    tokens_json,
)
from ...backends.core.errors import ConfigurationError
from ...backends.storage.journal_index import Ledger
from ...backends.storage.results import rows, write_csv, write_jsonl, write_parquet
from ...backends.storage.run_folder import RunFolder, open_folder, read_extents, run_ids
from ...configs.loader import peek
from ...configs.source import at_path
from ..campaign import campaign
from ..saying import Terminal, data_stream, print_json
from .report import cell
from .usage import show_jobs

_FORMATS: Final = ("jsonl", "csv", "parquet")


def status(path: Path, as_json: bool, usage: bool = False, batch: int | None = None) -> None:
    """Show how far a run is, and its jobs if it has any."""
    folder = open_folder(path)
    about = folder.read_provenance()
    with Ledger(folder.journal, run_ids(about), about["input"]["items"]) as ledger:
        counts, spent = ledger.counts(), ledger.total()
        cost = cost_so_far(folder, run_ids(about), ledger.spent)
    last = about["lives"][-1] if about["lives"] else {"outcome": None}
    state = "running" if folder.in_use() else last["outcome"] or "killed; resumable"
    facts = {
        "run": about["run"],
        "name": about["name"],
        "state": state,
        "simulated": about["simulated"],
        "model": about["model"],
        "items": about["input"]["items"],
        "done": counts.done,
        "failed": counts.failed,
        "open": counts.open,
        "requests": spent.requests,
        "reused": spent.reused,
    }
    jobs = campaign(path, usage, batch)
    if as_json:
        costs = cost.to_json() | {"budget": budget_so_far(folder, cost)}
        chain = {} if jobs is None else {"chain": jobs}
        print_json(facts | costs | {"lives": len(about["lives"])} | chain)
        return
    table = Table(show_header=False)
    for key, value in (facts | _costs(folder, cost) | {"lives": len(about["lives"])}).items():
        table.add_row(key, _shown(value))
    Terminal().print(table)
    if jobs is not None:
        show_jobs(jobs, Terminal())


def _costs(folder: RunFolder, cost: Cost) -> dict[str, Any]:
    """Return what a run has cost as it is shown; what nobody counts or limits is left out."""
    limits = budget_so_far(folder, cost)
    shown: dict[str, Any] = {"tokens": tokens_json(cost.spent)}
    if cost.nano_usd is not None:
        shown["cost"] = dollars(cost)
    shown["nodes"] = nodes(cost)
    for name, limit in limits.items():
        shown[f"budget.{name}"] = f"{_number(limit['spent'])} of {_number(limit['cap'])}"
    if more := doubts(cost):
        shown["in doubt"] = more
    return shown


def _number(value: float) -> str:
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if value >= 1 else f"{value:.4g}"


def _shown(value: Any) -> Text:
    if isinstance(value, dict):
        return Text(", ".join(f"{_shown(inner)} {name}" for name, inner in value.items()))
    if isinstance(value, bool):
        return Text(str(value).lower())
    return Text(f"{value:,}") if isinstance(value, int) else cell(value)


def results(path: Path, form: str, target: Path | None, safe_csv: bool = False) -> None:
    """Write the finished items' rows."""
    if form not in _FORMATS:
        raise ConfigurationError(f"--format {form}: there are {', '.join(_FORMATS)}")
    if form == "parquet" and target is None:
        raise ConfigurationError("--format parquet is no text; give a file with -o FILE")
    if safe_csv and form != "csv":
        raise ConfigurationError(f"--safe-csv goes with --format csv, not with {form}")
    folder = open_folder(path)
    if target is not None:
        _check_target(target)
    about, schema = folder.read_provenance(), _schema(folder)
    items, extents = about["input"]["items"], read_extents(folder)
    with Ledger(folder.journal, run_ids(about), items, extents) as ledger:
        records = rows(ledger.records(), priced=ledger.total().nano_usd > 0)
        if form == "parquet" and target is not None:
            write_parquet(records, target, schema)
        elif target is None:
            _write_text(records, form, data_stream(form == "jsonl"), schema, safe_csv)
        else:
            with _opened(target) as stream:
                _write_text(records, form, stream, schema, safe_csv)


def _schema(folder: RunFolder) -> dict[str, Any] | None:
    """Return the answers' schema; nobody needs the endpoints' key to read results."""
    schema = at_path(peek(folder.settings)[0], ("task", "schema"))
    return schema if isinstance(schema, dict) else None


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ConfigurationError(f"-o {target}: is a folder; name a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"-o {target}: there is no folder {target.parent}")


def _opened(target: Path) -> IO[bytes]:
    try:
        return target.open("wb")
    except OSError as error:
        raise ConfigurationError(f"{target}: cannot be written: {error.strerror}") from None


def _write_text(
    records: Iterator[Mapping[str, Any]],
    form: str,
    stream: IO[bytes],
    schema: dict[str, Any] | None,
    safe_csv: bool,
) -> None:
    if form == "csv":
        write_csv(records, stream, schema, safe=safe_csv)
    else:
        write_jsonl(records, stream)
