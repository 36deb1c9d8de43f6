"""A forked command is a process as ``python -m fanfold`` starts it."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, STDOUT
from pathlib import Path

import pytest

from fanfold.tests.support.command_server import Command, get_command_server

pytestmark = pytest.mark.integration

TELL = """
import json, os, sys
print(json.dumps([os.getpid(), os.getcwd(), os.environ["TOKEN"], sys.argv[1:], os.getpgid(0)]))
print("aside", file=sys.stderr)
sys.exit(7)
"""
WAIT = "import os, time; os.write(1, b'ready'); time.sleep(1000)"


async def test_a_command_and_its_exit_codes() -> None:
    server = get_command_server()
    done = await server.run(Command(("--version",)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fanfold ")
    wrong = await server.run(Command(("run", "no-such-file.yaml")))
    assert wrong.returncode == 2
    assert "no-such-file.yaml" in wrong.stderr


async def test_it_has_its_own_folder_environment_streams_and_group(tmp_path: Path) -> None:
    environment = os.environ | {"TOKEN": "t"}
    command = Command(("a", "b c"), TELL, str(tmp_path), environment, new_session=True)
    process = await get_command_server().start(command)
    out, err = await process.communicate()
    assert process.returncode == 7
    assert process.cpu_s > 0.0
    told = f'[{process.pid}, "{tmp_path}", "t", ["a", "b c"], {process.pid}]\n'
    assert (out.decode(), err) == (told, b"aside\n")
    joined = await get_command_server().start(command, stderr=STDOUT)
    assert sorted((await joined.communicate())[0].splitlines())[1] == b"aside"
    with (tmp_path / "out").open("wb") as file:
        silent = await get_command_server().start(command, stdout=file.fileno(), stderr=DEVNULL)
        assert await silent.communicate() == (b"", b"")
    assert f"[{silent.pid}," in (tmp_path / "out").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_signals_end_it(number: signal.Signals) -> None:
    process = await get_command_server().start(Command((), WAIT))
    assert process.stdout is not None
    assert await process.stdout.readexactly(5) == b"ready"
    process.send_signal(number)
    assert await process.wait() == -number
    assert not Path(f"/proc/{process.pid}").exists()
    await process.communicate()


async def test_one_outlives_another() -> None:
    server = get_command_server()
    first = await server.start(Command((), WAIT))
    second = await server.start(Command((), "raise SystemExit(3)"))
    assert await asyncio.wait_for(second.wait(), 60) == 3
    assert first.returncode is None
    first.kill()
    assert await first.wait() == -signal.SIGKILL
    for process in (first, second):
        await process.communicate()
