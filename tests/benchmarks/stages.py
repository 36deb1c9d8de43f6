"""CPU of each call of an operator, and of a map of the same questions."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import resource
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import orjson

from fanfold.backends.core.types import Row
from fanfold.backends.inputs.item_store import ItemStore, NamedRows
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.graphs.cli.app import YOUNG_OBJECTS
from fanfold.graphs.pipeline import execute_pipeline
from fanfold.graphs.run.pipeline import list_stages, prepare_pipeline
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.run.rich_console import Terminal
from fanfold.graphs.session import RunOptions, execute_run

_WORDS: Final = "some text of a record "
_TEXT: Final = "{text}"
_LABEL: Final = {
    "prompt": "Which kind is {text}?",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "enum": ["a", "b", "c"]}},
    },
}
_STAGES: Final[Mapping[str, tuple[int, Mapping[str, Any]]]] = {
    "summarize": (
        30_000,
        {"reduce": {"op": "summarize", "prompt": "Sum.", "text": _TEXT, "group_tokens": 500}},
    ),
    "rank": (30_000, {"reduce": {"op": "rank", "prompt": "The best.", "text": _TEXT, "k": 20}}),
    "cascade": (4_000, {"map": _LABEL, "cascade": {"field": "kind", "target": 0.9}}),
    "dedup": (4_000, {"reduce": {"op": "dedup", "by": "embeddings", "text": _TEXT}}),
}
"""Items and settings of the stage of each operator that asks a model."""
OPERATORS: Final = tuple(_STAGES)
_OPTIONS: Final = RunOptions(quiet=True)


def measure(names: Sequence[str], repeats: int) -> None:
    """Print the CPU time of each call of operators, and of a map of the same questions.

    All runs are made in this process, one after the other, and the fleet is in another one; before
    they are measured, a small run of each kind has imported and started what all of them need.
    Measured is the CPU time of a whole session in an existing run folder, from its opening to its
    results on disk. So neither figure has the start of a process or the reading of the operator's
    30,000 rows. Both have the storing of the questions, as the items of the levels or of the map.
    All other work of the operator counts: to read, measure and group the items, to read the answers
    of its levels, its own algorithm, and its results, which are further records.

    The map asks exactly the questions that the levels of the operator have asked, with their
    prompts, schemas and limits; so it has as many calls, records of calls, and prompt and answer
    tokens. It is one run, or one for each task if the levels differ in it; of those, only the first
    counts its fixed costs, which a map of one question shows.

    Args:
        names: The operators.
        repeats: How often each is measured, one after the other; printed are the least CPU times,
            and the median and the range of the ratios.
    """
    logging.disable(logging.WARNING)
    gc.set_threshold(YOUNG_OBJECTS)  # as the command line does
    asyncio.run(_measure(names, repeats))


async def _measure(names: Sequence[str], repeats: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fanfold-bench-"))
    spec = SimulationSpec.fast(nodes=8, max_num_seqs=64, responder="labels")
    small = SimulationSpec.fast(
        nodes=8, max_num_seqs=64, responder="labels", model="small", accuracy=0.75
    )
    print("CPU ms of a call, in a session of an operator and in a map of its questions")
    print(
        f"{'':>10} {'items':>7} {'levels':>7} {'calls':>7} {'operator':>9} {'map':>7} {'ratio':>6}"
    )
    try:
        async with launch(spec) as fleet, launch(small) as other:
            for name in names:
                bench = _Bench(folder / name, name, fleet.urls, other.urls)
                await bench.run(10, 1)
                (await bench.run(_STAGES[name][0], repeats)).print()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    items: int
    levels: int
    calls: int
    operator_s: Sequence[float]
    map_s: Sequence[float]

    def print(self) -> None:
        operator, other = (1000 * min(s) / self.calls for s in (self.operator_s, self.map_s))
        ratios = [one / other for one, other in zip(self.operator_s, self.map_s, strict=True)]
        print(
            f"{self.name:>10} {self.items:>7,} {self.levels:>7,} {self.calls:>7,} "
            f"{operator:>9.3f} {other:>7.3f} {median(ratios):>6.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


class _Bench:
    """Runs a stage and maps of its questions.

    Args:
        folder: A folder for their runs.
        name: The operator.
        urls: The endpoints.
        small: The endpoints of the small model.
    """

    def __init__(self, folder: Path, name: str, urls: Sequence[str], small: Sequence[str]) -> None:
        self._folder, self._name = folder, name
        self._urls, self._small = list(urls), list(small)

    async def run(self, count: int, repeats: int) -> _Found:
        """Return the CPU times of a stage of so many items and of its map."""
        loaded = self._load_stage()
        rows = [{"id": f"i{n}", "text": f"{_WORDS * 9}{n}"} for n in range(count)]
        staged, mapped = list[float](), list[float]()
        for _ in range(repeats):
            root = self._folder / "pipeline"
            staged.append(await self._run_stage(loaded, root, rows))
            (stage,) = list_stages(loaded, root)
            levels = stage.list_levels()
            mapped.append(await self._run_maps(levels))
            calls = sum(len(_read_rows(level)) for level in levels)
            shutil.rmtree(self._folder)
        return _Found(self._name, count, len(levels), calls, staged, mapped)

    def _load_stage(self) -> LoadedConfig:
        stage = {"name": self._name, **_STAGES[self._name][1]}
        if "cascade" in stage:
            model = {"model": {"name": "small"}, "endpoints": {"urls": self._small}}
            stage["cascade"] = {**stage["cascade"], "small": model}
        return load_config(
            {
                "name": "bench",
                "input": {"id": "id"},
                "endpoints": {"urls": self._urls},
                "model": {"max_tokens": 1000},
                "limits": {"streams": 256, "hedge": False},
                "stages": [stage],
            }
        )

    @staticmethod
    async def _run_stage(loaded: LoadedConfig, root: Path, rows: Sequence[Row]) -> float:
        folder = await prepare_pipeline(loaded, root, rows)
        began = _cpu_s()
        result = await execute_pipeline(folder, loaded, _OPTIONS, Terminal(file=io.StringIO()))
        spent = _cpu_s() - began
        assert result.exit_code == 0, result
        return spent

    async def _run_maps(self, levels: Sequence[RunFolder]) -> float:
        """Return the CPU time of maps of all questions: one for each task."""
        tasks = dict[bytes, list[RunFolder]]()
        for level in levels:
            plain = load_config(level.settings).plain
            key = orjson.dumps([plain[one] for one in ("task", "model", "endpoints")])
            tasks.setdefault(key, []).append(level)
        total = 0.0
        for number, some in enumerate(tasks.values()):
            rows = [
                (f"{level.path.name}/{name}", row)
                for level in some
                for name, row in _read_rows(level)
            ]
            total += await self._run_map(some[0], rows)
            if number:
                total -= await self._run_map(some[0], rows[:1])
        return total

    async def _run_map(self, level: RunFolder, rows: Sequence[tuple[str, Row]]) -> float:
        path, loaded = self._folder / "map", load_config(level.settings)
        began = _cpu_s()
        run = await prepare_run(loaded, path, source=NamedRows("questions", rows))
        result = await execute_run(run, _OPTIONS, Terminal(file=io.StringIO()))
        spent = _cpu_s() - began
        assert result.progress["done"] == len(rows), result
        shutil.rmtree(path)
        return spent


def _read_rows(level: RunFolder) -> list[tuple[str, Row]]:
    with ItemStore(level.items) as store:
        return [(item.id, item.row) for item in store.read(0, len(store))]


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
