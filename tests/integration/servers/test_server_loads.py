"""Work of a node's servers, by their own counts, in the node's event log."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from fanfold.backends.servers.events import EventLog
from fanfold.backends.servers.lock import WatchdogClient
from fanfold.backends.servers.node_supervisor import LoadSampler
from fanfold.backends.servers.plan import node_files
from fanfold.backends.servers.server_process import fetch
from fanfold.backends.servers.server_supervisor import NodeState, ServerSupervisor

from .conftest import Node, until

pytestmark = pytest.mark.integration
TEXT = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m}}"}} {0}.0
vllm:num_requests_running{{engine="1",model_name="m"}} 1.0
vllm:num_requests_waiting{{engine="0"}} {1}.0
vllm:num_requests_waiting_by_reason{{reason="capacity"}} 7.0
"""


@dataclass
class Metrics:
    """A server that answers what it is told to."""

    answer: bytes = b""
    asked: list[bytes] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    def says(self, running: int, waiting: int) -> None:
        """Say numbers; another engine of the server runs one request besides."""
        body = TEXT.format(running - 1, waiting).encode()
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Metrics]:
        self.held.set()
        server = await asyncio.start_server(self._one, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    async def _one(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        await self.held.wait()
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@contextmanager
def watched(
    node: Node, *metrics: Metrics, **changes: Any
) -> Iterator[tuple[LoadSampler, list[ServerSupervisor]]]:
    """Servers that are ready, and what notes their load in the node's record."""
    node.ports = [one.port for one in metrics]
    plan = node.plan(**changes)
    node_files(plan).create_folders()
    record, nobody = EventLog(node.files.event_log, "n"), cast("WatchdogClient", None)
    desk = NodeState(plan, nobody, record, node.said.append, lambda: None, asyncio.Event())
    servers = [ServerSupervisor(one, desk) for one in plan.servers]
    for server in servers:
        server.ready, server.starts = True, 1
    with closing(record):
        yield LoadSampler(plan, servers, record), servers


def noted(node: Node) -> list[tuple[list[int | None], list[int | None]]]:
    return [(line["running"], line["waiting"]) for line in node.events("load")]


async def test_changes_are_noted_and_engines_added_up(node: Node) -> None:
    async with Metrics().up() as one, Metrics().up() as other:
        with watched(node, one, other, key="k") as (loads, _):
            one.says(1, 0)
            other.says(64, 0)
            await loads.sample()
            await loads.sample()
            other.says(65, 0)  # less than a part in 32 of the most
            await loads.sample()
            assert noted(node) == [([1, 64], [0, 0])]
            other.says(67, 0)
            await loads.sample()
            one.says(1, 3)  # something waits now
            await loads.sample()
    assert noted(node)[1:] == [([1, 67], [0, 0]), ([1, 67], [3, 0])]
    assert b"Authorization: Bearer k" in one.asked[0]
    assert one.asked[0].startswith(b"GET /metrics HTTP/1.1\r\n")


async def test_one_that_refuses_is_asked_once_and_one_without_counts_is_not_noted(
    node: Node,
) -> None:
    async with Metrics().up() as refuses, Metrics().up() as sglang:
        with watched(node, refuses, sglang) as (loads, servers):
            refuses.answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            sglang.answer = b'HTTP/1.1 200 OK\r\n\r\nsglang:num_running_reqs{model_name="m"} 3.0\n'
            for _ in range(3):
                await loads.sample()
            assert (len(refuses.asked), len(sglang.asked)) == (1, 3)
            assert not node.events("load")
            sglang.says(2, 0)
            servers[1].ready = False
            await loads.sample()
            assert not node.events("load")
            servers[1].ready = True
            await loads.sample()
    assert noted(node) == [([None, 2], [None, 0])]


async def test_the_same_load_after_a_restart_is_news(node: Node) -> None:
    async with Metrics().up() as one:
        with watched(node, one) as (loads, servers):
            one.says(4, 0)
            await loads.sample()
            servers[0].starts += 1
            await loads.sample()
    assert noted(node) == [([4], [0])] * 2


async def test_one_that_is_slow_is_left_out(node: Node) -> None:
    slow = Metrics()
    async with Metrics().up() as quick, slow.up():
        with watched(node, quick, slow) as (loads, servers):
            quick.says(1, 0)
            slow.says(9, 0)
            slow.held.clear()
            while not slow.asked:
                await loads.sample_last()  # gives up after a second
            assert not node.events("load")
            assert all(server.ready for server in servers)
            slow.held.set()
            await loads.sample()
    assert noted(node) == [([1, 9], [0, 0])]


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd", b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2;x=y\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            b"abc",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nab\r\nxyz", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", None),
        (b"", None),
    ],
)
async def test_answers_in_all_framings(raw: bytes, body: bytes | None) -> None:
    async with Metrics(raw).up() as one:
        found = await fetch("127.0.0.1", one.port, "/metrics", 60.0, None)
    assert found == (None if body is None else (200, body))


async def test_a_node_that_is_served_notes_its_load(node: Node) -> None:
    file = node.folder.parent / "load"
    file.write_text(TEXT.format(2, 0))
    node.modes = (f"load:{file}",)
    async with node.served() as orders:
        await until(lambda: noted(node) == [([3], [0])])
        file.write_text(TEXT.format(0, 5))
        await until(lambda: noted(node)[-1] == ([1], [5]))
        file.unlink()  # from now on it fails, and is not ill
        await until(lambda: b"500" in node.files.server_log(0).read_bytes())
        assert node.listed() == node.ports
        file.write_text(TEXT.format(8, 0))
        orders.stop.set()
    assert noted(node)[-1] in (([1], [5]), ([9], [0]))
    assert node.events()[-1]["event"] == "end"
