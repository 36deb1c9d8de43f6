"""Parts that are too long for the model, on workers of this machine."""

from __future__ import annotations

import pytest

from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.integration.runs.test_samples_runs import BACKENDS
from fanfold.tests.integration.workers.long_parts import assert_same_pieces_on

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", BACKENDS)
async def test_the_same_as_in_this_process(lab_of: LabMaker, name: str) -> None:
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        await assert_same_pieces_on(lab, BACKENDS[name])
