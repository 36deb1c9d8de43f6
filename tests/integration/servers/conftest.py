"""A node to serve: plans of small servers, and a check of their ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.servers.events import read_events
from fanfold.backends.servers.node_supervisor import SupervisorControl, serve_or_standby
from fanfold.backends.servers.plan import NodeFiles, NodePlan, ServerPlan, WatchSettings, node_files
from fanfold.backends.servers.watchdog import is_alive

PLAIN = str(Path(__file__).with_name("plain.py"))
QUICK = WatchSettings(every_s=0.05, answer_s=5.0, out_s=0.1, dead_s=0.4, stop_s=5.0, pause_s=0.01)
LONG_S = 60.0


PORTS: Iterator[int] = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """Return a port that no other test gets; it lies below those of clients' connections."""
    for number in PORTS:
        port = 20_000 + number % 12_000
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


@dataclass
class Node:
    """One host's servers in a scratch folder."""

    folder: Path
    host: str = "node7"
    ports: list[int] = field(default_factory=lambda: [free_port()])
    modes: tuple[str, ...] = ()
    restarts: int = 3
    linger_s: float = 60.0
    said: list[str] = field(default_factory=list)

    def plan(self, **changes: Any) -> NodePlan:
        servers = tuple(
            ServerPlan(n, port, (sys.executable, "-I", "-S", PLAIN, str(port), *self.modes), {})
            for n, port in enumerate(self.ports)
        )
        settings: dict[str, Any] = {
            "host": self.host,
            "address": "127.0.0.1",
            "folder": str(self.folder),
            "servers": servers,
            "ready": "/health",
            "timeout_s": LONG_S,
            "restarts": self.restarts,
            "linger_s": self.linger_s,
            "watching": QUICK,
        }
        return NodePlan(**settings | changes)

    @property
    def files(self) -> NodeFiles:
        return node_files(self.plan())

    def listed(self) -> list[int]:
        """Return the ports in the endpoints file."""
        with suppress(FileNotFoundError):
            lines = self.files.endpoints.read_text().splitlines()
            return sorted(int(line.rpartition(":")[2]) for line in lines if line[0] != "#")
        return []

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            lines = read_events(self.files.event_log)
            return [line for line in lines if name is None or line["event"] == name]
        return []

    def pids(self) -> list[int]:
        """Return the servers that were ever started, by their process groups."""
        return [line["pid"] for line in self.events("start")]

    def alive(self) -> list[int]:
        """Return the process groups of which somebody is left."""
        return [pid for pid in self.pids() if is_alive(pid)]

    @asynccontextmanager
    async def served(self, **changes: Any) -> AsyncIterator[SupervisorControl]:
        """Serve the node in this process while the block runs."""
        orders = SupervisorControl(self.said.append)
        task = asyncio.create_task(serve_or_standby(self.plan(**changes), orders))
        try:
            yield orders
        finally:
            orders.stop.set()
            async with asyncio.timeout(LONG_S):
                await task


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.01)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "servers")
    yield made
    for group in made.alive():  # a test that failed
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
