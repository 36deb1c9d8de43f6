"""What a node answers besides completions, and the fleet's control plane."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import orjson

from ..core.errors import ConfigurationError
from ..core.types import SIMULATED_FINGERPRINT
from .completions import CompletionService
from .errors import ApiError, error_body
from .faults import FaultBook
from .metrics import metrics_text
from .node import Node
from .refusals import unauthorized
from .requests import load_object
from .rules import FaultRule
from .server import Exchange
from .spec import SimulationSpec
from .tokens import conversation_tokens, text_tokens

_NODE: Final = re.compile(r"/node-(\d+)(/.*)?")
_PLAIN: Final = b"text/plain; version=0.0.4; charset=utf-8"
VERSION: Final = "0.32.0+fanfold.simulated"

_Route: TypeAlias = Callable[[Node, Exchange], None]


class Control(Protocol):
    """What the control plane may do to the fleet."""

    def stats(self, prompts: bool = False) -> dict[str, Any]:
        """Return what happened so far."""
        ...

    def fault(self, rule: FaultRule) -> None:
        """Add a fault."""
        ...

    async def kill(self, node: int, graceful: bool = False) -> None:
        """Stop a node."""
        ...

    async def revive(self, node: int) -> None:
        """Start a stopped node."""
        ...

    def reset(self) -> None:
        """Forget faults and counters."""
        ...


class NodeRoutes:
    """The routes of one node.

    Args:
        spec: The fleet's specification.
        service: Answers completions.
        faults: Knows cold nodes.
        now: Gives simulated seconds since the start.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        service: CompletionService,
        faults: FaultBook,
        now: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._service = service
        self._faults = faults
        self._now = now
        self._created = int(time.time())
        self._routes: dict[str, tuple[str, _Route]] = {
            "/v1/chat/completions": ("POST", lambda node, x: service.serve(node, x, chat=True)),
            "/v1/completions": ("POST", lambda node, x: service.serve(node, x, chat=False)),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ping": ("GET", self._health),
            "/load": ("GET", _load),
            "/version": ("GET", _version),
            "/metrics": ("GET", self._metrics),
            "/tokenize": ("POST", self._tokenize),
        }

    def handle(self, node: Node, path: str, exchange: Exchange) -> None:
        """Answer a request to a node.

        Args:
            node: The node.
            path: The path on it.
            exchange: The request.
        """
        if not node.alive:
            exchange.reset()
            return
        exchange.set_idle(self._faults.idle_s(node.index, self._now()))
        method, route = self._routes.get(path, ("", None))
        if route is None:
            exchange.reply(error_body("Not Found", "Not Found", 404), 404)
        elif method != exchange.head.method:
            exchange.reply(error_body("Method Not Allowed", "Method Not Allowed", 405), 405)
        elif path.startswith("/v1/") and not self._allowed(exchange):
            unauthorized(exchange)
        else:
            route(node, exchange)

    def _allowed(self, exchange: Exchange) -> bool:
        key = self._spec.api_key
        return key is None or exchange.head.header(b"authorization") == f"Bearer {key}"

    def _models(self, node: Node, exchange: Exchange) -> None:
        model = {
            "id": self._spec.model,
            "object": "model",
            "created": self._created,
            "owned_by": SIMULATED_FINGERPRINT,
            "root": self._spec.model,
            "parent": None,
            "max_model_len": self._service.max_model_len(node),
            "permission": [],
        }
        exchange.reply(orjson.dumps({"object": "list", "data": [model]}))

    def _health(self, node: Node, exchange: Exchange) -> None:
        cold = self._faults.is_cold(node.index, self._now())
        exchange.reply(b"", 503 if cold else 200)

    def _metrics(self, node: Node, exchange: Exchange) -> None:
        exchange.reply(metrics_text(node, self._spec.model), content_type=_PLAIN)

    def _tokenize(self, node: Node, exchange: Exchange) -> None:
        try:
            data = load_object(exchange.body)
            self._service.reader.check_model(data)
            if isinstance(data.get("messages"), list):
                count = conversation_tokens(data["messages"])
            else:
                count = text_tokens(str(data.get("prompt", "")))
        except ApiError as error:
            exchange.reply(error.body, error.status)
            return
        length = self._service.max_model_len(node)
        body = {"count": count, "max_model_len": length, "tokens": [*range(count)]}
        exchange.reply(orjson.dumps({**body, "token_strs": None}))


def _load(node: Node, exchange: Exchange) -> None:
    exchange.reply(orjson.dumps({"server_load": node.running + node.waiting}))


def _version(node: Node, exchange: Exchange) -> None:  # noqa: ARG001 - a route's signature
    exchange.reply(orjson.dumps({"version": VERSION}))


class Router:
    """Finds the node, or the control plane, that a request is for.

    Args:
        nodes: The fleet's nodes.
        routes: What a node answers.
        control: The fleet.
        spawn: Runs a coroutine that belongs to the fleet.
    """

    def __init__(
        self,
        nodes: tuple[Node, ...],
        routes: NodeRoutes,
        control: Control,
        spawn: Callable[[Awaitable[None]], None],
    ) -> None:
        self._nodes = nodes
        self._routes = routes
        self._control = control
        self._spawn = spawn

    def on_node(self, index: int, exchange: Exchange) -> None:
        """Answer a request that came to a node's own socket.

        Args:
            index: The node's number.
            exchange: The request.
        """
        self._routes.handle(self._nodes[index], exchange.head.path, exchange)

    def on_root(self, exchange: Exchange) -> None:
        """Answer a request that came to the shared socket.

        Args:
            exchange: The request.
        """
        if exchange.head.path.startswith("/_sim/"):
            self._on_control(exchange)
            return
        found = _NODE.fullmatch(exchange.head.path)
        if found is None or int(found[1]) >= len(self._nodes):
            exchange.reply(error_body("Not Found", "Not Found", 404), 404)
        else:
            self._routes.handle(self._nodes[int(found[1])], found[2] or "/", exchange)

    def _on_control(self, exchange: Exchange) -> None:
        try:
            self._dispatch(exchange)
        except (ApiError, ConfigurationError, ValueError) as error:
            exchange.reply(error_body(str(error), "BadRequestError", 400), 400)

    def _dispatch(self, exchange: Exchange) -> None:
        match exchange.head.method, exchange.head.path:
            case "GET", "/_sim/stats":
                prompts = exchange.query("prompts") == "1"
                exchange.reply(orjson.dumps(self._control.stats(prompts=prompts)))
            case "POST", "/_sim/fault":
                self._control.fault(FaultRule.from_mapping(load_object(exchange.body)))
                exchange.reply(b"{}")
            case "POST", "/_sim/kill":
                graceful = exchange.query("graceful") == "1"
                self._then(exchange, self._control.kill(self._index(exchange), graceful))
            case "POST", "/_sim/revive":
                self._then(exchange, self._control.revive(self._index(exchange)))
            case "POST", "/_sim/reset":
                self._control.reset()
                exchange.reply(b"{}")
            case _:
                exchange.reply(error_body("Not Found", "Not Found", 404), 404)

    def _index(self, exchange: Exchange) -> int:
        index = int(exchange.query("node") or "-1")
        if not 0 <= index < len(self._nodes):
            raise ApiError(f"node must be a number from 0 to {len(self._nodes) - 1}")
        return index

    def _then(self, exchange: Exchange, action: Awaitable[None]) -> None:
        async def run() -> None:
            await action
            exchange.reply(b"{}")

        self._spawn(run())
