"""A pipeline whose stages and levels run on Academy's agents, as in this process."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold import RunContext, build_graph
from fanfold.tests.integration.runs.test_pipeline import CLAIM, SCREEN, SUMMARIZE, outputs
from fanfold.tests.integration.workers.academy.academy_run import AcademyRun, alive

pytestmark = [
    pytest.mark.integration,
    pytest.mark.long,
    # Academy's own habits
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]

LEVELS = 2


async def test_stages_and_levels_run_on_agents(academy_run: AcademyRun) -> None:
    kept = {k: v for k, v in academy_run.settings.items() if k not in ("task", "reduce")}
    config: dict[str, Any] = kept | {
        "model": {"max_tokens": 1000},
        "stages": [
            {"name": "screen", "map": SCREEN, "reduce": [{"op": "count"}]},
            {"name": "claims", "where": "output.score > 0.2", "map": CLAIM},
            {"name": "summary", "reduce": SUMMARIZE | {"group_tokens": 400}},
        ],
    }
    items = academy_run.items[:40]
    local = academy_run.out.with_name("local")
    await build_graph(RunContext(config=config, out=str(local))).ainvoke({"items": items})
    asked = {k: v["asked"] for k, v in academy_run.fleet.stats(prompts=True)["prompts"].items()}
    academy_run.fleet.reset()

    config |= {"backend": {"kind": "academy", "workers": 2, "silence_s": 20.0}}
    graph = build_graph(RunContext(config=config, out=str(academy_run.out)))
    await graph.ainvoke({"items": items})
    results = pq.read_table(academy_run.out / "stages/summary/results.parquet")
    assert results.num_rows == 2  # the summaries of two kinds
    assert outputs(academy_run.out) == outputs(local)
    again = {k: v["asked"] for k, v in academy_run.fleet.stats(prompts=True)["prompts"].items()}
    assert again == asked
    runs = [academy_run.out / "stages" / name for name in ("screen", "claims")]
    levels = sorted((academy_run.out / "stages/summary/levels").iterdir())
    assert len(levels) >= LEVELS
    pids = set[int]()
    for run in (*runs, *levels):
        files = list((run / "journal").glob("*-*.jsonl"))
        assert files, f"no agent has worked on {run}"
        pids |= {int(file.stem.split("-")[-2]) for file in files}
    await academy_run.until(lambda: not any(map(alive, pids)))
