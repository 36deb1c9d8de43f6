"""Parts that are too long for the model, on workers of this machine."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.integration.workers.long_parts import assert_same_pieces_on

pytestmark = pytest.mark.integration

BACKENDS: dict[str, dict[str, Any]] = {
    "processes": {"kind": "local", "processes": 2},
    "records in results": {"kind": "local", "processes": 2, "shared_folder": False},
    "parsl": {"kind": "parsl", "workers": 2},
    "launched": {"kind": "launched", "workers": 2},
}


@pytest.mark.parametrize("name", BACKENDS)
async def test_the_same_as_in_this_process(lab_of: LabMaker, name: str) -> None:
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        await assert_same_pieces_on(lab, BACKENDS[name])
