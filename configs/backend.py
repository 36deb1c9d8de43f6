"""Sections backend and node, and what follows from the kind of backend."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from ..backends.core.errors import ConfigurationError
from ..backends.core.messages import MAX_MESSAGE_BYTES
from ..backends.core.templates import find_names, split_command
from .base import Access, Duration, PathText, PositiveDuration, Section, declare_access

_ATTRIBUTE: Final = r"^[\w.]+:[\w.]+$"
_SMALL_MESSAGE: Final = 400_000
"""Academy's HTTP exchanges carry 512 kB, of which the envelope takes some."""
_COMMON_KEYS: Final = {
    "kind",
    "shared_folder",
    "node_endpoints",
    "registry",
    "attempts",
    "silence_s",
    "deadline_s",
    "queue_s",
    "shard_least_s",
    "shard_most_s",
}
_KIND_KEYS: Final[dict[str, set[str]]] = {
    "local": {"processes"},
    "executor": {"factory", "workers"},
    "parsl": {"config", "command", "host", "workers"},
    "launched": {"command", "host", "workers"},
    "globus_compute": {"endpoints", "user_endpoint_config", "function", "client", "workers"},
    "academy": {"exchange", "workers", "slots", "executor"},
    "batch": {
        "service",
        "dir",
        "lines",
        "active",
        "leftovers",
        "poll_s",
        "poll_most_s",
        "gather_s",
    },
}


def _check_command(value: str) -> str:
    try:
        split_command(value, ("workers",))
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return value


def _check_absolute(value: str) -> str:
    if not value.startswith("/"):
        msg = f"{value!r} is relative; the service needs the absolute path"
        raise ValueError(msg)
    return value


BackendKind: TypeAlias = Literal[
    "local", "executor", "parsl", "globus_compute", "academy", "launched", "batch"
]


class ExchangeConfig(Section):
    """The exchange through which Academy's agents communicate.

    Attributes:
        kind: ``http``, ``redis``, ``globus``, or ``local``: all agents in this one process.
        host: Host of a Redis; or the address of this machine at which an HTTP exchange is opened.
        port: Port of a Redis.
        password: Password of a Redis, as ``${VAR}``.
        url: URL of an HTTP exchange; None opens one in this process for the run.
        project: (globus) UUID of the Globus project for the agents' clients.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="kind host port password url project",
    )

    kind: Literal["local", "redis", "http", "globus"] = "http"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 6379
    password: SecretStr | None = None
    url: str | None = None
    project: str | None = None


class BackendConfig(Section):
    """Where shards run.

    Attributes:
        kind: ``local``: in this process, or in several on this machine; ``executor``: any
            ``concurrent.futures.Executor``; ``parsl``, ``globus_compute``, ``academy``;
            ``launched``: workers that one command starts; ``batch``: items run in this process,
            and their requests are files that a batch service answers.
        processes: (local) Number of worker processes; 1 uses only this process.
        factory: (executor) ``module:attr``, a function that returns the executor.
        config: (parsl) ``htex_local``; ``htex_job``, a worker per node of the batch job in which
            this process runs; ``loaded`` for the DataFlowKernel that is already loaded; or
            ``module:attr``, a Parsl ``Config`` or a function that returns one.
        command: (launched, and htex_job) Command that starts a program on the nodes, e.g.
            ``mpiexec -n {workers} --ppn 1``. None takes FANFOLD_LAUNCHER, which job scripts set;
            without that, processes on this machine (launched).
        host: (launched, and htex_job) Name or address of this machine for the workers; None
            takes FANFOLD_COORDINATOR_HOST, which job scripts set; without that, loopback.
        endpoints: (globus_compute) UUIDs of one or several endpoints.
        user_endpoint_config: (globus_compute) Values for the endpoint's template.
        function: (globus_compute) Id of the registered function, for endpoints that allow only
            some.
        client: (globus_compute) ``module:attr``, a function that returns the SDK's Client.
        exchange: (academy) The exchange of the agents.
        slots: (academy) Number of shards that one agent runs at a time.
        executor: (academy) ``module:attr``, a function that returns the executor for the agents;
            None runs them in processes on this machine.
        service: (batch) ``first``: batch mode of the FIRST gateway of the section endpoints.
        dir: (batch) Folder for requests and answers on the cluster's file system; the service and
            this process read and write it under the same path.
        lines: (batch) Maximum requests in a file; choose what one job of the service finishes.
        active: (batch) Number of files that the service has at a time.
        leftovers: (batch) What answers requests that two batches did not: ``interactive``, requests
            one by one; or ``batch``, further batches, up to ``limits.attempts``.
        poll_s: (batch) Seconds between two questions for the state of a batch, at first.
        poll_most_s: (batch) Maximum seconds between two such questions.
        gather_s: (batch) Seconds without a further request after which a file is submitted that
            has fewer than ``lines``.
        workers: (all but local and batch) Number of shards that run at a time, over all backends.
        shared_folder: Whether workers reach the run folder; None takes the default of the kind:
            only globus_compute does not share it.
        node_endpoints: Whether each worker uses only the endpoints of its own node.
        registry: Folder with an endpoints file per host, for ``node_endpoints``.
        attempts: Maximum number of tasks for one shard.
        silence_s: Seconds without a heartbeat until a worker counts as lost.
        deadline_s: Maximum seconds of a worker for one shard.
        queue_s: Maximum seconds of a shard in an engine's queue, in addition to the time of the
            shard that its worker is running.
        shard_least_s: Minimum seconds of work in a shard.
        shard_most_s: Maximum seconds of work in a shard.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed=(
            "kind processes factory config command host endpoints "
            "user_endpoint_config function client slots executor workers "
            "service dir lines active leftovers poll_s poll_most_s gather_s "
            "shared_folder node_endpoints registry attempts silence_s deadline_s "
            "queue_s shard_least_s shard_most_s"
        ),
    )

    kind: BackendKind = "local"
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    factory: Annotated[str, Field(pattern=_ATTRIBUTE)] | None = None
    config: Annotated[str, Field(pattern=r"^(htex_local|htex_job|loaded|[\w.]+:[\w.]+)$")] = (
        "htex_local"
    )
    command: Annotated[str, AfterValidator(_check_command)] | None = None
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:%-]+$")] | None = None
    endpoints: list[str] = Field(default_factory=list)
    user_endpoint_config: dict[str, Any] | None = None
    function: str | None = None
    client: Annotated[str, Field(pattern=_ATTRIBUTE)] | None = None
    exchange: ExchangeConfig = ExchangeConfig()
    slots: Annotated[int, Field(ge=1, le=64)] = 1
    executor: Annotated[str, Field(pattern=_ATTRIBUTE)] | None = None
    service: Literal["first"] = "first"
    dir: Annotated[PathText, AfterValidator(_check_absolute)] | None = None
    lines: Annotated[int, Field(ge=1, le=150_000)] = 20_000
    active: Annotated[int, Field(ge=1, le=100)] = 1
    leftovers: Literal["interactive", "batch"] = "interactive"
    poll_s: PositiveDuration = 30.0
    poll_most_s: PositiveDuration = 300.0
    gather_s: PositiveDuration = 5.0
    workers: Annotated[int, Field(ge=1, le=100_000)] = 2
    shared_folder: bool | None = None
    node_endpoints: bool = False
    registry: str | None = None
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    silence_s: PositiveDuration = 120.0
    deadline_s: PositiveDuration = 7200.0
    queue_s: PositiveDuration = 86400.0
    shard_least_s: PositiveDuration = 120.0
    shard_most_s: PositiveDuration = 600.0

    @property
    def is_remote(self) -> bool:
        """Return True if shards run outside this process."""
        return self.kind not in {"local", "batch"} or self.processes > 1

    @property
    def is_batch(self) -> bool:
        """Return True if requests are answered by batches."""
        return self.kind == "batch"

    @property
    def starts_workers_on_nodes(self) -> bool:
        """Return True if the coordinator starts workers on the nodes of its own batch job."""
        return self.kind == "launched" or (self.kind == "parsl" and self.config == "htex_job")

    @property
    def concurrent_shards(self) -> int:
        """Return how many shards are worked on at the same time, over all workers."""
        if not self.is_remote:
            return 1
        if self.kind == "local":
            return self.processes
        return self.workers * (self.slots if self.kind == "academy" else 1)

    @property
    def message_bytes(self) -> int:
        """Return the largest size of a task, and of a result, in bytes."""
        small = self.kind == "academy" and self.exchange.kind in {"http", "globus"}
        return _SMALL_MESSAGE if small else MAX_MESSAGE_BYTES

    def receiving_hosts(self) -> Iterator[tuple[str, str]]:
        """Yield the hosts that a run sends data to because of the backend, each with its role."""
        if self.kind == "globus_compute":
            yield "compute.api.globus.org", "Globus Compute, carries shards and their items"
            yield "auth.globus.org", "Globus, login"
        elif self.kind == "academy":
            exchange, carries = self.exchange, "carries shards and their items"
            if exchange.kind == "globus":
                yield "exchange.academy-agents.org", f"Academy's exchange, {carries}"
            elif exchange.kind != "local":
                host = urlsplit(exchange.url).hostname if exchange.url else exchange.host
                yield host or str(exchange.url), f"Academy's {exchange.kind} exchange, {carries}"
        elif self.kind == "launched" and self.host:
            yield self.host, "this machine, to which launched workers connect"

    @property
    def workers_share_folder(self) -> bool:
        """Return True if workers reach the run folder."""
        if self.shared_folder is not None:
            return self.shared_folder
        return self.kind != "globus_compute"

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        defaults = type(self).model_fields
        for name in sorted(self.model_fields_set - _COMMON_KEYS - _KIND_KEYS[self.kind]):
            if getattr(self, name) != defaults[name].get_default(
                call_default_factory=True
            ):  # run.yaml contains all defaults
                kinds = " and ".join(kind for kind, own in _KIND_KEYS.items() if name in own)
                msg = f"the key {name!r} is for kind {kinds}, not for {self.kind}"
                raise ValueError(msg)
        if self.shard_least_s > self.shard_most_s:
            msg = "the key 'shard_least_s' is above 'shard_most_s'"
            raise ValueError(msg)
        if self.poll_s > self.poll_most_s:
            msg = "the key 'poll_s' is above 'poll_most_s'"
            raise ValueError(msg)
        if self.is_batch and self.dir is None:
            msg = (
                "kind batch needs the key 'dir': a folder on the cluster's file system that the "
                "service and this process both use"
            )
            raise ValueError(msg)
        if self.kind == "executor" and self.factory is None:
            msg = "kind executor needs the key 'factory': package.module:function"
            raise ValueError(msg)
        if self.kind == "globus_compute" and not self.endpoints:
            msg = "kind globus_compute needs the key 'endpoints': a list of endpoint UUIDs"
            raise ValueError(msg)
        return self


def find_unfit_keys(section: Mapping[str, Any], kind: str) -> dict[str, bool]:
    """Return the keys of a plain section that only apply to other kinds.

    Args:
        section: The section.
        kind: The new kind of the section; for an unknown one no key is returned.

    Returns:
        For each key, whether its value differs from the default.
    """
    if kind not in _KIND_KEYS:
        return {}
    defaults = BackendConfig().model_dump(mode="json")
    kept = _COMMON_KEYS | _KIND_KEYS[kind]
    return {k: section[k] != defaults[k] for k in section if k in defaults and k not in kept}


COMMAND_FIELDS: Final = ("port", "model", "instance", "gpus")
"""Names that a command may contain in braces."""

_MOST_PORT: Final = 65535


def _listed(value: object) -> object:
    """Return a list of texts; ids may be written as ``0,1`` or as numbers."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        return [str(v) if isinstance(v, int | float) and v is not True else v for v in value]
    return value


def _check_server_command(value: str) -> str:
    try:
        split_command(value, COMMAND_FIELDS)
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return value


def _check_no_nul(value: str) -> str:
    if "\0" in value:
        msg = "contains a NUL character, which variables cannot contain"
        raise ValueError(msg)
    return value


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableText = Annotated[str, AfterValidator(_check_no_nul)]
AcceleratorId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$")]


class AcceleratorsConfig(Section):
    """The accelerators of a node, divided among its servers.

    Attributes:
        variable: Environment variable that names a server's accelerators; ``none`` sets nothing.
        count: Number of accelerators of a node, numbered from 0.
        ids: Their names, if they are not numbered: ``0.0,0.1,1.0,1.1``. Without count and ids
            fanfold takes them from the variable on the node.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="variable count ids",
    )

    variable: Literal[
        "none", "ZE_AFFINITY_MASK", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
    ] = "none"
    count: Annotated[int, Field(ge=1, le=1024)] | None = None
    ids: (
        Annotated[
            list[AcceleratorId], BeforeValidator(_listed), Field(min_length=1, max_length=1024)
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.ids is not None and self.count is not None and len(self.ids) != self.count:
            msg = (
                f"count is {self.count}, but ids has {len(self.ids)} entries; leave one of them out"
            )
            raise ValueError(msg)
        if self.ids is not None and len(set(self.ids)) < len(self.ids):
            msg = "ids contains an accelerator twice"
            raise ValueError(msg)
        return self

    @property
    def declared_count(self) -> int | None:
        """Return the number of accelerators in the settings, or None."""
        return self.count if self.ids is None else len(self.ids)


class NodeConfig(Section):
    """The model servers of a node.

    Attributes:
        serve: Command that serves the model, run without a shell. It may contain ``{port}``,
            ``{model}`` (model.name), ``{instance}`` (from 0) and ``{gpus}`` (the number of
            accelerators of this server). None: fanfold starts no servers.
        instances: Number of servers on a node.
        ports: Port of the first server; the others follow.
        address: Address of this node for other nodes, e.g. ``{host}.hsn.cm.example``. ``{host}`` is
            ``FANFOLD_HOST`` on the node, else ``SLURMD_NODENAME``, else the name of the node.
        env: Environment variables of the servers; write secrets as ``${VAR}``.
        accelerators: The node's accelerators, divided among the servers.
        ready: Path that answers 200 when a server is ready.
        timeout_s: Seconds until a server must be ready.
        restarts: How often a server that was once ready is restarted.
        linger_s: Seconds for which servers that a worker started keep running without one.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="serve instances ports address env ready timeout_s restarts linger_s",
    )

    serve: Annotated[str, AfterValidator(_check_server_command)] | None = None
    instances: Annotated[int, Field(ge=1, le=1024)] = 1
    ports: Annotated[int, Field(ge=1, le=_MOST_PORT)] = 8000
    address: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.:-]|\{host\})+$")] = "{host}"
    env: dict[VariableName, VariableText] = Field(default_factory=dict)
    accelerators: AcceleratorsConfig = AcceleratorsConfig()
    ready: Annotated[str, Field(pattern=r"^/[!-~]*$")] = "/health"
    timeout_s: PositiveDuration = 1200.0
    restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    linger_s: Duration = 60.0

    @model_validator(mode="after")
    def _instances_fit(self) -> Self:
        if self.ports + self.instances - 1 > _MOST_PORT:
            msg = f"{self.instances} ports from {self.ports} go beyond {_MOST_PORT}"
            raise ValueError(msg)
        named = (
            {"port"}
            if self.serve is None
            else find_names(split_command(self.serve, COMMAND_FIELDS))
        )
        if self.instances > 1 and "port" not in named:
            msg = "several instances need {port} in serve; without it they use the same port"
            raise ValueError(msg)
        count = self.accelerators.declared_count
        if count is not None and count % self.instances:
            msg = f"{count} accelerators cannot be divided among {self.instances} instances"
            raise ValueError(msg)
        return self
