"""RunConfig and its sections, including budget and price."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..backends.core.samples import FoldKind, SampleFold
from ..backends.core.templates import ItemPrompt
from ..backends.core.types import PART_COLUMN
from .aggregators import AgreementConfig, AnyAggregatorConfig, list_aggregator_specs
from .backend import BackendConfig, NodeConfig
from .base import Access, Duration, PathText, PositiveDuration, Section, declare_access
from .budget import BudgetConfig
from .endpoints import EndpointsConfig, explain_refused_fields
from .evaluation import EvaluationConfig
from .stages import STAGED_PROMPT, StageConfig, check_stages

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?")


class PriceConfig(Section):
    """Prices in US dollars.

    Attributes:
        prompt: Per million prompt tokens.
        cached_prompt: Per million prompt tokens from a prefix cache; None: the price of prompt.
        completion: Per million completion tokens.
        node_hour: Per node and hour, for nodes that are paid by time.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="prompt cached_prompt completion node_hour",
    )

    prompt: Annotated[float, Field(ge=0)] | None = None
    cached_prompt: Annotated[float, Field(ge=0)] | None = None
    completion: Annotated[float, Field(ge=0)] | None = None
    node_hour: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            msg = "give the prices of both prompt and completion, in dollars per million tokens"
            raise ValueError(msg)
        if self.prompt is None and self.node_hour is None:
            msg = "give prompt and completion, or node_hour"
            raise ValueError(msg)
        if self.cached_prompt is not None and self.prompt is None:
            msg = "cached_prompt needs prompt and completion beside it"
            raise ValueError(msg)
        return self


RESERVED: Final = {
    "model": "set model.name",
    "messages": "set task.system and task.prompt, or task.messages",
    "temperature": "set model.temperature",
    "max_tokens": "set model.max_tokens",
    "max_completion_tokens": "set model.max_tokens",
    "seed": "set model.seed",
    "stream": "fanfold reads whole answers",
    "stream_options": "fanfold reads whole answers",
    "n": "fanfold reads one answer per request",
}
"""Fields of a request that ``model.extra_body`` must not set, and what to do instead."""


SAMPLING_FIELDS: Final = frozenset(
    {
        "frequency_penalty",
        "length_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "top_k",
        "top_p",
    }
)
"""Fields that only choose how the model samples; a request may set them in
``model.extra_body``."""


BATCH_PROMPT: Final = "{body}"
"""``task.prompt`` of a batch in OpenAI's format; its text counts in estimates and digests."""


class SplitConfig(Section):
    """Long texts as parts, each of which is an item.

    Attributes:
        tokens: Most tokens of a part, by an estimate that tends to be too high.
        overlap: Tokens of the end of a part that the next one repeats.
        column: Column with the text.
        merge: Adds a stage ``documents`` that puts the answers about the parts of a document
            together: ``concat``, ``vote`` or ``summarize``; None leaves the parts as they are.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="tokens overlap column merge")

    tokens: Annotated[int, Field(ge=20, le=10_000_000)] = 3000
    overlap: Annotated[int, Field(ge=0)] = 200
    column: Annotated[str, Field(min_length=1)] = "text"
    merge: Literal["concat", "vote", "summarize"] | None = None

    @model_validator(mode="after")
    def _parts_advance(self) -> Self:
        if 2 * self.overlap >= self.tokens:
            msg = (
                f"overlap ({self.overlap:,}) must be less than half of tokens ({self.tokens:,}), "
                "because each part repeats it"
            )
            raise ValueError(msg)
        if self.column == PART_COLUMN:
            raise ValueError(f"column: {PART_COLUMN!r} is the column that says which part it is")
        return self


class InputConfig(Section):
    """Where the items come from.

    Attributes:
        path: A csv, tsv, smi, jsonl, json (an array of objects) or parquet file; a folder or a
            pattern (``parts/*.csv``) of such files of one kind, of .txt and .md files, or of .pdf
            files (extra ``pdf``). All tables but parquet may be packed (``.csv.gz``). An array in a
            json file is read as a whole: prefer jsonl above some 100 MB.
        dataset: Instead of a path, a data set that fanfold provides: ``rdkit-nci5k``,
            ``molecules``, ``abstracts``, ``topics``, ``records`` or ``tables``.
        id: Column with the ids of the items; None: row numbers, or file names for a folder of
            texts.
        limit: Number of items to take from the beginning.
        on_duplicate: What to do with an id that occurs twice: ``error``; ``first`` keeps the first
            item; ``suffix`` renames the others, to ``x#2``.
        format: What a row is: ``auto``, columns for the prompt; or ``openai_batch``, a request in
            OpenAI's batch format, which is sent as it is.
        smiles: Column with SMILES; items that RDKit cannot parse fail without a call.
        quotes: Whether quotes enclose cells; ``auto``: in csv files, while in tsv files they are
            text.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        path="path",
        lower="limit",
        closed="dataset format id on_duplicate smiles quotes",
    )

    path: PathText | None = None
    dataset: str | None = None
    format: Literal["auto", "openai_batch"] = "auto"
    id: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    on_duplicate: Literal["error", "first", "suffix"] = "error"
    smiles: str | None = None
    quotes: Literal["auto"] | bool = "auto"
    split: SplitConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.dataset is not None:
            msg = "give either path or dataset, not both"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _batch_names_its_items(self) -> Self:
        if self.is_batch and (self.id, self.smiles, self.dataset) != (None, None, None):
            msg = "format openai_batch: custom_id names the items; leave out id, smiles and dataset"
            raise ValueError(msg)
        if self.is_batch and self.split is not None:
            raise ValueError("format openai_batch: requests are sent as they are; leave out split")
        if self.is_batch and self.on_duplicate != "error":
            msg = "format openai_batch: each custom_id must be unique; leave out on_duplicate"
            raise ValueError(msg)
        return self

    @property
    def is_batch(self) -> bool:
        """Return True if rows are requests in OpenAI's batch format."""
        return self.format == "openai_batch"


class BatchConfig(Section):
    """Output in OpenAI's batch format, for ``input.format: openai_batch``.

    Attributes:
        output: File to which a line is added for each item that ends; None writes none.
        errors: File for the lines of failed items; None puts them into ``output``.
        allowed_media_domains: Hosts from which the process of a request fetches the audio that the
            request names by an http URL (``file_url``); data URLs need none.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="output errors allowed_media_domains"
    )

    output: PathText | None = None
    errors: PathText | None = None
    allowed_media_domains: list[str] = Field(default_factory=list)

    @field_validator("allowed_media_domains")
    @classmethod
    def _hosts_alone(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _HOST.fullmatch(name):
                msg = f"name a host alone, such as audio.example.org (found {name!r})"
                raise ValueError(msg)
        return [name.lower() for name in names]

    @model_validator(mode="after")
    def _two_files(self) -> Self:
        if self.errors is not None and self.output is None:
            raise ValueError("errors needs output beside it")
        if self.errors is not None and self.errors == self.output:
            raise ValueError("output and errors name the same file; leave out errors")
        return self


MOST_EXAMPLES: Final = 1000
MOST_SAMPLES: Final = 1000
MOST_SEED: Final = 2**63
"""Seeds are below it; servers read them as integers of 64 bits."""
"""Most examples of a task."""


class MessageConfig(Section):
    """One message to the model.

    Attributes:
        role: Who speaks; ``system`` is sent as ``model.system_role``.
        content: Text with the item's columns in braces.
    """

    access: ClassVar[dict[str, Access]] = declare_access(open="role content")

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class ImagesConfig(Section):
    """Images that are sent with each item.

    Attributes:
        columns: Columns that name the image of an item, or a list of them: files below the folder
            of the input, or URLs.
        urls: Whether an image may be an http URL, which the server of the model loads.
        folder: Folder of the files; None is that of the input.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="columns urls folder")

    columns: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    urls: bool = False
    folder: PathText | None = None


class TaskConfig(Section):
    """What is asked of each item.

    Attributes:
        system: Constant text, sent first, so that prefix caches reuse it; columns are not replaced
            in it.
        prompt: Text with the item's columns in braces, ``{smiles}``, or fields inside columns,
            ``{output.score}``; ``{{`` and ``}}`` are literal braces.
        messages: Messages in place of ``system`` and ``prompt``, each with role and content; the
            last one is the user's.
        examples: Examples that precede the prompt: objects with the columns of the prompt and
            ``output``, the answer; or a jsonl or csv file of them.
        answer_schema: (key ``schema``) JSON Schema of the answer, inline or the path of a file;
            None for free text. Put ``yes``, ``no``, ``on`` and ``off`` in quotes: YAML reads them
            as booleans. A value outside its ``type``, a required property that is not defined, and
            a misspelt keyword are errors.
        repairs: How often an answer that does not parse or validate is sent back with the error.
        images: Images that are sent after the prompt: a list of columns that name them, or a
            section with ``columns``, ``urls`` and ``folder``.
        samples: How often each row is asked; each sample is an item.
        fold: How the answers of the samples become one: ``vote``, ``mean``, or one of them by
            field; None averages numbers (``type: number``) and lets all else vote.
        certainty: Field of the answer for whose value the server's probability is recorded; None
            asks for none. Answers of a server that returns no log probabilities (``logprobs``), or
            refuses the field, have none.
        graph: ``package.module:attr``, a factory that takes the chat model and returns a Runnable
            which replaces fanfold's item graph; or such a Runnable with its own model, whose
            calls are not counted.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="system prompt messages examples schema repairs fold",
        lower="samples",
        closed="graph certainty",
    )

    system: str = ""
    prompt: str = ""
    messages: Annotated[list[MessageConfig], Field(min_length=1, max_length=100)] | None = None
    examples: Annotated[list[dict[str, Any]], Field(max_length=MOST_EXAMPLES)] | None = None
    answer_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    repairs: Annotated[int, Field(ge=0, le=10)] = 1
    images: ImagesConfig | None = None
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    fold: FoldKind | dict[str, FoldKind] | None = None
    certainty: Annotated[str, Field(min_length=1)] | None = None
    graph: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None

    @field_validator("images", mode="before")
    @classmethod
    def _columns_are_a_section(cls, value: Any) -> Any:
        return {"columns": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> Self:
        if self.messages is None and not self.prompt:
            msg = "prompt is missing; write what to ask, with columns in braces, or messages"
            raise ValueError(msg)
        if self.messages is None:
            return self
        if self.prompt:
            msg = "give either prompt or messages; prompt: '' or messages: null removes one"
            raise ValueError(msg)
        if self.system:
            msg = "messages replace system too; write its text as the first message (role: system)"
            raise ValueError(msg)
        if self.messages[-1].role != "user":
            msg = "the last of messages must have the role user, because the model answers it"
            raise ValueError(msg)
        return self


class ModelConfig(Section):
    """The model and how it is sampled.

    Attributes:
        name: The model's id; None takes the only model that the endpoints serve.
        temperature: Sampling temperature; None sends none, for servers that refuse it.
        max_tokens: Maximum tokens of an answer; a longer one fails as truncated.
        max_tokens_field: Field of the request that carries it; ``auto``: ``max_completion_tokens``.
            May change when a run is resumed.
        system_role: Role of task.system; ``user`` puts it at the beginning of the prompt, for
            models without such a role.
        seed: Sampling seed, or None.
        extra_body: Further fields of the request, passed on unchanged, e.g. vLLM's ``top_k``.
        price: Prices of the model; None takes the price list that ships with fanfold.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="temperature max_tokens max_tokens_field system_role seed",
        sampling="extra_body",
        model="name",
    )

    name: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 256
    max_tokens_field: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    system_role: Literal["system", "developer", "user"] = "system"
    seed: Annotated[int, Field(ge=-MOST_SEED, lt=MOST_SEED)] | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    price: PriceConfig | None = None

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_rest(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value.keys() & RESERVED.keys():
            msg = f"{name!r} is not allowed here; {RESERVED[name]}"
            raise ValueError(msg)
        return value


class LimitsConfig(Section):
    """Limits on requests, time and items in flight.

    Attributes:
        streams: Maximum number of items in flight.
        attempts: Maximum failures of one call; refusals and failed connections do not count.
        request_timeout_s: Seconds after which a request counts as lost.
        item_timeout_s: Maximum seconds for one item with all of its calls and waits, after which it
            fails (``ItemTimeoutError``); None: no limit.
        steps_per_item: Maximum steps of a ``task.graph`` for one item (LangGraph's recursion
            limit), after which it fails (``TooManyStepsError``); None: the limit of the graph.
        drain_s: Seconds that a stop waits for items in flight; it does not wait for items without a
            request in flight while no endpoint is alive.
        fleet_wait_s: Seconds to wait when no endpoint is alive; at their end each is probed once
            more. In jobs that serve the model the default is ``node.timeout_s``.
        hedge: Whether the slowest requests at the end of a run are sent again, each at most twice;
            the first answer counts.
        requests_per_s: Maximum requests per second over all endpoints.
        tokens_per_min: Maximum tokens per minute over all endpoints, prompt and answer.
        endpoint_streams: Maximum requests in flight to one endpoint; None adapts it while the run
            goes on.
        endpoint_requests_per_s: Maximum requests per second to one endpoint.
        endpoint_tokens_per_min: Maximum tokens per minute of one endpoint.
        retry_budget: Maximum number of retries as a share of all calls (0.2: one retry per five
            calls); a run with more retries stops.
        affinity: Length of a prefix in characters: requests whose messages share it go to the same
            endpoint, whose prefix cache contains it.
        order: ``auto``: items whose prompts share a long prefix, beyond the text that is the same
            for all of them, follow each other, and each group goes to one endpoint while it has
            room; without such groups, and with ``input``, the order is that of the input. It is
            chosen when a run begins, and kept.
        load: Where the load of endpoints that others use too is read: vLLM's ``/metrics``
            (``metrics``) or ``/load`` (``load``).
        walltime_s: Maximum seconds of one session of a run; the end of a batch job limits it too.
        body_bytes: Maximum bytes of one answer after decompression; a larger one fails its item
            (``EndpointReplyError``).
        margin_s: Seconds at the end of a session, after ``drain_s``, that are kept for closing
            everything.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        lower=(
            "streams attempts request_timeout_s item_timeout_s steps_per_item drain_s "
            "fleet_wait_s hedge requests_per_s tokens_per_min endpoint_streams "
            "endpoint_requests_per_s endpoint_tokens_per_min retry_budget walltime_s "
            "margin_s body_bytes"
        ),
        closed="affinity load order",
    )

    streams: Annotated[int, Field(ge=1, le=100_000)] = 256
    attempts: Annotated[int, Field(ge=1, le=100)] = 4
    request_timeout_s: PositiveDuration = 600.0
    item_timeout_s: PositiveDuration | None = None
    steps_per_item: Annotated[int, Field(ge=1, le=100_000)] | None = None
    drain_s: Duration = 30.0
    fleet_wait_s: Duration = 60.0
    hedge: bool = True
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    tokens_per_min: Annotated[float, Field(gt=0)] | None = None
    endpoint_streams: Annotated[int, Field(ge=1, le=100_000)] | None = None
    endpoint_requests_per_s: Annotated[float, Field(gt=0)] | None = None
    endpoint_tokens_per_min: Annotated[float, Field(gt=0)] | None = None
    retry_budget: Annotated[float, Field(gt=0, le=100)] | None = None
    affinity: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    order: Literal["auto", "input"] = "auto"
    load: Literal["metrics", "load"] | None = None
    walltime_s: PositiveDuration | None = None
    body_bytes: Annotated[int, Field(ge=1024, le=2**40)] = 64 * 2**20
    margin_s: Duration = 30.0

    @model_validator(mode="after")
    def _time_is_left(self) -> Self:
        kept = self.drain_s + self.margin_s
        if self.walltime_s is not None and self.walltime_s <= kept:
            msg = f"walltime_s leaves no time: drain_s and margin_s take {kept:g} s of it"
            raise ValueError(msg)
        return self


class MetricsConfig(Section):
    """Metrics for a Prometheus server.

    Attributes:
        port: Port on loopback; None serves no metrics.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="port",
    )

    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class ShardConfig(Section):
    """How items are grouped.

    Attributes:
        items: Items per shard; None chooses by input size and streams; with 1, LangGraph's engine
            runs every item as a Send of its own.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="items",
    )

    items: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class JournalConfig(Section):
    """How the journal is written.

    Attributes:
        fsync_s: Seconds between flushes to disk; only a power loss can lose that much.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="fsync_s",
    )

    fsync_s: Annotated[float, Field(gt=0, le=60)] = 0.05


class KeepConfig(Section):
    """Data that is kept in addition to the answers.

    Attributes:
        raw: Answers whose original text the journal keeps, up to 16,000 bytes: ``rejected``, those
            of items that failed because of their answer; or ``all``.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="raw")

    raw: Literal["rejected", "all"] = "rejected"


class RunConfig(Section):
    """Everything that describes a run.

    Attributes:
        name: Name of the run, used for its folder and in messages.
        cache: ``off``; ``run``: identical requests of the run are paid once; or a folder that
            runs share.
        cache_sampled: Whether answers sampled at a temperature above 0 are reused too.
        reduce: Aggregators of the answers, each a mapping with its ``op``: count, stats,
            histogram, top_k, collect; or a final reducer: sql, python.
        evaluate: Comparisons of answers with known ones, each with ``gold``, a column of the
            input, and ``field``, a field of the answer; None compares nothing.
        stages: The steps of a pipeline, in order; None: a single task.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="reduce evaluate",
        closed="name cache cache_sampled stages",
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "run"
    input: InputConfig = InputConfig()
    batch: BatchConfig = BatchConfig()
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    endpoints: EndpointsConfig
    backend: BackendConfig = BackendConfig()
    node: NodeConfig = NodeConfig()
    limits: LimitsConfig = LimitsConfig()
    shard: ShardConfig = ShardConfig()
    journal: JournalConfig = JournalConfig()
    keep: KeepConfig = KeepConfig()
    metrics: MetricsConfig = MetricsConfig()
    budget: BudgetConfig = BudgetConfig()
    cache: PathText = "off"
    cache_sampled: bool = False
    reduce: list[AnyAggregatorConfig] = Field(default_factory=list)
    evaluate: Annotated[list[EvaluationConfig], Field(max_length=100)] | None = None
    stages: Annotated[list[StageConfig], Field(min_length=1, max_length=100)] | None = None

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_no_truth_value(cls, value: Any) -> Any:
        if value is True:
            msg = "is no switch; write run, or the path of a folder"
            raise ValueError(msg)
        return "off" if value is False else value  # YAML reads a bare off as false

    def make_fold(self) -> SampleFold | None:
        """Return how the answers of samples are folded; None if each row is asked once.

        Raises:
            ConfigurationError: ``task.fold`` does not fit the schema.
        """
        return SampleFold.from_task(self.task.model_dump(by_alias=True))

    @property
    def result_schema(self) -> Mapping[str, Any] | None:
        """Return the schema of the answers in the results: of those that are folded, if any."""
        schema, fold = self.task.answer_schema, self.make_fold()
        return schema if fold is None else fold.fold_schema(schema)

    def list_aggregators(self) -> list[dict[str, Any]]:
        """Return the settings of all aggregators as plain data.

        With samples their agreement is one of them, at the end unless ``reduce`` names it.
        """
        specs = list_aggregator_specs(self.reduce, self.result_schema)
        named = any(isinstance(one, AgreementConfig) for one in self.reduce)
        if self.task.samples > 1 and not named:
            specs.append({"op": "agreement"})
        return specs

    def parse_prompt(self) -> ItemPrompt:
        """Return the templates of an item's messages.

        Raises:
            ConfigurationError: A template is malformed, or an example lacks a column.
        """
        return ItemPrompt.parse(self.task.model_dump(by_alias=True), self.model.system_role)

    @model_validator(mode="before")
    @classmethod
    def _batch_has_its_task(cls, data: Any) -> Any:
        rows = data.get("input") if isinstance(data, dict) else None
        if isinstance(rows, dict) and rows.get("format") == "openai_batch" and "task" not in data:
            return data | {"task": {"prompt": BATCH_PROMPT}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _stages_have_their_tasks(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("stages"):
            return data
        task, stages = data.get("task"), data["stages"]
        task = {} if task is None else task
        if isinstance(task, dict) and not task.get("prompt") and not task.get("messages"):
            data = data | {"task": task | {"prompt": STAGED_PROMPT}}
        first = stages[0] if isinstance(stages, list) else None
        if "endpoints" not in data and isinstance(first, dict) and "endpoints" in first:
            data = data | {"endpoints": first["endpoints"]}
        return data

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        if self.stages is None:
            return self
        check_stages(self.stages)
        if self.reduce:
            msg = (
                "reduce: with stages, aggregators belong to a stage; move them into the stage "
                "whose answers they fold"
            )
            raise ValueError(msg)
        if self.evaluate:
            raise ValueError("evaluate: compares the answers of a single task, without stages")
        if self.input.is_batch:
            raise ValueError("stages: items that are requests (input.format) have no stages")
        return self

    @model_validator(mode="after")
    def _parts_are_merged_after_a_map(self) -> Self:
        if self.input.split is not None and self.input.split.merge is not None:
            msg = (
                "input.split.merge puts the answers about parts together, but the first stage asks "
                "about none (map); leave it out, and add a stage with reduce: {op: merge} later"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _batch_is_sent_as_it_is(self) -> Self:
        if not self.input.is_batch:
            if self.batch != BatchConfig():
                raise ValueError("the section batch requires input.format: openai_batch")
            return self
        if self.task != TaskConfig(prompt=BATCH_PROMPT):
            msg = (
                "the lines of a batch in OpenAI's format are whole requests (input.format); leave "
                "out the section task"
            )
            raise ValueError(msg)
        if self.evaluate:
            msg = (
                "evaluate compares fields of answers, but answers to requests in OpenAI's format "
                "are whole responses (input.format); leave it out, or ask by task.prompt over a "
                "table of rows"
            )
            raise ValueError(msg)
        model = self.model
        plain = ModelConfig(name=model.name, price=model.price)
        if unfit := [key for key, value in plain if value != getattr(model, key)]:
            msg = (
                f"model.{unfit[0]}: each line of a batch in OpenAI's format sets its own "
                "(input.format); leave it out"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _samples_have_seeds(self) -> Self:
        seed, samples = self.model.seed, self.task.samples
        if seed is not None and seed + samples > MOST_SEED:
            msg = (
                f"model.seed: the {samples} samples of a row (task.samples) take the seeds from it "
                "on, and the last ones are too large; choose a smaller one"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _reuses_what_is_repeatable(self) -> Self:
        temperature = self.model.temperature
        if self.cache != "off" and temperature != 0 and not self.cache_sampled:
            shown = "null" if temperature is None else f"{temperature:g}"
            msg = (
                f"cache: answers drawn at model.temperature {shown} differ from "
                "call to call, and all equal items would get one of them; set "
                "model.temperature: 0, cache_sampled: true, or cache: off"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _batch_has_a_service(self) -> Self:
        if not self.backend.is_batch:
            return self
        if self.endpoints.first is None:
            msg = (
                "backend.kind: batch is the batch mode of a FIRST gateway, and endpoints names "
                "none; set endpoints.first, or leave out backend.kind"
            )
            raise ValueError(msg)
        if self.task.graph is not None:
            msg = (
                "backend.kind: batch answers one request per item and repair, but the calls of a "
                "task.graph follow each other; leave out one of the two"
            )
            raise ValueError(msg)
        if self.task.images is not None:
            msg = (
                "backend.kind: batch writes its requests to files, which must not hold images; "
                "leave out one of backend.kind and task.images"
            )
            raise ValueError(msg)
        if self.limits.item_timeout_s is not None:
            msg = (
                "limits.item_timeout_s does not fit backend.kind: batch, where an item waits for "
                "its batch for hours; leave it out"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _gateway_accepts_the_fields(self) -> Self:
        problem = explain_refused_fields(self.model.extra_body)
        if self.endpoints.first is not None and problem is not None:
            msg = f"model.extra_body: {problem}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _engine_is_here(self) -> Self:
        if self.shard.items == 1 and self.backend.is_remote:
            msg = (
                "shard.items: 1 runs each item by LangGraph's engine in this process, but this "
                "backend sends shards to workers; leave shard.items out"
            )
            raise ValueError(msg)
        return self
