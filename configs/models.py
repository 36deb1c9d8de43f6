"""The settings of a run, as pydantic models: one YAML file is one :class:`RunConfig`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from .backend import BackendConfig
from .reduce import ReduceStage
from .section import Section

RESERVED: Final = {
    "model": "set model.name",
    "messages": "set task.system and task.prompt",
    "temperature": "set model.temperature",
    "max_tokens": "set model.max_tokens",
    "max_completion_tokens": "set model.max_tokens",
    "seed": "set model.seed",
    "stream": "fanfold reads whole answers",
    "stream_options": "fanfold reads whole answers",
    "n": "fanfold reads one answer per request",
}
"""Fields of a request that ``model.extra_body`` must leave alone, and what to do instead."""


def _path(text: str) -> str:
    if not text or "\0" in text:
        msg = "is empty; name a file or a folder" if not text else "a path holds no NUL character"
        raise ValueError(msg)
    return text


PathText = Annotated[str, AfterValidator(_path)]


class InputConfig(Section):
    """Where the items come from.

    Attributes:
        path: A csv, tsv, jsonl, parquet or smi file, or a folder of .txt/.md files.
        dataset: A data set that fanfold can find by name, in place of a path.
        id: Column that names the items; None numbers the rows.
        limit: Take only the first so many items.
        on_duplicate: What to do with an id that comes twice.
        smiles: Column that RDKit checks before anything is paid.
    """

    path: PathText | None = None
    dataset: str | None = None
    id: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    on_duplicate: Literal["error", "first", "suffix"] = "error"
    smiles: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> InputConfig:
        if self.path is not None and self.dataset is not None:
            msg = "give either path or dataset, not both"
            raise ValueError(msg)
        return self


class TaskConfig(Section):
    """What is asked of each item.

    Attributes:
        system: Constant text, sent first so that prefix caches hit.
        prompt: Text with the item's columns in braces: ``"… {smiles} …"``.
        answer_schema: (key ``schema``) JSON Schema of the answer; None for free text.
        repairs: How often an answer that does not parse or validate is sent back.
        graph: ``package.module:attr``, a factory that is given the chat model and returns
            a Runnable to use in place of fanfold's own item graph.
    """

    system: str = ""
    prompt: Annotated[str, Field(min_length=1)]
    answer_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    repairs: Annotated[int, Field(ge=0, le=10)] = 1
    graph: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None


class ModelConfig(Section):
    """The model and how it is sampled.

    Attributes:
        name: The model's id; None takes the one model that the endpoints serve.
        temperature: Sampling temperature.
        max_tokens: Most tokens of one answer.
        seed: Sampling seed, or None.
        extra_body: Further fields of the request's body, as they are.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 256
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_rest(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value.keys() & RESERVED.keys():
            msg = f"{name!r} has no place here; {RESERVED[name]}"
            raise ValueError(msg)
        return value


class SimulatedConfig(Section):
    """A simulated fleet on loopback; its answers are marked and mean nothing.

    Attributes:
        nodes: Simulated servers.
        responder: Who makes the answers: ``schema`` (random but valid) or ``esol``.
        seed: Seed of answers, latencies and faults.
        max_num_seqs: Requests that one node runs at a time.
        ttft_s: Seconds to the first token of an idle node.
        tpot_s: Seconds per output token of an idle node.
        jitter: Width of the log-normal factor on all times; 0 is exact.
        time_scale: Divides all times.
        faults: Injected failures, as the simulated fleet's fault rules.
    """

    nodes: Annotated[int, Field(ge=1, le=10_000)] = 8
    responder: str = "schema"
    seed: int = 0
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    ttft_s: Annotated[float, Field(ge=0)] | None = None
    tpot_s: Annotated[float, Field(ge=0)] | None = None
    jitter: Annotated[float, Field(ge=0)] | None = None
    time_scale: Annotated[float, Field(gt=0)] | None = None
    faults: list[dict[str, Any]] = Field(default_factory=list)


class EndpointsConfig(Section):
    """Where the model is served: exactly one of ``urls``, ``file`` and ``simulated``.

    Attributes:
        urls: Base URLs, e.g. ``http://node17:8000/v1``.
        file: An endpoints file (Aegis or Aurora-Swarm format, or one URL a line).
        simulated: A simulated fleet.
        api_key: Key of the endpoints; write it as ``${VAR}``.
    """

    urls: list[str] | None = None
    file: PathText | None = None
    simulated: SimulatedConfig | None = None
    api_key: SecretStr = SecretStr("EMPTY")

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        key = value.get_secret_value()
        if not key:
            msg = "is empty; leave it out for servers that take no key"
            raise ValueError(msg)
        if not key.isascii() or not key.isprintable() or key != key.strip():
            msg = "holds blanks at an end, a line break or other characters that no key has"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> EndpointsConfig:
        given = [k for k in ("urls", "file", "simulated") if getattr(self, k) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            msg = f"give exactly one of urls, file and simulated (found {found})"
            raise ValueError(msg)
        return self


class LimitsConfig(Section):
    """How hard the fleet is driven.

    Attributes:
        streams: Most items in flight.
        attempts: Most requests for one call, the first included.
        request_timeout_s: Seconds after which a request counts as lost.
        drain_s: Seconds that a stop waits for items in flight.
        fleet_wait_s: Seconds to wait for an endpoint when none is alive.
        hedge: Whether the slowest requests of a run's end are sent a second time.
    """

    streams: Annotated[int, Field(ge=1, le=100_000)] = 256
    attempts: Annotated[int, Field(ge=1, le=100)] = 4
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    fleet_wait_s: Annotated[float, Field(ge=0)] = 60.0
    hedge: bool = True


class ShardConfig(Section):
    """How items are grouped.

    Attributes:
        items: Items per shard; None chooses from input size and streams; 1 makes every item
            a Send of its own, run by LangGraph's engine.
    """

    items: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class LedgerConfig(Section):
    """How the journal is written.

    Attributes:
        fsync_s: Seconds between flushes to disk: what a power loss can cost, and no other end.
    """

    fsync_s: Annotated[float, Field(gt=0, le=60)] = 0.05


class RunConfig(Section):
    """Everything that describes a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "run"
    input: InputConfig = InputConfig()
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    endpoints: EndpointsConfig
    backend: BackendConfig = BackendConfig()
    limits: LimitsConfig = LimitsConfig()
    shard: ShardConfig = ShardConfig()
    ledger: LedgerConfig = LedgerConfig()
    reduce: list[ReduceStage] = Field(default_factory=list)
