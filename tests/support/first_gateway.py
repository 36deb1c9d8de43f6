"""A stand-in for the FIRST gateway: a real HTTP server, written from a description of the service.

Each row names the section of that description, as in ``# 1.4 tokens per minute``. Rows marked
``open`` are not described; there the stand-in follows the public source of the service
(argonne-lcf/FIRST at 329c0cd). Clients must not rely on them.

It runs in a test's event loop (``async with FirstGateway(spec) as gateway``) or as a process of its
own (``async with run_gateway_process(spec) as process``), with its counters at ``/_standin/stats``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
import time
import uuid
from asyncio.subprocess import PIPE
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
from aiohttp import web

from fanfold.backends.simulated.pooling import embed_text
from fanfold.backends.simulated.requests import QuestionReader
from fanfold.backends.simulated.responders import answer_question, make_responder
from fanfold.backends.simulated.responses import Envelope, completion_body, usage_object
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import ApiError, count_text_tokens

Json = Any
ROOT: Final = "/resource_server"  # 1.1
SESSION_HEADER: Final = "X-ALCF-Session-ID"  # 1.1, 8.1
CHAT: Final = "/v1/chat/completions"
_ROUTES: Final = ("chat/completions", "completions", "embeddings", "responses", "messages")  # 1.1
_CUT: Final = 256  # 1.4: the body of the model server is cut to 256 bytes
_PAGE: Final = (
    "<!doctype html>\n<html><head><title>Not Found</title></head><body>\n{}</body></html>"
)
_RESERVED: Final = frozenset({"cache_salt", "api_port", "openai_endpoint"})  # 8.2
_RESERVED_PREFIXES: Final = ("stream_task_", "streaming_server_")  # 8.2


@dataclass(frozen=True)
class DeploymentSpec:
    """One model of a cluster.

    Attributes:
        cluster: Its cluster.
        framework: Its framework.
        model: The canonical name of the model.
        aliases: Other names that are accepted (8.8).
        kind: ``compute`` (Globus Compute) or ``direct`` (DirectAPI): timeouts and wording differ.
        state: ``running``, ``cold``, ``offline`` or ``not_live`` (8.12).
        replicas: Number of replicas that count their requests; ignored with ``upstreams``.
        upstreams: Base URLs (``…/v1``) of real model servers, one per replica; without them, the
            stand-in answers by itself.
        served_as: The model's name at the upstreams; None: ``model``.
        affine: Whether sessions are hashed onto replicas (8.1: cluster minerva); otherwise a
            replica is drawn for each request (1.1).
        context_window: Longest context in tokens.
        details: Whether ``/models`` shows limits and capabilities (8.4: "where configured").
        routes: The offered routes, as ``/list-endpoints`` shows them.
        batches: Whether batches are accepted.
        embeds: Whether it is a model for embeddings, which answers nothing else.
    """

    cluster: str = "sophia"
    framework: str = "vllm"
    model: str = "org/m"
    aliases: tuple[str, ...] = ()
    kind: str = "compute"
    state: str = "running"
    replicas: int = 1
    upstreams: tuple[str, ...] = ()
    served_as: str | None = None
    affine: bool = False
    context_window: int = 32_768
    details: bool = True
    routes: tuple[str, ...] = (CHAT, "/v1/completions")
    batches: bool = True
    embeds: bool = False

    @property
    def path(self) -> str:
        """``cluster/framework``."""
        return f"{self.cluster}/{self.framework}"


@dataclass(frozen=True)
class TokenSpec:
    """What a token is.

    Attributes:
        user: Its user.
        expires_s: Seconds from the start of the gateway until it expires; None: never.
        policies: Whether the internal policies refuse it: a new login is due (8.12).
    """

    user: str = "user"
    expires_s: float | None = None
    policies: bool = False


@dataclass(frozen=True)
class BatchSpec:
    """How batches run.

    Attributes:
        per_user: Active batches per user (8.6).
        pending_s: Seconds before one starts.
        lines_per_s: Speed; None: as fast as possible.
        lines_per_chunk: Lines that are answered and written together (1.6: 20,000).
        load_s: Seconds to load the model, for each chunk (1.6).
        missing: Share of lines without an output line (1.6 d).
        failed: Share of lines with an error.
        dies_after_lines: A batch fails after so many lines; None: it does not.
        deaths: How many batches die so; later ones complete.
        needs_folder: Whether a submission without a folder gives 500 and leaves a batch (1.6 a).
    """

    per_user: int = 1
    pending_s: float = 0.0
    lines_per_s: float | None = None
    lines_per_chunk: int = 20_000
    load_s: float = 0.0
    missing: float = 0.0
    failed: float = 0.0
    dies_after_lines: int | None = None
    deaths: int = 1
    needs_folder: bool = True


@dataclass(frozen=True)
class GatewaySpec:
    """The gateway: its deployments, users and limits. The defaults are those of the service.

    Attributes:
        deployments: The models.
        tokens: Accepted tokens.
        port: Port, or 0 for a free one.
        requests_per_s: Requests per second and user, all routes (1.4).
        tokens_per_min_user: Tokens per window for a user and a model (8.5).
        tokens_per_min_model: Tokens per window for a model (8.5).
        window_s: Length of a window (8.5: 60 s).
        failure_cache_s: Seconds for which a refused token stays refused (1.2).
        jobs_cache_s: Seconds for which ``/jobs`` is cached (1.1).
        cold_start_s: Seconds until a cold model runs, the queue included (1.5: 10 to 15 minutes).
        queue_s: Seconds of these in the queue.
        compute_timeout_s: Longest wait for a Globus Compute task (1.4: 300 s).
        direct_timeout_s: Longest wait for an upstream (1.4: 120 s).
        start_memory_s: Seconds after a caller triggered a start in which others are refused (1.4).
        maintenance: Clusters under maintenance.
        answer_s: Seconds per answer of the stand-in itself.
        output_tokens: Minimum and maximum of tokens of a free text that it answers.
        batch: How batches run.
        seed: Seed of answers, and of lines that fail.
        successor: Whether it is the rewrite of the gateway that will come (8.13), of which it only
            has the routes by which it is recognised.
    """

    deployments: tuple[DeploymentSpec, ...] = (DeploymentSpec(),)
    tokens: Mapping[str, TokenSpec] = field(default_factory=lambda: {"good": TokenSpec()})
    port: int = 0
    requests_per_s: int = 10
    tokens_per_min_user: int = 60_000
    tokens_per_min_model: int = 100_000
    window_s: float = 60.0
    failure_cache_s: float = 60.0
    jobs_cache_s: float = 60.0
    cold_start_s: float = 600.0
    queue_s: float = 0.0
    compute_timeout_s: float = 300.0
    direct_timeout_s: float = 120.0
    start_memory_s: float = 600.0
    maintenance: tuple[str, ...] = ()
    answer_s: float = 0.0
    output_tokens: tuple[int, int] = (20, 40)
    batch: BatchSpec = BatchSpec()
    seed: int = 0
    successor: bool = False

    def to_json(self) -> str:
        """Return the specification as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GatewaySpec:
        """Read the output of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        deployments = tuple(DeploymentSpec(**_freeze(one)) for one in data.pop("deployments"))
        tokens = {token: TokenSpec(**one) for token, one in data.pop("tokens").items()}
        batch = BatchSpec(**data.pop("batch"))
        return cls(deployments=deployments, tokens=tokens, batch=batch, **_freeze(data))


def _freeze(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass from JSON data, lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


@dataclass
class CallRecord:
    """One request that reached the gateway."""

    at: float
    method: str
    path: str
    user: str | None = None
    session: str | None = None
    model: str | None = None
    replica: int | None = None
    status: int = 0
    code: str | None = None
    tokens: int = 0
    ended: float | None = None


@dataclass
class Window:
    """One window of the token limit of a user and a model.

    Attributes:
        start: When it began, in seconds since the gateway's start.
        tokens: Tokens counted in it.
        carried: Those of them whose requests were in flight when it began.
        refused: Requests that it refused.
    """

    start: float
    tokens: int = 0
    carried: int = 0
    refused: int = 0


@dataclass
class Batch:
    """One batch, as the list of batches shows it, and what happened to it."""

    id: str
    user: str
    cluster: str
    framework: str
    model: str
    input_file: str
    output_folder_path: str | None
    submitted: float
    status: str = "pending"
    in_progress_at: str | None = None
    completed_at: str | None = None
    failed_at: str | None = None
    result: str | None = None
    lines: int = 0
    custom_ids: int = 0
    ended: float | None = None

    @property
    def active(self) -> bool:
        """Whether it is pending or runs."""
        return self.status in {"pending", "running"}

    def summary(self) -> Json:
        """Return its entry in the list; open: the keys."""
        keys = ("id", "cluster", "framework", "input_file", "in_progress_at", "completed_at")
        shown = {key: getattr(self, key) for key in keys}
        return {**shown, "failed_at": self.failed_at, "status": self.status, "batch_id": self.id}


class Refusal(Exception):  # noqa: N818 - an answer, not an error of the stand-in
    """An answer with an error status."""

    def __init__(self, status: int, body: Json, *, text: str = "", kind: str = "json") -> None:
        super().__init__(status, body)
        self.status, self.body, self.text, self.kind = status, body, text, kind

    @property
    def code(self) -> str | None:
        """The error code of the body, if it has one."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error.get("code") if isinstance(error, dict) else None

    def respond(self) -> web.Response:
        """Return it as an answer."""
        if self.kind == "json":
            return web.json_response(self.body, status=self.status)
        kind = "text/html" if self.kind == "html" else "text/plain"
        return web.Response(text=self.text, status=self.status, content_type=kind)


def _error(status: int, code: str, message: str, **info: Any) -> Refusal:
    return Refusal(status, {"error": {"code": code, "message": message, "info": info}})  # 1.3


def _not_found() -> Refusal:
    return Refusal(404, None, text=_PAGE.format("<h1>Not Found</h1>"), kind="html")  # 1.1, 8.12


def wrap_upstream(status: int, body: bytes) -> Refusal:
    """Return an error of the model server as the gateway passes it on (1.4, 8.12)."""
    text = f"Upstream endpoint returned {status}: {body[:_CUT]!r}"
    return _error(status, "internal_endpoint_error", text)  # 1.4: its Retry-After is dropped


Row = Callable[[], Refusal]
ROWS: Final[dict[str, Row]] = {
    # 1.4 no Authorization
    "missing_authorization": lambda: Refusal(
        401, {"detail": "Error: Missing ('Authorization': 'Bearer <token>') in request headers."}
    ),
    # 1.4 bad or expired token
    "unauthorized": lambda: _error(401, "unauthorized", "Error: Token is invalid or expired."),
    # 8.12 internal policies: 30-day re-authentication
    "internal_policies": lambda: _error(
        401, "unauthorized", "Error: Permission denied from internal policies. Log in again."
    ),
    # 1.4 other user's batch; policy refusal
    "access_denied": lambda: _error(403, "access_denied", "Error: Permission denied."),
    # 1.4 per-user request throttle
    "throttle": lambda: Refusal(429, {"detail": "Too many requests."}),
    # 1.4 tokens per minute; 8.5
    "tokens_per_minute": lambda: _error(
        429,
        "too_many_requests",
        "Tokens/minute limit exceeded",
        global_model_usage=60_000,
        user_model_usage=60_000,
    ),
    # 1.4 upstream slow
    "upstream_slow": lambda: _error(
        504, "internal_endpoint_error", "Error: the endpoint did not answer in time.", timeout=120
    ),
    # 1.4 Globus Compute task > 300 s, and the first caller of a cold model
    "request_timeout": lambda: _error(
        408, "request_timeout", "Error: the task took too long.", task_id=str(uuid.uuid4())
    ),
    # 1.4 model cold, later callers
    "not_ready": lambda: _error(
        503,
        "internal_endpoint_error",
        "Error: Endpoint online but not ready to receive tasks. Please try again later.",
    ),
    # 1.4 endpoint offline; 8.7
    "offline": lambda: _error(503, "internal_endpoint_error", "Error: Endpoint x is offline."),
    # 8.12 metis, model not live
    "not_live": lambda: _error(
        503, "internal_endpoint_error", "Error: 'x' is not currently live on Metis."
    ),
    # 8.12 a backend that refuses connections: 500, not 503
    "refused_connection": lambda: _error(
        500,
        "internal_endpoint_error",
        "HTTP error calling API at http://10.0.0.1:8000: All connection attempts failed",
    ),
    # 1.4 maintenance; 8.7
    "maintenance": lambda: _error(
        503, "cluster_under_maintenance", "Error: cluster x is under maintenance."
    ),
    # 1.4 unknown model
    "unknown_model": lambda: _error(404, "endpoint_not_found", "Error: model x does not exist."),
    # 1.4 unknown cluster
    "unknown_cluster": lambda: _error(404, "cluster_not_found", "Error: cluster x does not exist."),
    # 1.4 wrong framework
    "wrong_framework": lambda: _error(
        400, "unsupported_framework", "Error: framework x is not available on cluster y."
    ),
    # 1.4 wrong route
    "wrong_route": lambda: _error(
        400, "unsupported_endpoint", "Error: endpoint x is not available on cluster y."
    ),
    # 1.4 batch quota
    "quota_exceeded": lambda: _error(400, "quota_exceeded", "Error: too many active batches."),
    # 1.4 same file running
    "batch_ongoing": lambda: _error(
        400, "batch_ongoing", "Error: this input file is already used by an ongoing batch."
    ),
    # 1.4 result not ready
    "batch_not_ready": lambda: _error(
        400, "batch_ongoing", "Error: the batch is not completed yet."
    ),
    # 1.4 batch unavailable
    "batch_unavailable": lambda: _error(
        400, "batch_unavailable", "Error: batches are not available for this model."
    ),
    # 1.4 batch failed
    "batch_failed": lambda: _error(400, "batch_failed", "Error: the batch failed."),
    # 1.4 missing messages; 8.2 reserved field
    "invalid_request": lambda: _error(422, "invalid_request", "Error: messages: field required"),
    # 1.4 batch schema error; 1.3 the third shape
    "batch_schema": lambda: Refusal(
        422, {"detail": [{"type": "extra_forbidden", "loc": ["body"], "msg": "not permitted"}]}
    ),
    # 1.4 cancelled future in the gateway; 1.3 plain text
    "cancelled": lambda: Refusal(500, None, text="Internal Server Error", kind="text"),
    # 1.3 uncaught errors have error_id in place of info
    "uncaught": lambda: Refusal(
        500,
        {"error": {"code": "internal_server_error", "message": "Error.", "error_id": "e-1"}},
    ),
    # 1.3 HTML; 8.12 unknown routes
    "unknown_route": _not_found,
    # 8.1 a header that is too long or not visible ASCII: 400; open: its code
    "bad_session": lambda: _error(400, "invalid_request", f"Error: {SESSION_HEADER} is invalid."),
}
"""Every error of the service by name; `FirstGateway.fail_next` gives one."""


def refuse(row: str) -> Refusal:
    """Return a new answer of a row."""
    return ROWS[row]()


class Deployment:
    """The state of one model."""

    def __init__(self, spec: DeploymentSpec, gateway: GatewaySpec) -> None:
        self.spec = spec
        self.state = spec.state
        self.triggered: float | None = None
        self.triggers = 0
        self.replicas: Counter[int] = Counter()
        self.sessions: dict[str | None, set[int]] = {}
        simulation = SimulationSpec.fast(
            model=spec.model,
            seed=gateway.seed,
            output_tokens=gateway.output_tokens,
            max_model_len=spec.context_window,
        )
        self._reader = QuestionReader(spec.model, gateway.seed)
        self._responder = make_responder(simulation)

    @property
    def key(self) -> str:
        """``cluster/framework/model``."""
        return f"{self.spec.path}/{self.spec.model}"

    def pick_replica(self, user: str, session: str | None) -> int:
        """Return the replica of a request, and count it."""
        count = len(self.spec.upstreams) or self.spec.replicas
        if self.spec.affine:  # 8.1: (user, model, header); without a header one key, one replica
            text = f"{user}\n{self.spec.model}\n{session or ''}"
            chosen = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % count
        else:  # 1.1: random.choice
            chosen = random.randrange(count)
        self.replicas[chosen] += 1
        self.sessions.setdefault(session, set()).add(chosen)
        return chosen

    def answer(self, body: Json, name: str) -> tuple[int, bytes]:
        """Return status and body of an answer of the model server."""
        if self.spec.embeds:
            return self._embed(body)
        raw = json.dumps({**body, "stream": False}).encode()
        try:
            question = self._reader.read(raw, "messages" in body, self.spec.context_window)
            answer = answer_question(question, self._responder)
        except ApiError as error:
            return error.status, error.body
        envelope = Envelope(
            id=f"chatcmpl-{name}",
            created=int(time.time()),
            model=self.spec.model,  # 8.8 the canonical name
            chat=question.chat,
            usage=usage_object("full", question.prompt_tokens, answer.tokens),
        )
        document = completion_body(envelope, answer)
        del document["system_fingerprint"]  # the mark of simulated answers: here they are real
        return 200, json.dumps(document).encode()

    def _embed(self, body: Json) -> tuple[int, bytes]:
        """Answer as vLLM does with a model for embeddings."""
        if "input" not in body:
            message = "The model does not support Chat Completions API"
            error = {"message": message, "type": "NotImplementedError", "code": 501}
            return 501, json.dumps({"error": error}).encode()
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        vectors = [embed_text(text, 8, 0) for text in texts]
        tokens = sum(map(count_text_tokens, texts))
        data = [
            {"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        document = {"object": "list", "model": self.spec.model, "data": data, "usage": usage}
        return 200, json.dumps(document).encode()


class FirstGateway:
    """The gateway in this event loop.

    Attributes:
        calls: Every request, in order.
        windows: Windows of the token limit, by ``user cluster/framework/model``.
        model_windows: The same of all users, by ``cluster/framework/model``.
        refusals: Number of error answers, by code, or by ``throttle`` and the status.
        batches: Every batch ever submitted, in order.
        tokens: Accepted tokens; a test may change them.
        maintenance: Clusters under maintenance; a test may change them.
    """

    def __init__(self, spec: GatewaySpec | None = None) -> None:
        self.spec = spec = spec or GatewaySpec()
        self.calls: list[CallRecord] = []
        self.windows: dict[str, list[Window]] = {}
        self.model_windows: dict[str, list[Window]] = {}
        self.refusals: Counter[str] = Counter()
        self.batches: list[Batch] = []
        self.tokens: dict[str, TokenSpec] = dict(spec.tokens)
        self.maintenance: set[str] = set(spec.maintenance)
        self.deployments = {
            f"{one.path}/{one.model}": Deployment(one, spec) for one in spec.deployments
        }
        self.url = ""
        self._faults: deque[tuple[str | None, Row]] = deque()
        self._refused_tokens: dict[str, tuple[float, str]] = {}
        self._times: dict[str, deque[float]] = {}
        self._jobs: dict[tuple[str, str], tuple[float, Json]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = 0.0
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._started = time.monotonic()
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(client_max_size=20 * 1024**2)  # 1.1 nginx
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.spec.port)
        await site.start()
        self.url = f"{site.name}{ROOT}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    def now(self) -> float:
        """Return seconds since the start."""
        return time.monotonic() - self._started

    def fail_next(self, row: str | Refusal, path: str | None = None, times: int = 1) -> None:
        """Answer the next inference requests with an error.

        Args:
            row: A name of `ROWS`, or the error, e.g. from `wrap_upstream`.
            path: ``cluster/framework`` that fails; None: any.
            times: How many requests.
        """
        chosen: Row = ROWS[row] if isinstance(row, str) else (lambda: row)
        self._faults.extend([(path, chosen)] * times)

    def set_state(self, key: str, state: str) -> None:
        """Change the state of ``cluster/framework/model``."""
        deployment = self.deployments[key]
        deployment.state, deployment.triggered = state, None

    def count(self, route: str, status: int | None = None) -> int:
        """Return how many requests had a path that ends so, with a status if one is given."""
        return sum(
            call.path.endswith(route) and status in (None, call.status) for call in self.calls
        )

    def stats(self) -> Json:
        """Return all counters as JSON data."""
        return {
            "url": self.url,
            "now": self.now(),
            "calls": [asdict(call) for call in self.calls],
            "windows": {k: [asdict(w) for w in v] for k, v in self.windows.items()},
            "model_windows": {k: [asdict(w) for w in v] for k, v in self.model_windows.items()},
            "refusals": dict(self.refusals),
            "batches": [asdict(batch) for batch in self.batches],
            "deployments": {
                key: {
                    "state": one.state,
                    "triggers": one.triggers,
                    "replicas": {str(k): v for k, v in one.replicas.items()},
                    "sessions": {k or "": sorted(v) for k, v in one.sessions.items()},
                }
                for key, one in self.deployments.items()
            },
        }

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/_standin/"):
            return await self._control(request)
        call = CallRecord(self.now(), request.method, request.path)
        self.calls.append(call)
        try:
            response = await self._route(request, call)
        except Refusal as refusal:
            response = refusal.respond()
            call.code = refusal.code
            named = refusal.code or ("throttle" if refusal.status == 429 else str(refusal.status))
            self.refusals[named] += 1
        call.status, call.ended = response.status, self.now()
        return response

    async def _control(self, request: web.Request) -> web.Response:
        """Serve the control plane of the process; no part of the service."""
        if request.path == "/_standin/stats":
            return web.json_response(self.stats())
        change = await request.json()
        for key, state in change.get("states", {}).items():
            self.set_state(key, state)
        for token, one in change.get("tokens", {}).items():
            if one is None:
                self.tokens.pop(token, None)
            else:
                self.tokens[token] = TokenSpec(**one)
        if "maintenance" in change:
            self.maintenance = set(change["maintenance"])
        for fault in change.get("faults", ()):
            self.fail_next(fault["row"], fault.get("path"), fault.get("times", 1))
        return web.json_response({})

    async def _route(self, request: web.Request, call: CallRecord) -> web.StreamResponse:
        path = request.path.removeprefix(ROOT)
        parts = path.strip("/").split("/")
        if self.spec.successor:
            return self._route_successor(request, call, parts)
        if not request.path.startswith(f"{ROOT}/") or not self._is_known(request.method, parts):
            raise _not_found()
        match parts:
            case ["health"]:
                return web.json_response({"status": "ok"})  # 1.1; 8.4 no token
            case ["status"]:  # 1.1; 8.4 no token; open: true means up
                return web.json_response({c: c not in self.maintenance for c in self._clusters()})
        call.user = user = self._authenticate(request)
        self._throttle(user)
        if request.method == "GET":
            return web.json_response(self._get(request, user, parts))
        match parts:
            case [cluster, framework, "v1", "batches"]:
                return await self._submit_batch(request, user, cluster, framework)
            case [cluster, framework, "v1", *route]:
                return await self._infer(request, call, cluster, framework, "/".join(route))
        raise _not_found()

    def _route_successor(
        self, request: web.Request, call: CallRecord, parts: list[str]
    ) -> web.Response:
        """8.13: no list-endpoints, jobs or batches; open: what the catalog's answers contain."""
        if parts == ["health"]:
            return web.json_response({"status": "ok"})
        call.user = self._authenticate(request)
        if parts[:2] == ["catalog", "v1"] or parts == ["whoami"]:
            return web.json_response([])
        raise _error(404, "not_found", "Error: not found.")

    def _get(self, request: web.Request, user: str, parts: list[str]) -> Json:
        match parts:
            case ["whoami"]:
                return {"id": user, "name": user, "username": user}  # 1.1; open: the keys
            case ["list-endpoints"]:
                return self._list_endpoints()
            case [cluster, "jobs"]:
                return self._list_jobs(cluster, user)
            case [cluster, "models"]:
                return self._list_models(cluster, request.query.get("model_id"))
            case [_, _, *rest]:
                return self._read_batches(user, rest, request.query.get("status"))
        raise _not_found()

    def _is_known(self, method: str, parts: list[str]) -> bool:
        """Return True for a route of 1.1; there is no federated one (8.3)."""
        match parts:
            case ["health" | "status" | "whoami" | "list-endpoints"] | [_, "jobs" | "models"]:
                return method == "GET"
            case ["v1", "batches"] | ["v1", "batches", _] | ["v1", "batches", _, "result"]:
                return method == "GET"
            case [_, _, "v1", "batches"]:
                return method == "POST"
            case [_, _, "v1", *route]:
                return method == "POST" and "/".join(route) in _ROUTES
        return False

    def _clusters(self) -> list[str]:
        return list(dict.fromkeys(one.spec.cluster for one in self.deployments.values()))

    def _authenticate(self, request: web.Request) -> str:
        header = request.headers.get("Authorization")
        if header is None:
            raise refuse("missing_authorization")
        token = header.removeprefix("Bearer ")
        now = self.now()
        refused_at, row = self._refused_tokens.get(token, (-1e9, ""))
        if now - refused_at < self.spec.failure_cache_s:  # 1.2 a failure is cached per token
            raise refuse(row)
        known = self.tokens.get(token)
        if known is None or (known.expires_s is not None and now >= known.expires_s):
            row = "unauthorized"
        elif known.policies:
            row = "internal_policies"
        else:
            return known.user
        self._refused_tokens[token] = (now, row)
        raise refuse(row)

    def _throttle(self, user: str) -> None:
        """Refuse more than the limit within a second (1.4); open: refused ones do not count."""
        times, now = self._times.setdefault(user, deque()), self.now()
        while times and now - times[0] >= 1.0:
            times.popleft()
        if len(times) >= self.spec.requests_per_s:
            raise refuse("throttle")
        times.append(now)

    def _list_endpoints(self) -> Json:
        """1.1; 8.12: answers 200 also if every backend is dead."""
        clusters: Json = {}
        for one in self.deployments.values():
            spec = one.spec
            cluster = clusters.setdefault(
                spec.cluster, {"base_url": f"{ROOT}/{spec.cluster}", "frameworks": {}}
            )
            framework = cluster["frameworks"].setdefault(
                spec.framework, {"models": [], "endpoints": list(spec.routes)}
            )
            framework["models"].append(spec.model)
        return {"clusters": clusters}

    def _list_jobs(self, cluster: str, user: str) -> Json:
        if cluster not in self._clusters():
            raise refuse("unknown_cluster")
        cached_at, jobs = self._jobs.get((cluster, user), (-1e9, None))
        maintained = cluster in self.maintenance
        if not maintained and self.now() - cached_at < self.spec.jobs_cache_s:  # 1.1 cached 60 s
            return jobs
        groups = ("running", "queued", "stopped", "others")
        jobs = {name: [] for name in (*groups, "private_batch_running", "private_batch_queued")}
        for one in self.deployments.values():
            if one.spec.cluster != cluster:
                continue
            group, status = self._job_state(one)
            entry = {
                "Models": one.spec.model,
                "Framework": one.spec.framework,
                "Cluster": cluster,
            }
            if maintained:  # 1.1 in maintenance every model is in `stopped`
                group = "stopped"
            elif cluster == "sophia" and group != "stopped":  # 1.1 only on Sophia
                entry |= {
                    "Model Status": status,
                    "Job ID": "1",
                    "Job State": group,
                    "Host Name": "sophia-gpu-01",
                    "Nodes Reserved": "1",
                    "Walltime": "24:00:00",
                    "Estimated Start Time": "N/A",
                }
            jobs[group].append(entry)
        jobs["cluster_status"] = {}
        if not maintained:
            self._jobs[(cluster, user)] = (self.now(), jobs)
        return jobs

    def _job_state(self, one: Deployment) -> tuple[str, str]:
        """Return the group and the model status of a deployment in ``/jobs``."""
        if one.state == "running":
            return "running", "running"
        if one.triggered is None:
            return "stopped", ""
        age = self.now() - one.triggered
        if age >= self.spec.cold_start_s:
            return "running", "running"
        return ("queued", "queued") if age < self.spec.queue_s else ("running", "starting")

    def _list_models(self, cluster: str, model_id: str | None) -> Json:
        """1.1, 8.4."""
        if cluster not in self._clusters():
            raise refuse("unknown_cluster")
        found = [o.spec for o in self.deployments.values() if o.spec.cluster == cluster]
        if model_id is not None:
            found = [spec for spec in found if spec.model == model_id]
            if not found:
                raise refuse("unknown_model")
        return [self._details(spec) for spec in found]

    def _details(self, spec: DeploymentSpec) -> Json:
        plain = {
            "id": spec.model,
            "object": "model",
            "cluster": spec.cluster,
            "framework": spec.framework,
        }
        if not spec.details:
            return plain
        return {
            **plain,
            "rate_limit_token_per_minute": self.spec.tokens_per_min_model,
            "rate_limit_token_per_minute_per_user": self.spec.tokens_per_min_user,
            "capabilities": {
                "schema_version": 1,
                "api_protocols": ["openai"],
                "context_window_tokens": spec.context_window,
                "input_modalities": ["text"],
                "streaming": True,
                "reasoning": {"separate_output": False},
                "tool_calling": True,
            },
        }

    def _find(self, cluster: str, framework: str, model: str) -> Deployment:
        if cluster not in self._clusters():
            raise refuse("unknown_cluster")
        if cluster in self.maintenance:
            raise refuse("maintenance")
        near = [o for o in self.deployments.values() if o.spec.cluster == cluster]
        near = [o for o in near if o.spec.framework == framework]
        if not near:
            raise refuse("wrong_framework")
        for one in near:
            if model == one.spec.model or model in one.spec.aliases:  # 8.8
                return one
        raise refuse("unknown_model")

    async def _infer(
        self, request: web.Request, call: CallRecord, cluster: str, framework: str, route: str
    ) -> web.StreamResponse:
        call.session = session = request.headers.get(SESSION_HEADER)
        if session is not None:  # 8.1 at most 128 visible ASCII bytes
            visible = all("!" <= char <= "~" for char in session)
            if not 1 <= len(session) <= 128 or not visible:
                raise refuse("bad_session")
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise refuse("invalid_request") from None
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise refuse("invalid_request")
        if _RESERVED & body.keys() or any(k.startswith(_RESERVED_PREFIXES) for k in body):
            raise refuse("invalid_request")  # 8.2
        if route == "chat/completions" and not body.get("messages"):
            raise refuse("invalid_request")  # 1.4 missing messages
        one = self._find(cluster, framework, body["model"])
        if f"/v1/{route}" not in one.spec.routes:
            raise refuse("wrong_route")
        call.model = one.spec.model
        self._check_tokens(call, one)
        for n, (path, row) in enumerate(self._faults):
            if path in (None, one.spec.path):
                del self._faults[n]
                raise row()
        await self._wait_ready(one)
        call.replica = replica = one.pick_replica(call.user or "", session)
        status, answer = await self._ask(one, replica, route, body)
        if status != 200:
            if body.get("stream") and one.spec.kind == "direct":
                return _stream_error(status, answer)
            raise wrap_upstream(status, answer)
        call.tokens = self._record_tokens(call, one, answer)
        if body.get("stream"):
            return _stream(answer)
        return web.Response(body=answer, content_type="application/json")

    async def _wait_ready(self, one: Deployment) -> None:
        """Let the first caller of a cold model wait; refuse later ones (1.4)."""
        if one.state == "offline":
            raise refuse("offline")
        if one.state == "not_live":
            raise refuse("not_live")
        if one.state == "running":
            return
        now, spec = self.now(), self.spec
        if one.triggered is not None and now - one.triggered >= spec.cold_start_s:
            one.state = "running"
            return
        if one.triggered is not None and now - one.triggered < spec.start_memory_s:
            raise refuse("not_ready")
        if one.triggered is None:
            one.triggered = now
        one.triggers += 1
        left = one.triggered + spec.cold_start_s - now
        await asyncio.sleep(min(left, spec.compute_timeout_s))
        if left > spec.compute_timeout_s:
            raise refuse("request_timeout")
        one.state = "running"

    async def _ask(
        self, one: Deployment, replica: int, route: str, body: Json
    ) -> tuple[int, bytes]:
        limit = self.spec.direct_timeout_s
        if one.spec.kind == "compute":
            limit = self.spec.compute_timeout_s
        row = "upstream_slow" if one.spec.kind == "direct" else "request_timeout"  # 1.4
        try:
            async with asyncio.timeout(limit):
                if not one.spec.upstreams:
                    await asyncio.sleep(self.spec.answer_s)
                    return one.answer({**body, "model": one.spec.model}, uuid.uuid4().hex)
                return await self._post_upstream(one, replica, route, body)
        except TimeoutError:
            raise refuse(row) from None
        except aiohttp.ClientError:
            raise refuse("refused_connection") from None  # 8.12

    async def _post_upstream(
        self, one: Deployment, replica: int, route: str, body: Json
    ) -> tuple[int, bytes]:
        assert self._session is not None
        name = one.spec.served_as or one.spec.model
        sent = {**body, "model": name, "stream": False}
        url = f"{one.spec.upstreams[replica]}/{route}"
        async with self._session.post(url, json=sent) as response:
            content = await response.read()
        if response.status == 200 and name != one.spec.model:
            content = json.dumps({**json.loads(content), "model": one.spec.model}).encode()  # 8.8
        return response.status, content

    def _check_tokens(self, call: CallRecord, one: Deployment) -> None:
        """Refuse a request if the tokens of the window are used up (1.4, 8.5)."""
        user = self._window(self.windows, f"{call.user} {one.key}")
        model = self._window(self.model_windows, one.key)
        used_user, used_model = user.tokens if user else 0, model.tokens if model else 0
        over_user = used_user >= self.spec.tokens_per_min_user
        if over_user or used_model >= self.spec.tokens_per_min_model:
            if user:
                user.refused += 1
            raise _error(
                429,
                "too_many_requests",
                "Tokens/minute limit exceeded",
                global_model_usage=used_model,
                user_model_usage=used_user,
            )

    def _window(self, windows: dict[str, list[Window]], key: str) -> Window | None:
        """Return the window that is open now; it begins with the first record (SET NX EX, 1.5)."""
        past = windows.get(key)
        if past and self.now() - past[-1].start < self.spec.window_s:
            return past[-1]
        return None

    def _record_tokens(self, call: CallRecord, one: Deployment, answer: bytes) -> int:
        """Count the tokens of an answer, after it (8.5)."""
        usage = json.loads(answer).get("usage") or {}
        tokens = int(usage.get("total_tokens") or 0)
        for windows, key in (
            (self.windows, f"{call.user} {one.key}"),
            (self.model_windows, one.key),
        ):
            window = self._window(windows, key)
            if window is None:
                window = Window(self.now())
                windows.setdefault(key, []).append(window)
            window.tokens += tokens
            if call.at < window.start:
                window.carried += tokens
        return tokens

    async def _submit_batch(
        self, request: web.Request, user: str, cluster: str, framework: str
    ) -> web.Response:
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise refuse("batch_schema") from None
        keys = {"input_file", "model", "output_folder_path"}
        if not isinstance(body, dict) or body.keys() - keys:  # 8.6 unknown fields are forbidden
            raise refuse("batch_schema")
        texts = [body.get("input_file"), body.get("model"), body.get("output_folder_path", "-")]
        if not all(isinstance(text, str) and text for text in texts):
            raise refuse("batch_schema")
        one = self._find(cluster, framework, body["model"])
        if not one.spec.batches:
            raise refuse("batch_unavailable")
        active = [batch for batch in self.batches if batch.user == user and batch.active]
        if any(batch.input_file == body["input_file"] for batch in active):
            raise refuse("batch_ongoing")  # 8.6 the same input_file
        if len(active) >= self.spec.batch.per_user:
            raise refuse("quota_exceeded")  # 8.6
        batch = Batch(
            id=str(uuid.uuid4()),
            user=user,
            cluster=cluster,
            framework=framework,
            model=one.spec.model,
            input_file=body["input_file"],
            output_folder_path=body.get("output_folder_path"),
            submitted=self.now(),
        )
        self.batches.append(batch)
        self._spawn(self._run_batch(batch, one))
        if batch.output_folder_path is None and self.spec.batch.needs_folder:
            raise refuse("uncaught")  # 1.6 (a): 500 after the task was submitted
        return web.json_response(  # open: the shape
            {
                "batch_id": batch.id,
                "input_file": batch.input_file,
                "output_folder_path": batch.output_folder_path,
                "task_ids": str(uuid.uuid4()),
                "status": "pending",
            }
        )

    def _read_batches(self, user: str, rest: list[str], status: str | None) -> Json:
        if not rest:  # open: the keys of an entry
            mine = [batch for batch in self.batches if batch.user == user]
            return [batch.summary() for batch in mine if status in (None, batch.status)]
        batch = next((batch for batch in self.batches if batch.id == rest[0]), None)
        if batch is None:  # open: the code
            raise _error(404, "batch_not_found", f"Error: batch {rest[0]} does not exist.")
        if batch.user != user:
            raise refuse("access_denied")  # 1.4 other user's batch
        if len(rest) == 1:
            return batch.status  # 1.6, 8.6 a bare string
        if batch.status == "failed":
            raise refuse("batch_failed")
        if batch.status != "completed":
            raise refuse("batch_not_ready")
        return batch.result  # 1.6 a JSON string that contains JSON

    async def _run_batch(self, batch: Batch, one: Deployment) -> None:
        """Run a batch as ``vllm run-batch`` in chunks (1.6, 8.6); not counted as tokens."""
        spec = self.spec.batch
        await asyncio.sleep(spec.pending_s)
        batch.status, batch.in_progress_at = "running", _time()
        dies = spec.dies_after_lines
        deaths = sum(other.status == "failed" for other in self.batches)
        if deaths >= spec.deaths:
            dies = None
        try:
            lines = await asyncio.to_thread(_read_lines, Path(batch.input_file))
            folder = Path(batch.output_folder_path or Path(batch.input_file).parent)
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            # 8.6 the names hold the start time, so that no later batch finds them; open: the names
            stem = f"{Path(batch.input_file).stem}_{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
            output, progress = folder / f"{stem}.results.jsonl", folder / f"{stem}.progress.json"
            for start in range(0, len(lines), spec.lines_per_chunk):
                await asyncio.sleep(spec.load_s)
                chunk = lines[start : start + spec.lines_per_chunk]
                written = await self._run_chunk(batch, one, chunk, dies)
                # 8.11 all output of a chunk is written at its end
                await asyncio.to_thread(_append, output, written)
                state = json.dumps({"lines_processed": batch.lines})
                await asyncio.to_thread(progress.write_text, state)
            batch.status, batch.completed_at = "completed", _time()
            batch.result = json.dumps(  # open: the keys
                {"results_file": str(output), "progress_file": str(progress)}
            )
        except (OSError, ValueError, KeyError, _BatchDeath) as error:
            batch.status, batch.failed_at, batch.result = "failed", _time(), str(error)
        batch.ended = self.now()

    async def _run_chunk(
        self, batch: Batch, one: Deployment, chunk: list[Json], dies: int | None
    ) -> list[str]:
        spec, written = self.spec.batch, list[str]()
        began, first = self.now(), batch.lines
        for line in chunk:
            if dies is not None and batch.lines >= dies:
                raise _BatchDeath(f"the job ended after {batch.lines} lines")
            custom_id, body = line["custom_id"], line["body"]
            batch.lines += 1
            draw = _share(self.spec.seed, batch.id, custom_id)
            if draw < spec.missing:  # 1.6 (d) lines can be missing
                continue
            batch.custom_ids += 1
            status, answer = 500, b'{"error": {"message": "failed", "type": "x", "code": 500}}'
            if draw >= spec.missing + spec.failed:
                status, answer = await self._ask_in_batch(one, body)
            written.append(_output_line(custom_id, status, answer))
            if spec.lines_per_s is not None:
                due = began + (batch.lines - first) / spec.lines_per_s
                await asyncio.sleep(max(0.0, due - self.now()))
            elif batch.lines % 100 == 0:
                await asyncio.sleep(0)
        return written

    async def _ask_in_batch(self, one: Deployment, body: Json) -> tuple[int, bytes]:
        if one.spec.upstreams:
            return await self._post_upstream(one, 0, "chat/completions", body)
        return one.answer({**body, "model": one.spec.model}, uuid.uuid4().hex)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _BatchDeath(Exception):  # noqa: N818 - an event
    """The job of a batch ends early."""


def _time() -> str:
    return datetime.now(UTC).isoformat()


def _share(*parts: object) -> float:
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _append(path: Path, lines: list[str]) -> None:
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def _output_line(custom_id: str, status: int, answer: bytes) -> str:
    """Return a line of OpenAI's batch output (1.6 b: ``vllm run-batch``)."""
    body, name = json.loads(answer), uuid.uuid4().hex
    failed = status != 200
    return json.dumps(
        {
            "id": f"vllm-{name}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req-{name}", "body": body},
            "error": body if failed else None,
        }
    )


def _stream(answer: bytes) -> web.Response:
    """Return an answer as a stream of one chunk."""
    body = json.loads(answer)
    for choice in body["choices"]:
        choice["delta"] = choice.pop("message", {})
    body["object"] = "chat.completion.chunk"
    text = f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n"
    return web.Response(text=text, content_type="text/event-stream")


def _stream_error(status: int, answer: bytes) -> web.Response:
    """Return an error in a stream of DirectAPI: HTTP 200 (1.5)."""
    content = f"\n\n[ERROR] Error: {wrap_upstream(status, answer).body['error']['message']}"
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": "stop"}
    chunk = {"id": "chatcmpl-api-error", "object": "chat.completion.chunk", "choices": [choice]}
    text = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    return web.Response(text=text, content_type="text/event-stream")


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway in a process of its own.

    Attributes:
        url: Its address, ending in ``/resource_server``.
        control: The address of its control plane.
    """

    url: str
    control: str

    async def stats(self) -> Json:
        """Return the counters; see `FirstGateway.stats`."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.control}/_standin/stats") as response,
        ):
            return await response.json()

    async def change(self, **changes: Json) -> None:
        """Change ``states``, ``tokens``, ``maintenance``, or add ``faults`` (``row``, ``path``)."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.control}/_standin/change", json=changes) as response,
        ):
            response.raise_for_status()


@asynccontextmanager
async def run_gateway_process(spec: GatewaySpec) -> AsyncIterator[GatewayProcess]:
    """Run the gateway in a process of its own, which ends with the block or with its parent."""
    command = (sys.executable, "-m", "fanfold.tests.support.first_gateway")
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(f"{spec.to_json()}\n".encode())
        await child.stdin.drain()
        url = (await child.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError(f"the gateway did not start; exit status {await child.wait()}")
        yield GatewayProcess(url, url.removesuffix(ROOT))
    finally:
        child.stdin.close()  # it ends when its input does
        with suppress(TimeoutError):
            async with asyncio.timeout(20):
                await child.wait()
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _main() -> None:
    spec = GatewaySpec.from_json(await asyncio.to_thread(sys.stdin.readline))
    async with FirstGateway(spec) as gateway:
        sys.stdout.write(f"{gateway.url}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


def make_spec(*deployments: DeploymentSpec, **changes: Any) -> GatewaySpec:
    """Return a gateway for tests: these deployments, and no limit on requests unless given."""
    spec = GatewaySpec(requests_per_s=1_000_000)
    return replace(spec, deployments=deployments or spec.deployments, **changes)


if __name__ == "__main__":
    asyncio.run(_main())
