"""Section ``endpoints``: settings of every kind of endpoints."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from .base import Access, Duration, PathText, PositiveDuration, Section, declare_access

ENDPOINT_KINDS: Final = ("urls", "file", "aegis_registry", "hosts", "first", "simulated", "auto")
"""The kinds of endpoints; a configuration has exactly one."""

HOSTS_ONLY_KEYS: Final = ("port", "per_host", "suffix")
"""Keys that require ``hosts``."""

AEGIS_FILE: Final = "aegis_endpoints.txt"
AEGIS_REGISTRY_FILE: Final = "aegis_registry_url.txt"
"""Aegis writes this file when its job starts, and the endpoints when all servers are up."""

FIRST_REFUSED_FIELDS: Final = re.compile(
    r"cache_salt|api_port|openai_endpoint|stream_task_.*|streaming_server_.*"
)
"""Top-level fields of a request that a FIRST gateway refuses."""

FIRST_URL: Final = "https://inference-api.alcf.anl.gov/resource_server"
"""ALCF's deployment of the FIRST gateway."""


def explain_refused_fields(names: Iterable[str]) -> str | None:
    """Return why a FIRST gateway refuses requests with such top-level fields; None: it does not."""
    refused = [name for name in names if FIRST_REFUSED_FIELDS.fullmatch(name)]
    if not refused:
        return None
    return (
        f"a FIRST gateway refuses requests with {', '.join(refused)}, because it sets such fields "
        "itself; remove them"
    )


def _header(value: SecretStr) -> SecretStr:
    key = value.get_secret_value()
    if not key:
        msg = "is empty; leave it out for servers that require no key"
        raise ValueError(msg)
    if not key.isascii() or not key.isprintable() or key != key.strip():
        msg = "contains blanks at an end, a line break or other characters that no key has"
        raise ValueError(msg)
    return value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Secret = Annotated[SecretStr, AfterValidator(_header)]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(min_length=1)
]
"""One text or a list of them."""


class SimulatedConfig(Section):
    """A simulated fleet on loopback; its answers are marked and mean nothing.

    Attributes:
        nodes: Number of simulated servers.
        responder: How answers are made: ``schema`` (random but valid), ``labels`` (the same truth
            for all models, and errors of each model's own), ``esol``, or ``agent`` (calls each tool
            once, then as ``schema``).
        accuracy: Share of right answers of ``labels``; probability that ``esol`` knows a molecule.
        seed: Seed of answers, latencies and faults.
        max_num_seqs: Number of requests that one node runs at a time.
        ttft_s: Seconds to the first token of an idle node.
        tpot_s: Seconds per output token of an idle node.
        jitter: Width of the log-normal factor on all times; 0 is exact.
        time_scale: Divides all times.
        faults: Injected failures, as the simulated fleet's fault rules.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="nodes responder accuracy seed max_num_seqs ttft_s tpot_s jitter time_scale faults",
    )

    nodes: Annotated[int, Field(ge=1, le=10_000)] = 8
    responder: str = "schema"
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int = 0
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    ttft_s: Duration | None = None
    tpot_s: Duration | None = None
    jitter: Annotated[float, Field(ge=0)] | None = None
    time_scale: Annotated[float, Field(gt=0)] | None = None
    faults: list[dict[str, Any]] = Field(default_factory=list)


class FirstConfig(Section):
    """A FIRST gateway: one address for the models of several clusters.

    Attributes:
        base_url: Its address, without the names of the clusters; None: the variable
            ``inference_base_url``, else ALCF's gateway.
        paths: ``cluster/framework`` of each deployment to use, e.g. ``sophia/vllm``; None: all that
            serve the model.
        token: Access token; write it as ``${VAR}``. Without it and ``token_command``: that of
            ``alcf-tokens login``, else the variable ``FIRST_API_KEY``.
        token_command: Command that prints the token, run without a shell, each hour, and once more
            if the gateway refuses the token.
        requests_per_s: Maximum requests per second over all paths; the gateway allows 10 per user.
        tokens_per_min: Maximum tokens of a model per window; None: as the gateway reports, else
            its default for a user.
        window_s: Length in seconds of the gateway's windows.
        sessions: Number of sessions of a run; the gateway assigns each one to a replica.
        poll_s: Seconds between two reads of the gateway's list of jobs; it caches the list for 60.
        start_wait_s: Maximum seconds to wait for a model that does not run.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed=(
            "base_url paths token token_command requests_per_s tokens_per_min window_s sessions "
            "poll_s start_wait_s"
        ),
    )

    base_url: Annotated[str, Field(min_length=1)] | None = None
    paths: Texts | None = None
    token: Secret | None = None
    token_command: Annotated[str, Field(min_length=1)] | None = None
    requests_per_s: Annotated[float, Field(gt=0)] = 8.0
    tokens_per_min: Annotated[float, Field(gt=0)] | None = None
    window_s: Annotated[float, Field(gt=0)] = 60.0
    sessions: Annotated[int, Field(ge=1, le=1024)] = 1
    poll_s: PositiveDuration = 60.0
    start_wait_s: Duration = 7200.0

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token is not None and self.token_command is not None:
            msg = "give token (as ${VAR}) or token_command, not both"
            raise ValueError(msg)
        return self


class EndpointsConfig(Section):
    """Where the model is served: exactly one of the kinds, and its settings.

    Attributes:
        urls: Base URLs, with or without ``/v1``, which is appended to a path without a version
            (``/v1beta/openai`` has one). ``/chat/completions`` at the end is dropped, with a
            warning.
        file: An endpoints file (Aegis or Aurora-Swarm format, or one URL a line), the folder that
            Aegis writes to, or a folder with such a file per host; read again when they change.
        aegis_registry: URL of Aegis' registry, e.g. ``http://head:8471``, polled repeatedly.
        hosts: Host names, a Slurm list, the path of a file, or a variable (``$PBS_NODEFILE``) that
            contains one of these.
        port: (hosts) Port of a host's first server; None: 8000.
        per_host: (hosts) Number of servers on each host, on consecutive ports; None: 1.
        suffix: (hosts) Domain to append to short host names.
        first: A FIRST gateway; ``{}`` is enough if ``model.name`` is set.
        simulated: A simulated fleet.
        auto: Whether fanfold finds the endpoints, and logs its choice; ``endpoints: auto`` does the
            same.
        api_key: Key of the endpoints; write it as ``${VAR}``. It is not sent to endpoints from
            files that others can write.
        models: Served id to ``model.name``, for servers that use another name for the model.
        refresh_s: Seconds between two reads of a file or a registry.
        least: Number of endpoints that must be ready before the first call.
        wait_s: Maximum seconds to wait for them, after which the run ends with exit code 5; 0 does
            not wait. With ``node_endpoints`` each worker waits for its own node instead.
        proxy: Whether to use ``http_proxy``, ``https_proxy`` and ``no_proxy``; None: for ``first``
            only, never for nodes.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed=(
            "urls file aegis_registry hosts port per_host suffix auto api_key models "
            "refresh_s least wait_s proxy"
        ),
    )

    urls: list[str] | None = None
    file: PathText | None = None
    aegis_registry: Annotated[str, Field(min_length=1)] | None = None
    hosts: Texts | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    per_host: Annotated[int, Field(ge=1, le=1024)] | None = None
    suffix: str | None = None
    first: FirstConfig | None = None
    simulated: SimulatedConfig | None = None
    auto: bool | None = None
    api_key: Secret = SecretStr("EMPTY")
    models: dict[str, str] = Field(default_factory=dict)
    refresh_s: PositiveDuration = 5.0
    least: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    wait_s: Duration = 0.0
    proxy: bool | None = None

    @property
    def needs_probe(self) -> bool:
        """Return True if only a probe can tell which endpoints serve the model."""
        named_otherwise = bool(self.models) or self.first is not None
        return bool(self.auto) or self.aegis_registry is not None or named_otherwise

    @property
    def waits_for_endpoints(self) -> bool:
        """Return True if a run may start before its endpoints are ready."""
        return self.least > 1 or self.wait_s > 0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [k for k in ENDPOINT_KINDS if getattr(self, k) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            *others, last = ENDPOINT_KINDS
            msg = f"give exactly one of {', '.join(others)} and {last} (found {found})"
            raise ValueError(msg)
        unfit = [k for k in HOSTS_ONLY_KEYS if getattr(self, k) is not None]
        if unfit and self.hosts is None:
            msg = f"{' and '.join(unfit)} goes with hosts, not with {given[0]}"
            raise ValueError(msg)
        return self
