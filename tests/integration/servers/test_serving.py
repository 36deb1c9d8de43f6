"""A node's servers: started once, watched, restarted, listed, ended completely."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fanfold.backends.cluster.utilization import read_job_servers
from fanfold.backends.core.errors import BackendError
from fanfold.backends.servers.lock import is_served
from fanfold.backends.servers.node_supervisor import SupervisorControl, serve_or_standby
from fanfold.backends.servers.plan import ServerFailure

from .conftest import Node, free_port, until

pytestmark = pytest.mark.integration


async def test_all_are_listed_when_ready_and_gone_at_the_end(node: Node) -> None:
    node.ports = [free_port(), free_port()]
    async with node.served():
        await until(lambda: node.listed() == sorted(node.ports))
        assert is_served(node.files)
        text = node.files.endpoints.read_text()
        assert f"127.0.0.1:{node.ports[0]}\n" in text
        assert {p.name for p in node.folder.iterdir()} == {"node7", "locks", "logs"}
    assert not node.files.endpoints.exists()
    assert not node.alive()
    assert not is_served(node.files)
    names = [line["event"] for line in node.events() if line["event"] != "alive"]
    assert (names[0], names[-1]) == ("begin", "end")
    assert sorted(names[1:-1]) == ["ready", "ready", "start", "start"]
    (found,) = read_job_servers(node.folder, [(0.0, time.time())])
    states = [[interval.state for interval in own][:2] for own in found.intervals.values()]
    assert states == [["starting", "up"]] * 2
    assert any("is ready after" in line for line in node.said)


async def test_a_killed_server_is_taken_out_and_restarted(node: Node) -> None:
    node.ports = [free_port(), free_port()]
    seen = list[list[int]]()

    def changed(ports: list[int]) -> bool:
        seen.append(node.listed())
        return seen[-1] == ports

    async with node.served():
        await until(lambda: changed(sorted(node.ports)))
        first = node.events("start")[0]
        os.kill(first["pid"], signal.SIGKILL)
        await until(lambda: len(node.events("start")) == 3)
        await until(lambda: changed(sorted(node.ports)))
        (down,) = node.events("down")
        assert (down["instance"], down["why"]) == (first["instance"], "was ended by SIGKILL")
        assert [one for one in node.ports if one != first["port"]] in seen
        assert node.events("start")[-1]["restart"] == 1
    assert any("SIGKILL; restart 1 of 3" in line for line in node.said)
    assert not node.alive()


async def test_restarts_are_bounded(node: Node) -> None:
    node.restarts = 1
    orders = SupervisorControl(node.said.append)
    task = asyncio.create_task(serve_or_standby(node.plan(), orders))
    for times in (1, 2):
        await until(partial(_was_ready, node, times))
        os.kill(node.pids()[-1], signal.SIGKILL)
    with pytest.raises(BackendError, match="given up after 1 restarts"):
        await asyncio.wait_for(task, 60)
    assert "no server is left" in ServerFailure.read(node.files.failure).text
    assert node.events("end")[-1]["why"] == "given up"
    assert not is_served(node.files)


async def test_a_server_that_hangs_is_restarted(node: Node) -> None:
    async with node.served(watching=replace(node.plan().watching, answer_s=0.1, stop_s=0.1)):
        await until(node.listed)
        os.kill(node.pids()[0], signal.SIGSTOP)
        await until(lambda: not node.listed())
        await until(lambda: len(node.events("ready")) == 2)
        await until(node.listed)
    assert [line["event"] for line in node.events() if line["event"] in ("out", "down")] == [
        "out",
        "down",
    ]
    assert not node.alive()


async def test_a_server_that_is_sick_for_a_while_comes_back(node: Node) -> None:
    sick = node.folder.parent / "sick"
    node.modes = (f"sick:{sick}",)
    async with node.served(watching=replace(node.plan().watching, dead_s=600.0)):
        await until(node.listed)
        sick.touch()
        await until(lambda: not node.listed())
        sick.unlink()
        await until(node.listed)
    assert [line["why"] for line in node.events("out")] == ["HTTP 503"]
    assert len(node.events("back")) == len(node.pids()) == 1


async def test_a_start_that_fails_shows_the_last_lines(node: Node) -> None:
    node.modes = ("fail",)
    with pytest.raises(BackendError) as error:
        await serve_or_standby(node.plan(), SupervisorControl(node.said.append))
    assert "ended with exit code 3 before it was ready; it is given up" in error.value.message
    assert "| loading weights" in error.value.message
    assert "torch.OutOfMemoryError: no memory left" in error.value.message
    assert "\x1b" not in error.value.message
    assert len(node.pids()) == 1


async def test_not_ready_in_time(node: Node) -> None:
    with pytest.raises(
        BackendError, match=r"not ready after 0\.5 s: /nowhere: (HTTP 404|no answer)"
    ):
        await serve_or_standby(
            node.plan(timeout_s=0.5, ready="/nowhere"), SupervisorControl(node.said.append)
        )
    assert not node.alive()


async def test_a_port_that_is_taken(node: Node) -> None:
    words = f"another process listens on port {node.ports[0]}"
    with (
        socket.create_server(("127.0.0.1", node.ports[0])),
        pytest.raises(BackendError, match=words),
    ):
        await serve_or_standby(node.plan(), SupervisorControl(node.said.append))
    assert not node.pids()


async def test_a_program_that_is_not_there(node: Node) -> None:
    plan = node.plan()
    (server,) = plan.servers
    with pytest.raises(BackendError, match="no program 'vlm' on this node's PATH"):
        await serve_or_standby(
            replace(plan, servers=(replace(server, command=("vlm", "serve")),)),
            SupervisorControl(node.said.append),
        )


async def test_who_does_not_heed_sigterm_is_killed_with_its_children(node: Node) -> None:
    node.modes = ("stubborn",)
    async with node.served(watching=replace(node.plan().watching, stop_s=0.1)):
        await until(node.listed)
    assert not node.alive()


async def test_a_second_wish_waits_for_nothing(node: Node) -> None:
    node.modes = ("stubborn",)
    async with node.served(watching=replace(node.plan().watching, stop_s=600.0)) as orders:
        await until(node.listed)
        orders.stop.set()
        orders.stop_waiting.set()
    assert not node.alive()


async def test_two_starters_one_set_of_servers(node: Node) -> None:
    """The second stands by, and takes over."""
    async with node.served() as first:
        await until(node.listed)
        async with node.served():
            await until(lambda: any("is served already" in line for line in node.said))
            assert len(node.pids()) == 1
            first.stop.set()
            await until(lambda: len(node.events("ready")) == 2)
    assert len(node.pids()) == 2
    assert not node.alive()


COMMAND = [sys.executable, "-P", "-m", "fanfold.backends.servers"]


async def test_servers_do_not_outlive_a_killed_owner(node: Node) -> None:
    """The watcher ends them, removes the endpoints file, and only then is the node free."""
    node.modes = ("stubborn",)
    plan = node.plan(watching=replace(node.plan().watching, stop_s=0.2))
    async with asyncio.timeout(60):
        await asyncio.to_thread(
            subprocess.run, COMMAND, input=plan.to_json(), check=True, timeout=60
        )
        await until(node.listed)
        (begun,) = node.events("begin")
        os.kill(begun["pid"], signal.SIGKILL)
        await until(lambda: not is_served(node.files))
        await until(lambda: not node.alive())
    assert not node.files.endpoints.exists()
    assert node.events("end")[-1]["why"] == "supervisor lost"


async def test_a_watcher_that_is_killed_is_replaced(node: Node) -> None:
    async with node.served():
        await until(node.listed)
        for _ in range(2):
            (watcher,) = await asyncio.to_thread(_watchers, node)
            os.kill(watcher, signal.SIGKILL)
            await until(partial(_is_replaced, node, watcher))
    assert not _watchers(node)


def _was_ready(node: Node, times: int) -> bool:
    return len(node.events("ready")) == times


def _is_replaced(node: Node, watcher: int) -> bool:
    return _watchers(node) not in ([], [watcher])


def _watchers(node: Node) -> list[int]:
    found, wanted = list[int](), os.fsencode(node.files.endpoints)
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            arguments = line.read_bytes().split(b"\0")
            if wanted in arguments and any(a.endswith(b"watchdog.py") for a in arguments):
                found.append(int(line.parent.name))
    return found


async def test_one_of_two_is_given_up_and_the_other_serves_on(node: Node) -> None:
    node.ports = [free_port(), free_port()]
    plan = node.plan()
    good, bad = plan.servers
    bad = replace(bad, command=(*bad.command, "fail"))
    async with node.served(servers=(good, bad)):
        await until(lambda: any("it is given up" in line for line in node.said))
        await until(lambda: node.listed() == [good.port])
    assert any("| torch.OutOfMemoryError" in line for line in node.said)
    assert node.events("end")[-1]["why"] == "stopped"
