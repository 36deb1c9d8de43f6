"""The files of a finished run."""

from __future__ import annotations

from typing import Any

from ...backends.storage.results import replacing, rows, write_jsonl, write_parquet
from ...backends.storage.run_folder import RunFolder, write_json
from ...configs.loader import Loaded
from ...nodes.context import RunTools


def write_results(
    folder: RunFolder,
    loaded: Loaded,
    tools: RunTools,
    aggregate: list[dict[str, Any]],
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Write results, failures and aggregate; return references to them.

    Raises:
        LedgerError: A file could not be written.
    """
    extents = tools.ledger.extents()
    schema, priced = loaded.config.task.answer_schema, tools.priced
    write_parquet(rows(tools.ledger.records(), priced=priced), folder.results, schema)
    with replacing(folder.failures) as file:
        write_jsonl(rows(tools.ledger.records("failed"), priced=priced), file)
    about = folder.read_provenance()
    content = {"v": 1, "run": about["run"], "simulated": tools.simulated}
    write_json(
        folder.aggregate,
        {**content, "progress": progress, "aggregate": aggregate, "journal": extents},
    )
    return {
        "folder": str(folder.path),
        "table": str(folder.results),
        "failures": str(folder.failures),
        "simulated": tools.simulated,
    }
