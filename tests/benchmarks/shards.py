"""The cost of the coordinator of remote shards: its own CPU, and start and rate."""

from __future__ import annotations

import asyncio
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.configs.loader import load_config
from fanfold.graphs.run.open_run import write_results
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.session import RunOptions, execute_run

BACKENDS: dict[str, dict[str, Any]] = {
    "processes": {"kind": "local", "processes": 2},
    "sent home": {"kind": "local", "processes": 2, "shared_folder": False},
    "parsl": {"kind": "parsl", "workers": 2},
    "academy": {"kind": "academy", "workers": 2},
    "launched": {"kind": "launched", "workers": 2},
}


def measure(names: list[str], few: int = 1_000, many: int = 21_000, size: int = 256) -> None:
    """Print, per backend, start-up, rate, and the coordinator's CPU of each further item."""
    print(f"coordinator of shards of {size} items elsewhere, 2 workers, 256 streams")
    print("'results' is the part of the coordinator's CPU that writes the results' table")
    heads = ("first item s", "items/s", "µs/item", "results", "workers ms")
    print(f"{'backend':>10} {heads[0]:>13} " + " ".join(f"{head:>10}" for head in heads[1:]))
    for name in names or list(BACKENDS):
        asyncio.run(_measure(name, few, many, size))


async def _measure(name: str, few: int, many: int, size: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fanfold-bench-"))
    try:
        async with launch(SimulationSpec.fast(nodes=8, max_num_seqs=64)) as fleet:
            small = await _run(folder, name, few, size, fleet.urls)
            large = await _run(folder, name, many, size, fleet.urls)
    finally:
        shutil.rmtree(folder)
    own = 1e6 * (large[0] - small[0]) / (many - few)
    results = 1e6 * (large[4] - small[4]) / (many - few)
    theirs = 1e3 * (large[1] - small[1]) / (many - few)
    rate = (many - few) / max(large[2] - small[2], 1e-9)
    figures = f"{rate:>10,.0f} {own:>10.1f} {results:>10.1f} {theirs:>10.2f}"
    print(f"{name:>10} {large[3]:>13.1f} {figures}", flush=True)


async def _run(
    folder: Path, name: str, count: int, size: int, urls: tuple[str, ...]
) -> tuple[float, ...]:
    """Return CPU seconds here and in ended children, wall seconds, the first item's, results'."""
    items = folder / f"{count}.csv"
    items.write_text("id,text\n" + "".join(f"i{n},{'a text ' * 20}{n}\n" for n in range(count)))
    loaded = load_config(
        {
            "name": "bench",
            "input": {"path": str(items), "id": "id"},
            "task": {
                "prompt": "Judge: {text}",
                "schema": {"type": "object", "properties": {"score": {"type": "number"}}},
            },
            "endpoints": {"urls": list(urls)},
            "backend": BACKENDS[name],
            "shard": {"items": size},
            "reduce": [{"op": "top_k", "field": "score", "k": 20}, {"op": "count"}],
        }
    )
    run = await prepare_run(loaded, folder / f"run-{count}")
    first = asyncio.create_task(_first(run.folder.journal))
    own, theirs, began = (
        _cpu(resource.RUSAGE_SELF),
        _cpu(resource.RUSAGE_CHILDREN),
        time.monotonic(),
    )
    spent = list[float]()

    def timed(*arguments: Any) -> Any:
        before = time.thread_time()
        written = write_results(*arguments)
        spent.append(time.thread_time() - before)
        return written

    with patch("fanfold.graphs.context.write_results", timed):
        result = await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
    assert result.progress["done"] == count, result
    wall = time.monotonic() - began
    return (
        _cpu(resource.RUSAGE_SELF) - own,
        _cpu(resource.RUSAGE_CHILDREN) - theirs,
        wall,
        await first - began,
        sum(spent),
    )


async def _first(journal: Path) -> float:
    """Return when the first record was written, as seen ten times a second."""
    while not any(file.stat().st_size > 1_000 for file in journal.glob("*.jsonl")):  # noqa: ASYNC110 - workers set no events
        await asyncio.sleep(0.1)
    return time.monotonic()


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    import sys

    measure(sys.argv[1:])
