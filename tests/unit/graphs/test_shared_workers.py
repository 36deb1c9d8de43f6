"""Which runs of a pipeline use the same backends and rate limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.configs.loader import load_config
from fanfold.graphs.remote.coordinator import SharedWorkers
from fanfold.graphs.remote.task_template import TaskTemplate
from fanfold.graphs.worker import work_shard
from fanfold.tests.unit.graphs.coordinator_lab import template

PROCESSES = {"kind": "local", "processes": 2}
SERVED = {"serve": "serve --port {port}"}


def run_of(folder: Path, model: str = "m", **changes: Any) -> TaskTemplate:
    loaded = load_config(
        {
            "task": {"prompt": "{x}"},
            "model": {"name": model},
            "endpoints": {"urls": ["http://127.0.0.1:9/v1"]},
            "backend": PROCESSES,
        }
        | changes
    )
    run = {"token": "t", "id": "r", "model": model}
    return template(folder, config=loaded.config, settings=loaded.plain, run=run)


async def test_runs_with_equal_backends_share_them(tmp_path: Path) -> None:
    shared = SharedWorkers(tmp_path)
    pool = await shared.get_pool(run_of(tmp_path), work_shard)
    other_task = run_of(tmp_path, "large", task={"prompt": "other {x}"})
    assert await shared.get_pool(other_task, work_shard) is pool
    more = run_of(tmp_path, backend=PROCESSES | {"processes": 3})
    others = await shared.get_pool(more, work_shard)
    assert others is not pool
    assert (pool.is_closed, others.is_closed) == (True, False)
    await shared.aclose()
    assert others.is_closed
    assert await shared.get_pool(more, work_shard) is not others


@pytest.mark.parametrize("changes", [{"model": "large"}, {"node": SERVED | {"instances": 2}}])
async def test_nodes_never_serve_two_models(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Workers that start the model servers of their nodes belong to runs with these servers."""
    node = {"kind": "launched", "command": "mpiexec -n {workers}", "node_endpoints": True}
    settings: dict[str, Any] = {
        "backend": node,
        "node": SERVED,
        "endpoints": {"hosts": str(tmp_path)},
    }
    shared = SharedWorkers(tmp_path)
    pool = await shared.get_pool(run_of(tmp_path, **settings), work_shard)
    assert await shared.get_pool(run_of(tmp_path, **settings), work_shard) is pool
    assert await shared.get_pool(run_of(tmp_path, **settings | changes), work_shard) is not pool
    assert pool.is_closed
    await shared.aclose()


def test_what_workers_have_used_of_a_rate_counts_for_the_next_run(tmp_path: Path) -> None:
    shared = SharedWorkers(tmp_path)
    limited = run_of(tmp_path, limits={"tokens_per_min": 1000})
    lender = shared.get_lender(limited)
    assert lender is not None
    assert shared.get_lender(run_of(tmp_path, "n", limits={"tokens_per_min": 1000})) is lender
    assert shared.get_lender(run_of(tmp_path, limits={"tokens_per_min": 10})) is not lender
    assert shared.get_lender(run_of(tmp_path)) is None
    ordered = {"tokens_per_min": 1000, "order": "input", "streams": 7}
    assert shared.get_lender(run_of(tmp_path, limits=ordered)) is lender  # a level of an operator
