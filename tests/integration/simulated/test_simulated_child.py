"""The fleet as a child process: it starts, it serves, and it never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp
import orjson
import pytest

from fanfold.backends.core.errors import BackendError, ConfigurationError
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.process import launch as launch_module
from fanfold.backends.simulated.serve import main
from fanfold.backends.simulated.spec import SimulationSpec

pytestmark = pytest.mark.integration

FAST = SimulationSpec.fast(nodes=2)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def gone(pid: int) -> bool:
    async with asyncio.timeout(30):
        while alive(pid):  # noqa: ASYNC110 - another process's child tells nobody
            await asyncio.sleep(0.01)
    return True


async def test_a_launched_fleet_serves_and_ends() -> None:
    async with launch(FAST) as fleet, aiohttp.ClientSession() as http:
        assert len(fleet.urls) == 2
        async with http.get(f"{fleet.urls[1]}/models") as response:
            assert (await response.json())["data"][0]["id"] == fleet.model
        async with http.get(f"{fleet.control_url}/_sim/stats") as response:
            assert (await response.json())["totals"]["requests"] == 0
        assert alive(fleet.pid)
    assert not alive(fleet.pid)


PARENT = """
import asyncio
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.process import launch
async def main():
    async with launch(SimulationSpec.fast(nodes=1)) as fleet:
        print(fleet.pid, flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


async def test_the_child_dies_with_a_killed_parent() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    assert await gone(pid)


FORKING_PARENT = PARENT.replace(
    "print(fleet.pid, flush=True)",
    """
        helper = os.fork()
        if not helper:
            while True:
                signal.pause()
        print(fleet.pid, helper, flush=True)
""",
).replace("import asyncio", "import asyncio, os, signal", 1)


async def test_the_child_dies_even_if_a_fork_of_the_parent_holds_the_pipe() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FORKING_PARENT), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout
    pid, helper = map(int, (await parent.stdout.readline()).split())
    parent.send_signal(signal.SIGKILL)
    try:
        assert await gone(pid)
        assert alive(helper)
    finally:
        os.kill(helper, signal.SIGKILL)
        assert await parent.stdout.read() == b""
        await parent.wait()


async def test_a_child_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[launch_module.__module__]
    monkeypatch.setattr(module, "_STOP_S", 0.0)
    async with launch(FAST) as fleet:
        os.kill(fleet.pid, signal.SIGSTOP)
    assert not alive(fleet.pid)


async def test_sigint_does_not_reach_the_child_and_sigterm_ends_it() -> None:
    async with launch(FAST) as fleet:
        assert os.getpgid(fleet.pid) != os.getpgid(0)
        os.kill(fleet.pid, signal.SIGTERM)
        assert await gone(fleet.pid)


async def test_options_instead_of_standard_input() -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fanfold.backends.simulated"),
        *("--spec", FAST.to_json(), "--nodes", "3", "--model", "other"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout
    line = orjson.loads(await child.stdout.readline())
    assert (line["v"], len(line["urls"]), line["model"]) == (1, 3, "other")
    child.send_signal(signal.SIGINT)
    assert await child.wait() == 0


async def test_a_refused_specification_speaks_for_itself() -> None:
    with pytest.raises(ConfigurationError, match="responder 'oracle' is unknown"):
        async with launch(SimulationSpec(responder="oracle")):
            pass


async def test_a_child_that_dies_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[launch_module.__module__], "MODULE", "no.such.module")
    with pytest.raises(BackendError, match=r"exit code 1.*no\.such|No module named 'no'"):
        async with launch(FAST):
            pass


async def test_a_child_that_is_not_ready_in_time() -> None:
    with pytest.raises(BackendError, match="not ready after 0"):
        async with launch(FAST, start_timeout_s=0.0):
            pass


async def test_an_interpreter_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BackendError, match="cannot be started"):
        async with launch(FAST):
            pass


async def test_standard_input_that_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "spec").write_text(FAST.to_json())
    with (tmp_path / "spec").open() as file:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fanfold.backends.simulated"),
            stdin=file,
            stderr=asyncio.subprocess.PIPE,
        )
    _, said = await child.communicate()
    assert child.returncode == 2
    assert said.decode().startswith("standard input must be a pipe")
    assert len(said.splitlines()) == 1


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", "{"]) == 2
    assert main(["--nodes", "0"]) == 2
    assert "nodes must be at least 1" in capsys.readouterr().err
