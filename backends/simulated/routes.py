"""Routes of a node (completions, models, tokenize, metrics) and the control plane."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import orjson

from ..core.errors import ConfigurationError
from ..core.types import SIMULATED_FINGERPRINT
from .faults import FaultContext, FaultDecision, FaultInjector, FaultRule
from .node import CompletionJob, LatencyModel, Node, QuestionLog, Timing
from .pooling import PoolingService
from .requests import Question, QuestionReader, load_object
from .responders import Answer, Responder, answer_question, spoil_answer
from .responses import (
    REFUSING_FAULTS,
    UNREADABLE_FAULTS,
    Envelope,
    send_fault,
    send_unauthorized,
    usage_object,
)
from .server import Exchange
from .spec import SimulationSpec
from .values import ApiError, count_chat_tokens, count_text_tokens, error_body, hash_parts


class CompletionService:
    """Shared service of all nodes for ``/v1/chat/completions`` and ``/v1/completions``.

    Args:
        spec: The fleet's specification.
        responder: Generates the answers.
        faults: Decides on faults.
        servings: Counts the questions.
        now: Returns simulated seconds since the start.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        responder: Responder,
        faults: FaultInjector,
        servings: QuestionLog,
        now: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._responder = responder
        self._faults = faults
        self._questions = servings
        self._now = now
        self._latency = LatencyModel(spec)
        self.reader = QuestionReader(spec.model, spec.seed)

    def serve(self, node: Node, exchange: Exchange, chat: bool) -> None:
        """Answer a request, now or later.

        Args:
            node: The node that received it.
            exchange: The request.
            chat: Whether it is for a chat completion.
        """
        node.arrivals += 1
        node.counts.requests += 1
        try:
            self._serve(node, exchange, chat)
        except ApiError as error:
            node.counts.refused[str(error.status)] += 1
            exchange.reply(error.body, error.status)

    def max_model_len(self, node: Node) -> int:
        """Return a node's context length in tokens."""
        return self._faults.max_model_len(node.index, self._now(), self._spec.max_model_len)

    def _serve(self, node: Node, exchange: Exchange, chat: bool) -> None:
        question = self.reader.read(exchange.body, chat, self.max_model_len(node))
        attempt = self._questions.record_arrival(question.key)
        strike = self._decide_fault(node, exchange, question, attempt)
        kind = strike.rule.kind if strike.rule else ""
        if kind:
            node.counts.injected[kind] += 1
        if strike.rule and kind in REFUSING_FAULTS:
            send_fault(exchange, strike.rule)
            return
        drawn = question.draw(attempt)
        answer = spoil_answer(answer_question(drawn, self._responder), kind, drawn)
        envelope = self._envelope(node, exchange, question, answer)

        def clock() -> Timing:
            load = (node.running - 1) / node.slots
            speed = node.speed * strike.speed
            key = (question.key, node.index)
            return self._latency.compute_timing(
                question.prompt_tokens, answer.tokens, load, speed, key
            )

        has_engine = self._spec.engine is not None
        CompletionJob(
            exchange,
            node,
            question,
            answer,
            envelope,
            kind,
            None if has_engine else clock,
            self._record_finished,
            strike.speed if has_engine else 1.0,
        ).submit()

    def _decide_fault(
        self, node: Node, exchange: Exchange, question: Question, attempt: int
    ) -> FaultDecision:
        strike = self._faults.decide(
            FaultContext(
                node=node.index,
                arrival=node.arrivals,
                key=question.key,
                attempt=attempt,
                now=self._now(),
                stream=question.stream,
                first_round=question.first_round,
                token=exchange.head.header(b"authorization"),
            )
        )
        if strike.speed != 1:
            node.counts.injected["slow"] += 1
        return strike

    def _envelope(
        self, node: Node, exchange: Exchange, question: Question, answer: Answer
    ) -> Envelope:
        name = exchange.head.header(b"x-request-id")
        if name is None:
            name = hash_parts(question.key, node.index, node.arrivals).hex()
        mode = self._spec.usage
        return Envelope(
            id=f"{'chatcmpl' if question.chat else 'cmpl'}-{name}",
            created=int(time.time()),
            model=self._spec.model,
            chat=question.chat,
            usage=usage_object(mode, question.prompt_tokens, answer.tokens),
            omit_usage=mode == "omit",
        )

    def _record_finished(self, job: CompletionJob) -> None:
        counts, tokens = job.node.counts, job.answer.tokens
        counts.finished[job.answer.finish_reason] += 1
        counts.prompt_tokens += job.question.prompt_tokens
        counts.completion_tokens += tokens
        total = job.question.prompt_tokens + tokens
        if job.fault in UNREADABLE_FAULTS:
            counts.broken_tokens += total
        self._faults.record_tokens(job.node.index, total, self._now())
        if job.fault in {"", "no_usage"} and job.answer.finish_reason != "abort":
            self._questions.record_answer(job.question.key, total, self._now())


def metrics_text(node: Node, model: str) -> bytes:
    """Return a node's metrics as Prometheus text, labelled with the model's name."""
    counts = node.counts
    queries, hits = node.cache_hits or (counts.prompt_tokens, 0)
    gauges = {
        "num_requests_running": node.running,
        "num_requests_waiting": node.waiting,
        "kv_cache_usage_perc": node.kv_usage,
    }
    counters = {
        "prompt_tokens": counts.prompt_tokens,
        "generation_tokens": counts.completion_tokens,
        "num_preemptions": 0,
        "prefix_cache_queries": queries,
        "prefix_cache_hits": hits,
    }
    label = model.replace("\\", "\\\\").replace('"', '\\"')
    base = f'engine="0",model_name="{label}"'
    lines: list[str] = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{base}}} {float(value)}"]
    lines.append("# TYPE vllm:num_requests_waiting_by_reason gauge")
    for reason, value in (("capacity", node.waiting), ("deferred", 0)):
        lines.append(
            f'vllm:num_requests_waiting_by_reason{{{base},reason="{reason}"}} {float(value)}'
        )
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name} counter", f"vllm:{name}_total{{{base}}} {float(value)}"]
    lines.append("# TYPE vllm:request_success counter")
    for reason in ("stop", "length", "abort", "error", "repetition"):
        lines.append(
            f'vllm:request_success_total{{{base},finished_reason="{reason}"}} '
            f"{float(counts.finished[reason])}"
        )
    rejected = float(counts.refused["503"])
    lines.append("# TYPE vllm:admission_rejections counter")
    lines.append(
        f'vllm:admission_rejections_total{{{base},reason="max_num_queued_reqs"}} {rejected}'
    )
    return ("\n".join(lines) + "\n").encode()


_NODE: Final = re.compile(r"/node-(\d+)(/.*)?")
_METRICS_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
VERSION: Final = "0.32.0+fanfold.simulated"

_Route: TypeAlias = Callable[[Node, Exchange], None]


class FleetControl(Protocol):
    """Operations of the control plane on the fleet."""

    def stats(self, prompts: bool = False) -> dict[str, Any]:
        """Return the statistics so far."""
        ...

    def add_fault(self, rule: FaultRule) -> None:
        """Add a fault."""
        ...

    async def kill(self, node: int, graceful: bool = False) -> None:
        """Stop a node."""
        ...

    async def revive(self, node: int) -> None:
        """Start a stopped node."""
        ...

    def reset(self) -> None:
        """Remove faults and reset counters."""
        ...


class NodeRoutes:
    """The routes of one node.

    Args:
        spec: The fleet's specification.
        service: Answers completions.
        pooling: Answers requests for embeddings, scores, ranks and transcriptions.
        faults: Knows which nodes are cold.
        now: Returns simulated seconds since the start.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        service: CompletionService,
        pooling: PoolingService,
        faults: FaultInjector,
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
            "/v1/embeddings": ("POST", pooling.embed),
            **dict.fromkeys(("/score", "/v1/score"), ("POST", pooling.score)),
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), ("POST", pooling.rerank)),
            **dict.fromkeys(
                ("/v1/audio/transcriptions", "/v1/audio/translations"), ("POST", pooling.transcribe)
            ),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ping": ("GET", self._health),
            "/load": ("GET", _load),
            "/version": ("GET", _version),
            "/metrics": ("GET", self._metrics),
            "/tokenize": ("POST", self._tokenize),
        }

    def handle(self, node: Node, path: str, exchange: Exchange) -> None:
        """Answer a request to a path of a node."""
        if not node.alive:
            exchange.reset()
            return
        exchange.set_idle_timeout(self._faults.idle_s(node.index, self._now()))
        method, route = self._routes.get(path, ("", None))
        if route is None:
            exchange.reply(error_body("Not Found", "Not Found", 404), 404)
        elif method != exchange.head.method:
            exchange.reply(error_body("Method Not Allowed", "Method Not Allowed", 405), 405)
        elif path.startswith("/v1/") and not self._is_authorized(exchange):
            send_unauthorized(exchange)
        else:
            route(node, exchange)

    def _is_authorized(self, exchange: Exchange) -> bool:
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
        exchange.reply(metrics_text(node, self._spec.model), content_type=_METRICS_TYPE)

    def _tokenize(self, node: Node, exchange: Exchange) -> None:
        try:
            data = load_object(exchange.body)
            self._service.reader.check_model(data)
            if isinstance(data.get("messages"), list):
                count = count_chat_tokens(data["messages"])
            else:
                count = count_text_tokens(str(data.get("prompt", "")))
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
    """Route requests to a node or to the control plane.

    Args:
        nodes: The fleet's nodes.
        routes: Routes of a node.
        control: The fleet.
        spawn: Runs a coroutine as a task of the fleet.
    """

    def __init__(
        self,
        nodes: tuple[Node, ...],
        routes: NodeRoutes,
        control: FleetControl,
        spawn: Callable[[Awaitable[None]], None],
    ) -> None:
        self._nodes = nodes
        self._routes = routes
        self._control = control
        self._spawn = spawn

    def on_node(self, index: int, exchange: Exchange) -> None:
        """Answer a request to the own socket of the node with this number."""
        self._routes.handle(self._nodes[index], exchange.head.path, exchange)

    def on_root(self, exchange: Exchange) -> None:
        """Answer a request to the shared socket."""
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
                self._control.add_fault(FaultRule.from_mapping(load_object(exchange.body)))
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
