"""A pipeline whose stages and levels run on an endpoint of Globus Compute, as in this process."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from fanfold import RunContext, build_graph
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.tests.integration.runs.test_pipeline import SUMMARIZE, outputs, staged
from fanfold.tests.integration.workers.globus.endpoint import UserEndpoint
from fanfold.tests.integration.workers.globus.globus_run import LabOf, posted
from fanfold.tests.integration.workers.globus.service import GlobusService

pytestmark = pytest.mark.integration

LEVELS = 2


async def test_stages_and_levels_run_on_an_endpoint(
    service: GlobusService, endpoint: UserEndpoint, lab_over: LabOf
) -> None:
    async with lab_over(endpoint, ttft_s=0.02) as lab:
        backend = lab.config["backend"]
        staged(lab, limits={"streams": 8, "hedge": False}, shard={"items": 40})
        lab.config["stages"][2] |= {"reduce": SUMMARIZE | {"group_tokens": 400}}
        local = lab.config | {"backend": {"kind": "local"}}
        context = RunContext(config=local, out=str(lab.home / "local"))
        await build_graph(context).ainvoke({})
        asked = {k: v["asked"] for k, v in lab.fleet.stats(prompts=True)["prompts"].items()}
        lab.fleet.reset()
        before = len(service.submissions)

        lab.config["backend"] = backend
        await build_graph(RunContext(config=lab.config, out=str(lab.out))).ainvoke({})
        results = pq.read_table(lab.out / "stages/summary/results.parquet")
        assert results.num_rows == 2  # the summaries of two kinds
        assert outputs(lab.out) == outputs(lab.home / "local")
        again = {k: v["asked"] for k, v in lab.fleet.stats(prompts=True)["prompts"].items()}
        assert again == asked
        levels = sorted((lab.out / "stages/summary/levels").iterdir())
        assert len(levels) >= LEVELS
        shards = [RunFolder(lab.out / "stages" / name) for name in ("screen", "claims")]
        least = len(shards) + len(levels)
        assert posted(service, before)[endpoint.endpoint_id] >= least
