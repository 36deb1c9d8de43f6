"""What a node serves: the settings of the model servers that fanfold starts itself."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..backends.core.errors import ConfigurationError
from ..backends.core.templates import names_of, split_command
from .base import Access, Section, declare

NAMES: Final = ("port", "model", "instance", "gpus")
"""What a command may name in braces."""

_MOST_PORT: Final = 65535


def _listed(value: object) -> object:
    """Return a list of texts: ids may be written ``0,1``, or as numbers."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        return [str(v) if isinstance(v, int | float) and v is not True else v for v in value]
    return value


def _command(value: str) -> str:
    try:
        split_command(value, NAMES)
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return value


def _no_zero(value: str) -> str:
    if "\0" in value:
        msg = "holds a NUL character, which no variable can"
        raise ValueError(msg)
    return value


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableText = Annotated[str, AfterValidator(_no_zero)]
AcceleratorId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$")]


class AcceleratorsConfig(Section):
    """The accelerators of a node, divided among its servers.

    Attributes:
        variable: Variable by which a server is told its own; ``none`` tells nothing.
        count: How many a node has, numbered from 0.
        ids: Their names, where they are not numbered: ``0.0,0.1,1.0,1.1``. Without count and ids
            those count that the variable names where the servers are started.
    """

    access: ClassVar[dict[str, Access]] = declare(
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
    def told(self) -> int | None:
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

    access: ClassVar[dict[str, Access]] = declare(
        closed="serve instances ports address env ready timeout_s restarts linger_s",
    )

    serve: Annotated[str, AfterValidator(_command)] | None = None
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
        named = {"port"} if self.serve is None else names_of(split_command(self.serve, NAMES))
        if self.instances > 1 and "port" not in named:
            msg = "several instances need {port} in serve, or they take each other's"
            raise ValueError(msg)
        told = self.accelerators.told
        if told is not None and told % self.instances:
            msg = f"{told} accelerators cannot be divided among {self.instances} instances"
            raise ValueError(msg)
        return self
