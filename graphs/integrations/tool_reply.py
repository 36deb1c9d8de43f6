"""What a tool says to the agent that called it: short, and enough to act upon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow.parquet as pq

from ...backends.core.errors import BudgetExhaustedError, FanfoldError, InputError, RunStoppedError
from ...backends.core.types import Json

_TEXT: Final = 300
_FAILURES: Final = 5


def reply(end: Mapping[str, Any], rows: int) -> str:
    """Return a run's end as JSON text for a model; blocks.

    Args:
        end: What the graph ended with.
        rows: Most rows of each reduce stage.

    Raises:
        BudgetExhaustedError: The run asks for a higher budget, and no agent is there to be
            interrupted.
    """
    if asked := end.get("__interrupt__"):
        raise BudgetExhaustedError(str(asked[0].value["why"]))
    progress, results = end["progress"], end["results"]
    said: dict[str, Json] = {
        "items": progress["items"],
        "done": progress["done"],
        "failed": progress["failed"],
        "simulated": results["simulated"],
        "aggregate": [_stage(stage, rows) for stage in end["aggregate"]],
        "results": {"table": results["table"], "folder": results["folder"]},
    }
    if rows and not any("rows" in stage for stage in end["aggregate"]):
        said["first"] = list(_first(Path(results["table"]), rows))
    if progress["failed"]:
        said["failures"] = list(_failures(Path(results["failures"])))
    if results["simulated"]:
        said["note"] = "simulated answers: they come from no model and mean nothing"
    return orjson.dumps(said).decode()


def _stage(stage: Mapping[str, Any], rows: int) -> dict[str, Json]:
    """Return a stage with its first rows, and how many there are beside them."""
    shown = dict(_short(stage))
    for key in ("rows", "counts"):
        found = stage.get(key)
        if isinstance(found, Sequence) and len(found) > rows:
            shown[key] = _short(found[:rows])
            shown[f"more_{key}"] = len(found) - rows
    return shown


def _short(value: Json) -> Json:
    """Return plain data with its texts cut."""
    if isinstance(value, str):
        return value if len(value) <= _TEXT else value[: _TEXT - 1] + "…"
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return value


def _first(table: Path, rows: int) -> Iterator[Json]:
    """Yield the first answers of a results table; blocks."""
    for batch in pq.ParquetFile(table).iter_batches(rows, columns=["id", "output"]):
        yield from (_short(row) for row in batch.to_pylist() if row["output"] is not None)
        return


def _failures(file: Path) -> Iterator[Json]:
    """Yield the first failed items; blocks."""
    with file.open("rb") as lines:
        for line, _ in zip(lines, range(_FAILURES), strict=False):
            record = orjson.loads(line)
            yield _short({key: record[key] for key in ("id", "error_class", "error")})


def complaint(error: FanfoldError, folder: Path) -> str:
    """Return an error as the text that tells an agent what to do.

    Args:
        error: What happened.
        folder: The run's folder.
    """
    if isinstance(error, InputError):
        return f"{error.message}. Nothing was asked; correct the items and call again."
    if isinstance(error, RunStoppedError):
        return (
            f"{error.message}. What is finished is kept in {folder}. Calling again does not help "
            "now: report this to the user."
        )
    return f"{error.message}. You cannot mend this: report it to the user."
