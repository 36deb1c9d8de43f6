"""The sockets of a fleet: one for all nodes, one port each, or one loopback address each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from ..core.errors import ConfigurationError
from .server import Connection, Exchange, Handler
from .spec import SimulationSpec

_BACKLOG: Final = 4096
_PER_BYTE: Final = 250  # addresses used of each 127.0.b.0/24
_HIGHEST_PORT: Final = 65_535


class Listener:
    """One listening socket and the connections that it accepted.

    Args:
        host: Address.
        port: Port, or 0 for a free one; afterwards the port in use.
        handler: Gets the requests.
    """

    def __init__(self, host: str, port: int, handler: Handler) -> None:
        self.host = host
        self.port = port
        self._handler = handler
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """``http://host:port``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def open(self) -> None:
        """Start to listen.

        Raises:
            ConfigurationError: The address or the port cannot be had.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._handler, self._connections),
                self.host,
                self.port,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise ConfigurationError(
                f"the simulated fleet cannot listen on {self.host}:{self.port}: "
                f"{error.strerror or error}; choose another port, or 0 for a free one"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self, abruptly: bool) -> None:
        """Stop to listen and end all connections.

        Args:
            abruptly: Whether the clients see a reset, not an orderly end.
        """
        if self._server is None:
            return
        self._server.close()
        for connection in tuple(self._connections):
            if abruptly:
                connection.reset()
            else:
                connection.close()
        await self._server.wait_closed()
        self._server = None


class Listeners:
    """All sockets of a fleet.

    Args:
        spec: The fleet's specification.
        on_root: Gets requests to the shared socket.
        on_node: Gets a node's number and a request to its own socket.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        on_root: Handler,
        on_node: Callable[[int, Exchange], None],
    ) -> None:
        self._spec = spec
        self._on_node = on_node
        own = spec.addressing != "path"
        self._root = Listener(spec.host, 0 if own else spec.port, on_root)
        self._nodes: list[Listener] = []

    @property
    def control(self) -> str:
        """URL of the control plane, without a path."""
        return self._root.url

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URL of each node, ending in ``/v1``."""
        if self._spec.addressing == "path":
            return tuple(f"{self._root.url}/node-{k}/v1" for k in range(self._spec.nodes))
        return tuple(f"{listener.url}/v1" for listener in self._nodes)

    async def open(self) -> None:
        """Open every socket.

        Raises:
            ConfigurationError: One cannot be had; those opened before are closed again.
        """
        try:
            await self._root.open()
            if self._spec.addressing != "path":
                for node in range(self._spec.nodes):
                    listener = Listener(*self._place(node), partial(self._on_node, node))
                    await listener.open()
                    self._nodes.append(listener)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close every socket and connection."""
        for listener in (*self._nodes, self._root):
            await listener.close(abruptly=True)

    async def close_node(self, node: int, abruptly: bool) -> None:
        """Close a node's own socket; none where nodes share one.

        Args:
            node: The node's number.
            abruptly: As for `Listener.close`.
        """
        if self._nodes:
            await self._nodes[node].close(abruptly)

    async def open_node(self, node: int) -> None:
        """Open a node's own socket again, at the same place.

        Args:
            node: The node's number.

        Raises:
            ConfigurationError: The port is taken by now.
        """
        if self._nodes:
            await self._nodes[node].open()

    def _place(self, node: int) -> tuple[str, int]:
        port = self._spec.port
        if self._spec.addressing == "port":
            if port and port + node > _HIGHEST_PORT:
                raise ConfigurationError(f"simulated fleet: port {port + node} does not exist")
            return self._spec.host, port + node if port else 0
        shared = self._nodes[0].port if self._nodes else port
        return f"127.0.{1 + node // _PER_BYTE}.{1 + node % _PER_BYTE}", shared
