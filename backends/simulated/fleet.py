"""SimulatedFleet: nodes in this event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from types import TracebackType
from typing import Any, Self

from ..core.errors import ConfigurationError
from ..core.process import raise_file_limit
from .engine import Engine
from .faults import FaultInjector, FaultRule
from .node import CompletionJob, EngineNode, Node, NodeCounts, QuestionLog
from .pooling import PoolingService
from .responders import RESPONDERS, ResponderFactory, make_responder
from .routes import CompletionService, NodeRoutes, Router
from .server import FleetListeners
from .spec import SimulationSpec


class SimulatedFleet:
    """Simulated vLLM nodes in the running event loop, as an async context manager.

    Example::

        async with SimulatedFleet(SimulationSpec.fast(nodes=4)) as fleet:
            model = ChatOpenAI(base_url=fleet.urls[0], api_key="EMPTY", model=fleet.spec.model)
            await model.ainvoke("Hello")
            assert fleet.stats()["totals"]["requests"] == 1

    Every answer carries the system fingerprint ``fanfold-simulated``.

    Args:
        spec: Size, speed, answers and faults.
        responders: Responder factories by name; see `responders`.

    Raises:
        ConfigurationError: The specification names an unknown responder.
        MissingExtraError: The responder's packages are not installed.
    """

    def __init__(
        self,
        spec: SimulationSpec | None = None,
        responders: Mapping[str, ResponderFactory] = RESPONDERS,
    ) -> None:
        self.spec = spec = spec or SimulationSpec()
        self._started = 0.0
        self._faults = FaultInjector(spec.seed, spec.nodes)
        self._questions = QuestionLog()
        self._nodes = tuple(_node(spec, index) for index in range(spec.nodes))
        self._tasks: set[asyncio.Task[None]] = set()
        responder = make_responder(spec, responders)
        service = CompletionService(spec, responder, self._faults, self._questions, self.now)
        pooling = PoolingService(spec, service.reader, self._questions, self.now)
        routes = NodeRoutes(spec, service, pooling, self._faults, self.now)
        router = Router(self._nodes, routes, self, self._spawn)
        self._listeners = FleetListeners(spec, router.on_root, router.on_node)

    async def __aenter__(self) -> Self:
        """Open the sockets.

        Raises:
            ConfigurationError: An address or port is not available.
        """
        raise_file_limit()
        await self._listeners.open()
        self._started = asyncio.get_running_loop().time()
        for rule in self.spec.faults:
            self.add_fault(rule)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close everything; waiting clients see a reset."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listeners.close()

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URL of each node, ending in ``/v1``."""
        return self._listeners.urls

    @property
    def control_url(self) -> str:
        """URL of the control plane (``/_sim/...``), without a path."""
        return self._listeners.control_url

    def now(self) -> float:
        """Return simulated seconds since the start."""
        return (asyncio.get_running_loop().time() - self._started) * self.spec.time_scale

    def stats(self, prompts: bool = False) -> dict[str, Any]:
        """Return the statistics so far, the same as ``GET /_sim/stats``.

        Args:
            prompts: Whether to list every question by its key (``?prompts=1``).

        Returns:
            ``totals`` over all nodes, ``nodes`` with the counters of each, ``questions`` with
            distinct, answered, served, duplicates and wasted tokens, ``uptime_s``, and
            ``prompts`` on request.
        """
        nodes = [
            {
                "node": node.index,
                "alive": node.alive,
                "running": node.running,
                "waiting": node.waiting,
                **node.counts.to_mapping(),
            }
            for node in self._nodes
        ]
        stats: dict[str, Any] = {
            "totals": _totals(self._nodes),
            "nodes": nodes,
            "questions": self._questions.summary(),
            "uptime_s": self.now(),
        }
        return {**stats, "prompts": self._questions.by_key()} if prompts else stats

    def add_fault(self, rule: FaultRule) -> None:
        """Add a fault, effective immediately.

        Raises:
            ConfigurationError: The rule names a node that does not exist.
        """
        if isinstance(rule.nodes, tuple) and any(
            n not in range(len(self._nodes)) for n in rule.nodes
        ):
            raise ConfigurationError(
                f"fault {rule.kind}: nodes are numbered from 0 to {len(self._nodes) - 1}"
            )
        nodes = self._faults.add(rule)
        if rule.kind in {"die_at", "revive_at"}:
            for node in sorted(nodes):
                self._spawn(self._later(rule, node))

    async def kill(self, node: int, graceful: bool = False) -> None:
        """Stop a node.

        A node with its own socket refuses connections afterwards; if nodes share a socket, every
        request to the node is reset.

        Args:
            node: The node's number.
            graceful: Whether requests in flight get half an answer with ``finish_reason: abort``
                (as after SIGTERM) instead of a reset (as after SIGKILL).
        """
        victim = self._nodes[node]
        victim.alive = False
        for work in reversed(victim.work):  # queued ones first, so that none of them starts
            if isinstance(work, CompletionJob):
                if graceful:
                    work.abort()
                else:
                    work.crash()
        await self._listeners.close_node(node, abruptly=not graceful)

    async def revive(self, node: int) -> None:
        """Restart a stopped node at the same address.

        Raises:
            ConfigurationError: Its port is now in use.
        """
        if not self._nodes[node].alive:
            await self._listeners.open_node(node)
            self._nodes[node].alive = True

    def reset(self) -> None:
        """Remove all faults and reset all counters; nodes keep their state."""
        self._faults.clear()
        self._questions.clear()
        for node in self._nodes:
            node.counts = NodeCounts()

    async def _later(self, rule: FaultRule, node: int) -> None:
        moment = rule.value or 0.0
        await asyncio.sleep(max(0.0, moment - self.now()) / self.spec.time_scale)
        if rule.kind == "die_at":
            self._nodes[node].counts.injected[rule.kind] += 1
            await self.kill(node, rule.graceful)
        else:
            await self.revive(node)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _node(spec: SimulationSpec, index: int) -> Node:
    if spec.engine is not None:
        speed = spec.speeds.get(index, 1.0) * spec.time_scale
        return EngineNode(index, Engine(spec.engine), spec.max_num_queued_reqs, speed)
    return Node(
        index=index,
        slots=spec.capacities.get(index, spec.max_num_seqs),
        queue_limit=spec.max_num_queued_reqs,
        speed=spec.speeds.get(index, 1.0),
    )


def _totals(nodes: tuple[Node, ...]) -> dict[str, Any]:
    """Sum the counters that can be summed."""
    total = NodeCounts()
    for node in nodes:
        counts = node.counts
        total.requests += counts.requests
        total.disconnects += counts.disconnects
        total.prompt_tokens += counts.prompt_tokens
        total.completion_tokens += counts.completion_tokens
        total.broken_tokens += counts.broken_tokens
        total.abandoned_tokens += counts.abandoned_tokens
        total.refused += counts.refused
        total.finished += counts.finished
        total.injected += counts.injected
        total.running_max = max(total.running_max, counts.running_max)
        total.waiting_max = max(total.waiting_max, counts.waiting_max)
    return total.to_mapping()
