"""CPU of the levels of an operator, and of a map with equal prompts and answers."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import orjson
import yaml

from fanfold.backends.inputs.item_store import ItemStore
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.run_folder import RunFolder

from .end_to_end import Cost, run_command

_WORDS = "some text of a record "


def measure(count: int) -> None:
    """Print the CPU time of each call of ``summarize``, and of a map of the same questions.

    Args:
        count: Items that are summarized.
    """
    asyncio.run(_measure(count))


async def _measure(count: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fanfold-bench-"))
    try:
        async with launch(SimulationSpec.fast(nodes=8, max_num_seqs=64)) as fleet:
            await asyncio.to_thread(_compare, folder, count, fleet.urls)
    finally:
        shutil.rmtree(folder)


def _compare(folder: Path, count: int, urls: tuple[str, ...]) -> None:
    _write_pipeline(folder, count)
    staged, said = run_command(folder, "pipeline.yaml", "pipeline", urls)
    (stage,) = said["stages"]
    calls, levels = stage["requests"], len(stage["levels"])
    questions = _write_map(folder, levels)
    assert questions == calls, (questions, calls)
    mapped, _ = run_command(folder, "map.yaml", "map", urls)
    _write_pipeline(folder, 1)
    few, said = run_command(folder, "pipeline.yaml", "few", urls)
    (stage,) = said["stages"]
    _write_map(folder, levels, 1)
    one, _ = run_command(folder, "map.yaml", "one", urls)
    print(f"summarize of {count:,} items: {calls:,} calls in {levels} levels; 256 streams")
    level = _per_call(staged, few, calls)
    item = _per_call(mapped, one, calls)
    print(f"{'':>10} {'CPU s':>8} {'CPU ms/call':>12}")
    print(f"{'summarize':>10} {staged.cpu_s:>8.2f} {level:>12.3f}")
    print(f"{'map':>10} {mapped.cpu_s:>8.2f} {item:>12.3f}   ratio {level / item:.2f}")


def _per_call(many: Cost, few: Cost, calls: int) -> float:
    """Return the CPU time of a further call in milliseconds."""
    return 1000 * (many.cpu_s - few.cpu_s) / (calls - 1)


def _write_pipeline(folder: Path, count: int) -> None:
    with (folder / "items.csv").open("w") as file:
        file.write("id,text\n")
        file.writelines(f"i{n},{_WORDS * 9}{n}\n" for n in range(count))
    reduce = {"op": "summarize", "prompt": "Sum.", "text": "{text}", "group_tokens": 500}
    settings = {
        "name": "bench",
        "input": {"path": "items.csv", "id": "id"},
        "endpoints": {"urls": []},
        "model": {"max_tokens": 1000},
        "limits": {"streams": 256, "hedge": False},
        "stages": [{"name": "summary", "reduce": reduce}],
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings))


def _write_map(folder: Path, levels: int, most: int | None = None) -> int:
    """Write the questions of all levels as items of a map; return their number."""
    questions = list[dict[str, Any]]()
    for number in range(1, levels + 1):
        level = RunFolder(folder / f"pipeline/stages/summary/levels/{number}")
        with ItemStore(level.items) as store:
            questions += [item.row for item in store.read(0, len(store))]
        if number == 1:
            task = yaml.safe_load(level.settings.read_text())["task"]
    with (folder / "questions.jsonl").open("wb") as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in questions[:most])
    settings = {
        "name": "bench",
        "input": {"path": "questions.jsonl"},
        "task": {key: task[key] for key in ("system", "prompt", "schema")},
        "endpoints": {"urls": []},
        "model": {"max_tokens": 1000},
        "limits": {"streams": 256, "hedge": False},
    }
    (folder / "map.yaml").write_text(yaml.safe_dump(settings))
    return len(questions)
