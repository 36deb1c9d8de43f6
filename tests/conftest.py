"""What all tests share: a fleet to call, and an environment without the developer's keys."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import settings

from fanfold.backends.core.protocols import CURRENT_CALLS
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.support.command_server import command_server_available

settings.register_profile("fanfold", deadline=None)  # shared machines have slow moments
settings.load_profile("fanfold")


@pytest.fixture(autouse=True, scope="session")
def _no_leftovers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove the temporary folders and end the processes that killed parents left behind."""
    tmp_path_factory.getbasetemp()  # pytest's own folders stay where they are
    folder, before = Path(tempfile.mkdtemp(prefix="ff-")), os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    with command_server_available():
        yield
    mark = f"TMPDIR={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    tempfile.tempdir = before
    os.environ.pop("TMPDIR")
    if before is not None:
        os.environ["TMPDIR"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_item() -> Iterator[None]:
    """A test that sets the item of its calls does not set it for those that follow."""
    yield
    CURRENT_CALLS.set(None)


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
