"""What all tests share: a fleet to call, and an environment without the developer's keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import settings

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec

settings.register_profile("fanfold", deadline=None)  # shared machines have slow moments
settings.load_profile("fanfold")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither trace nor pay, whatever the developer's environment says."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "LANGSMITH_API_KEY", "LANGCHAIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    for name in ("FANFOLD_END_TIME", "SLURM_JOB_END_TIME"):  # tests may run in a batch job
        monkeypatch.delenv(name, raising=False)


@pytest_asyncio.fixture
async def simulated() -> AsyncIterator[SimulatedFleet]:
    """A fast simulated fleet of four nodes in this process."""
    async with SimulatedFleet(SimulationSpec.fast(nodes=4)) as fleet:
        yield fleet
