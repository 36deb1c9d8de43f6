"""Samples, images, and parts that are too long, over Academy's agents."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.integration.runs.conftest import Lab
from fanfold.tests.integration.runs.test_images_runs import COUNT
from fanfold.tests.integration.workers.long_parts import assert_same_pieces_on
from fanfold.tests.integration.workers.samples_images import assert_same_on

pytestmark = [
    pytest.mark.integration,
    # Academy's own habits
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "records in results"])
async def test_the_same_as_in_this_process(tmp_path: Path, shared: bool) -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=2, ttft_s=0.0, tpot_s=0.0)) as fleet:
        lab = Lab(tmp_path, fleet, COUNT)
        lab.config["limits"] = {"streams": 8}
        await assert_same_on(lab, {"kind": "academy", "workers": 2, "shared_folder": shared})


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "records in results"])
async def test_parts_that_are_too_long(tmp_path: Path, shared: bool) -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=2, ttft_s=0.0, tpot_s=0.0)) as fleet:
        lab = Lab(tmp_path, fleet, COUNT)
        await assert_same_pieces_on(lab, {"kind": "academy", "workers": 2, "shared_folder": shared})
