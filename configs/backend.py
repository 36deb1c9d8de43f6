"""Sections backend and node, and what follows from the kind of backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from ..backends.core.errors import ConfigurationError
from ..backends.core.messages import MAX_MESSAGE_BYTES
from ..backends.core.templates import find_names, split_command
from .base import Access, Section, declare_access

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
}


def _check_command(value: str) -> str:
    try:
        split_command(value, ("workers",))
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return value


class ExchangeConfig(Section):
    """Where Academy's agents meet.

    Attributes:
        kind: ``http``, ``redis``, ``globus``, or ``local``: all agents in this one process.
        host: Host of a Redis; or the address of this machine on which to open an HTTP exchange.
        port: Port of a Redis.
        password: Password of a Redis, as ``${VAR}``.
        url: URL of an HTTP exchange; None opens one in this process, for the run.
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
        kind: ``local``: in this process, or in several of this machine; ``executor``: any
            ``concurrent.futures.Executor``; ``parsl``, ``globus_compute``, ``academy``;
            ``launched``: workers that one command starts.
        processes: (local) Worker processes; 1 is this process alone.
        factory: (executor) ``module:attr``, a function that makes the executor.
        config: (parsl) ``htex_local``; ``htex_job``, a worker per node of the batch job around
            this process; ``loaded`` for the DataFlowKernel that is loaded already; or
            ``module:attr``, a Parsl ``Config`` or a function that makes one.
        command: (launched, and htex_job) What starts a program on the nodes, e.g. ``mpiexec -n
            {workers} --ppn 1``; None takes FANFOLD_LAUNCHER, which job scripts set, and without
            it processes of this machine (launched).
        host: (launched, and htex_job) Name or address of this machine by which workers reach it;
            None takes FANFOLD_COORDINATOR_HOST, which job scripts set, and without it loopback.
        endpoints: (globus_compute) UUIDs of one or several endpoints.
        user_endpoint_config: (globus_compute) Values for the endpoint's template.
        function: (globus_compute) Id of the registered function, for endpoints that allow only
            some.
        client: (globus_compute) ``module:attr``, a function that makes the SDK's Client.
        exchange: (academy) Where the agents meet.
        slots: (academy) Shards that one agent works on at a time.
        executor: (academy) ``module:attr``, a function that makes the executor that agents run
            on; None runs them in processes of this machine.
        workers: (all but local) Workers that work on shards at a time, over all places.
        shared_folder: Whether workers reach the run folder; None takes what is usual for the
            kind: only globus_compute does not share it.
        node_endpoints: Whether each worker serves the endpoints of its own node.
        registry: Folder with a file per host, each an endpoints file, for ``node_endpoints``.
        attempts: Most orders for one shard.
        silence_s: Seconds without a sign of life until a worker counts as lost.
        deadline_s: Seconds that a worker may take for one shard.
        queue_s: Seconds that a shard may wait in an engine's queue, besides the time of the shard
            that its worker still works on.
        shard_least_s: Least seconds of work that a shard is sized for.
        shard_most_s: Most seconds of work that a shard is sized for.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed=(
            "kind processes factory config command host endpoints "
            "user_endpoint_config function client slots executor workers "
            "shared_folder node_endpoints registry attempts silence_s deadline_s "
            "queue_s shard_least_s shard_most_s"
        ),
    )

    kind: Literal["local", "executor", "parsl", "globus_compute", "academy", "launched"] = "local"
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
    workers: Annotated[int, Field(ge=1, le=100_000)] = 2
    shared_folder: bool | None = None
    node_endpoints: bool = False
    registry: str | None = None
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    silence_s: Annotated[float, Field(gt=0)] = 120.0
    deadline_s: Annotated[float, Field(gt=0)] = 7200.0
    queue_s: Annotated[float, Field(gt=0)] = 86400.0
    shard_least_s: Annotated[float, Field(gt=0)] = 120.0
    shard_most_s: Annotated[float, Field(gt=0)] = 600.0

    @property
    def is_remote(self) -> bool:
        """Return True if shards run outside this process."""
        return self.kind != "local" or self.processes > 1

    @property
    def starts_workers_on_nodes(self) -> bool:
        """Return True if the coordinator starts workers on the nodes of its own batch job."""
        return self.kind == "launched" or (self.kind == "parsl" and self.config == "htex_job")

    @property
    def concurrent_shards(self) -> int:
        """Return how many shards are worked on at the same time, over all workers."""
        if self.kind == "local":
            return self.processes
        return self.workers * (self.slots if self.kind == "academy" else 1)

    @property
    def message_bytes(self) -> int:
        """Return the largest size of a task, and of a result, in bytes."""
        small = self.kind == "academy" and self.exchange.kind in {"http", "globus"}
        return _SMALL_MESSAGE if small else MAX_MESSAGE_BYTES

    @property
    def workers_share_folder(self) -> bool:
        """Return True if workers reach the run folder."""
        if self.shared_folder is not None:
            return self.shared_folder
        return self.kind != "globus_compute"

    @model_validator(mode="after")
    def _of_its_kind(self) -> BackendConfig:
        defaults = type(self).model_fields
        for name in sorted(self.model_fields_set - _COMMON_KEYS - _KIND_KEYS[self.kind]):
            if getattr(self, name) != defaults[name].get_default(
                call_default_factory=True
            ):  # run.yaml holds every default
                kinds = " and ".join(kind for kind, own in _KIND_KEYS.items() if name in own)
                msg = f"the key {name!r} is for kind {kinds}, not for {self.kind}"
                raise ValueError(msg)
        if self.shard_least_s > self.shard_most_s:
            msg = "the key 'shard_least_s' is above 'shard_most_s'"
            raise ValueError(msg)
        if self.kind == "executor" and self.factory is None:
            msg = "kind executor needs the key 'factory': package.module:function"
            raise ValueError(msg)
        if self.kind == "globus_compute" and not self.endpoints:
            msg = "kind globus_compute needs the key 'endpoints': a list of endpoint UUIDs"
            raise ValueError(msg)
        return self


def find_unfit_keys(section: Mapping[str, Any], kind: str) -> dict[str, bool]:
    """Return the keys of a plain section that are for other kinds only.

    Args:
        section: The section.
        kind: The kind that it shall be of; for an unknown one no key is returned.

    Returns:
        Of each key, whether it says something else than what is so anyway.
    """
    if kind not in _KIND_KEYS:
        return {}
    usual = BackendConfig().model_dump(mode="json")
    unfit = [key for key in section if key in usual and key not in _COMMON_KEYS | _KIND_KEYS[kind]]
    return {key: section[key] != usual[key] for key in unfit}


COMMAND_FIELDS: Final = ("port", "model", "instance", "gpus")
"""What a command may name in braces."""

_MOST_PORT: Final = 65535


def _listed(value: object) -> object:
    """Return a list of texts: ids may be written ``0,1``, or as numbers."""
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
        msg = "holds a NUL character, which no variable can"
        raise ValueError(msg)
    return value


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableText = Annotated[str, AfterValidator(_check_no_nul)]
AcceleratorId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$")]


class AcceleratorsConfig(Section):
    """The accelerators of a node, divided among its servers.

    Attributes:
        variable: Variable by which a server is told its own; ``none`` tells nothing.
        count: How many a node has, numbered from 0.
        ids: Their names, where they are not numbered: ``0.0,0.1,1.0,1.1``. Without count and ids
            those count that the variable names where the servers are started.
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
    def _one_way(self) -> AcceleratorsConfig:
        if self.ids is not None and self.count is not None and len(self.ids) != self.count:
            msg = f"count says {self.count}, and ids names {len(self.ids)}; leave one of them out"
            raise ValueError(msg)
        if self.ids is not None and len(set(self.ids)) < len(self.ids):
            msg = "ids names one accelerator twice"
            raise ValueError(msg)
        return self

    @property
    def declared_count(self) -> int | None:
        """Return how many accelerators the settings tell of, or None."""
        return self.count if self.ids is None else len(self.ids)


class NodeConfig(Section):
    """The model servers of a node.

    Attributes:
        serve: Command that serves the model, run without a shell. In braces ``{port}``,
            ``{model}`` (model.name), ``{instance}`` (from 0) and ``{gpus}`` (how many accelerators
            this server has). None: fanfold starts no servers.
        instances: Servers on a node.
        ports: Port of the first; the others follow.
        address: By what other nodes reach this one; ``{host}`` is its name.
        env: Further variables of the servers; write secrets as ``${VAR}``.
        accelerators: The node's accelerators, divided among the servers.
        ready: Path that answers 200 when a server is ready.
        timeout_s: Seconds until a server must be ready.
        restarts: How often a server that was ready once is started again.
        linger_s: Seconds that servers which a worker started stay up without one.
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
    timeout_s: Annotated[float, Field(gt=0)] = 1200.0
    restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    linger_s: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _instances_fit(self) -> NodeConfig:
        if self.ports + self.instances - 1 > _MOST_PORT:
            msg = f"{self.instances} ports from {self.ports} go beyond {_MOST_PORT}"
            raise ValueError(msg)
        named = (
            {"port"}
            if self.serve is None
            else find_names(split_command(self.serve, COMMAND_FIELDS))
        )
        if self.instances > 1 and "port" not in named:
            msg = "several instances need {port} in serve, or they take each other's"
            raise ValueError(msg)
        told = self.accelerators.declared_count
        if told is not None and told % self.instances:
            msg = f"{told} accelerators cannot be divided among {self.instances} instances"
            raise ValueError(msg)
        return self
