"""Section ``reduce``: settings of the aggregators, and their check against the answer schema."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ..backends.core.errors import ConfigurationError
from ..backends.core.fields import list_types, resolve_field
from .base import Access, PathText, PositiveDuration, declare_access


class ReduceEntry(BaseModel):
    """Base of the settings of an entry of ``reduce``; ``op`` names its kind."""

    access: ClassVar[dict[str, Access]] = {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


class FinalReducerConfig(ReduceEntry):
    """Base of the settings of a final reducer, which is code: no request may contain one."""


class SqlConfig(FinalReducerConfig):
    """A query over the results of all items; requires the extra ``analysis``.

    Attributes:
        op: ``sql``.
        query: The query, over the table ``results``.
        limit: Maximum rows of the result.
        memory_mb: Memory for the query in MB.
        timeout_s: Maximum seconds for the query.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op query limit memory_mb timeout_s",
    )

    op: Literal["sql"]
    query: Annotated[str, Field(min_length=1)]
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1_000
    memory_mb: Annotated[int, Field(ge=64, le=1_000_000)] = 1_024
    timeout_s: PositiveDuration = 300


class PythonConfig(FinalReducerConfig):
    """A function of yours over the rows of the results, in ``folder`` or on the import path.

    Attributes:
        op: ``python``.
        function: ``package.module:function``.
        folder: Folder of the module; None: the folder of the configuration.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op function folder",
    )

    op: Literal["python"]
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    folder: PathText | None = None


class AggregatorConfig(ReduceEntry):
    """Base of the settings of an aggregator.

    With ``group_by``, there is a result for each value of this field of the answer or the input.
    """

    group_by: str | None = None
    max_groups: Annotated[int, Field(ge=1, le=1000)] = 100

    @property
    def most_rows(self) -> int:
        """Number of rows that a result may have."""
        return int(getattr(self, "k", 0)) or int(getattr(self, "limit", 0))


class CountConfig(AggregatorConfig):
    """Numbers of done and failed items, the failed ones by error class.

    Attributes:
        op: ``count``.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op group_by max_groups",
    )

    op: Literal["count"]


class StatsConfig(AggregatorConfig):
    """Mean, deviation, extremes and quantiles of a number.

    Attributes:
        op: ``stats``.
        field: Field of the answer or the input.
        quantiles: Quantiles, each from 0 to 1.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op field quantiles group_by max_groups",
    )

    op: Literal["stats"]
    field: str
    quantiles: list[Annotated[float, Field(ge=0, le=1)]] = [0.05, 0.25, 0.5, 0.75, 0.95]


class HistogramConfig(AggregatorConfig):
    """Counts of each value; ``bins`` groups numbers (a number of bins, or the edges).

    Attributes:
        op: ``histogram``.
        field: Field of the answer or the input.
        bins: Number of bins of equal width, or a list of their edges; None counts each value.
        low: Lower end of the bins; None: ``minimum`` in the schema.
        high: Upper end of the bins; None: ``maximum`` in the schema.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op field bins low high group_by max_groups",
    )

    op: Literal["histogram"]
    field: str
    bins: Annotated[int, Field(ge=1, le=1000)] | list[float] | None = None
    low: float | None = None
    high: float | None = None


class TopKConfig(AggregatorConfig):
    """The k items with the largest (or smallest) value, with the columns in ``show``.

    Attributes:
        op: ``top_k``.
        field: Field of the answer or the input.
        k: Number of items.
        order: Whether the largest or the smallest values come first.
        show: Columns and fields to show beside the value.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op field k order show group_by max_groups",
    )

    op: Literal["top_k"]
    field: str
    k: Annotated[int, Field(ge=1, le=10_000)] = 10
    order: Literal["largest", "smallest"] = "largest"
    show: list[str] = []


class CollectConfig(AggregatorConfig):
    """The answers (or one field) of the first ``limit`` items in input order.

    Attributes:
        op: ``collect``.
        limit: Maximum number of answers.
        field: Field of the answer or the input; None: the whole answer.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op limit field group_by max_groups",
    )

    op: Literal["collect"]
    limit: Annotated[int, Field(ge=1, le=10_000)] = 100
    field: str | None = None


class AgreementConfig(AggregatorConfig):
    """How far the samples of a row agree; every run with samples has it.

    Attributes:
        op: ``agreement``.
        group_by: Field of the answer or the input; there is a result for each of its values.
        max_groups: Maximum number of such values; of more, the most frequent ones are shown.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        open="op group_by max_groups",
    )

    op: Literal["agreement"]


AnyAggregatorConfig = Annotated[
    CountConfig
    | StatsConfig
    | HistogramConfig
    | TopKConfig
    | CollectConfig
    | AgreementConfig
    | SqlConfig
    | PythonConfig,
    Field(discriminator="op"),
]
AGGREGATOR_CONFIGS: Final[dict[str, type[BaseModel]]] = {
    get_args(model.model_fields["op"].annotation)[0]: model
    for model in get_args(get_args(AnyAggregatorConfig)[0])
}
"""The settings of each entry of ``reduce``, by its ``op``."""

_NUMBERS = {"integer", "number"}
_MAX_CATEGORIES = 1000
_MOST_ROWS = 100_000
"""Rows of all groups together."""


def check_aggregators(
    configs: Iterable[ReduceEntry],
    schema: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None = None,
    *,
    has_samples: bool = False,
) -> None:
    """Check that every aggregator's field exists and has a usable type.

    Args:
        configs: The entries of ``reduce``; those that are no aggregators are not checked.
        schema: Schema of the answers; None for free text.
        inputs: Schema of the input's rows; None if it is not known yet: then only fields of the
            answer are checked.
        has_samples: Whether each row has several samples.

    Raises:
        ConfigurationError: Names the aggregator, the field, and the fields that exist.
    """
    for n, config in enumerate(configs):
        if not isinstance(config, AggregatorConfig):
            continue
        if isinstance(config, AgreementConfig) and not has_samples:
            msg = f"reduce.{n} (agreement) compares samples; set task.samples to 2 or more"
            raise ConfigurationError(msg)
        field = getattr(config, "field", None)
        where = f"reduce.{n} ({config.op})"  # type: ignore[attr-defined]
        if field is not None:
            _check_field(where, config, field, schema, inputs)
        if config.group_by is not None:
            _check_groups(where, config, config.group_by, schema, inputs)


def _check_groups(
    where: str,
    config: AggregatorConfig,
    field: str,
    schema: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None,
) -> None:
    try:
        _, sub = resolve_field(field, schema, inputs, elements=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: group_by: {error.message}") from None
    types = list_types(sub) - {"null"}
    if types and types <= {"array", "object"}:
        kind = "a list" if "array" in types else "an object"
        part = f"{field}[]" if "array" in types else f"{field}.NAME"
        msg = (
            f"{where}: group_by: {field!r} is {kind}; name a text, number or boolean in it ({part})"
        )
        raise ConfigurationError(msg)
    groups = len(_list_categories(sub))
    if groups > config.max_groups:
        msg = (
            f"{where}: group_by: the enum of {field!r} has {groups:,} values; set max_groups to as "
            f"many ({_MAX_CATEGORIES:,} at most)"
        )
        raise ConfigurationError(msg)
    most = groups or config.max_groups
    if config.most_rows * most > _MOST_ROWS:
        name = "limit" if isinstance(config, CollectConfig) else "k"
        msg = (
            f"{where}: {config.most_rows:,} rows for each of {most:,} groups "
            f"are more than {_MOST_ROWS:,}; lower {name} or max_groups"
        )
        raise ConfigurationError(msg)


def _check_field(
    where: str,
    config: AggregatorConfig,
    field: str,
    schema: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None,
) -> None:
    try:
        path, sub = resolve_field(field, schema, inputs, elements=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None
    types = list_types(sub)
    if isinstance(config, StatsConfig | TopKConfig) and types and not types & _NUMBERS:
        place = "task.schema" if path.source == "output" else "the input"
        msg = f"{where}: field {field!r} is {'/'.join(sorted(types))} in {place}, not a number"
        raise ConfigurationError(msg)
    if isinstance(config, HistogramConfig):
        if path.source == "input" and config.bins is None:
            msg = f"{where}: a histogram of a column of the input needs bins, low and high"
            raise ConfigurationError(msg)
        _check_histogram(where, config, sub, types)


def _check_histogram(
    where: str, config: HistogramConfig, schema: Mapping[str, Any], types: set[str]
) -> None:
    if config.bins is not None:
        _check_bins(where, config, schema)
    elif "enum" in schema:
        if len(schema["enum"]) > _MAX_CATEGORIES:
            msg = f"{where}: the enum of {config.field!r} has more than {_MAX_CATEGORIES} values"
            raise ConfigurationError(msg)
    elif types - {"boolean", "null"} and not _is_bounded_integer(schema, types):
        msg = (
            f"{where}: {config.field!r} can have unlimited different values; give it an enum in "
            "task.schema, or (for numbers) set bins with low and high"
        )
        raise ConfigurationError(msg)


def _check_bins(where: str, config: HistogramConfig, schema: Mapping[str, Any]) -> None:
    if isinstance(config.bins, list):
        edges = config.bins
        if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):  # noqa: PLR2004 - two edges make one bin
            msg = f"{where}: bins must be at least two edges in rising order"
            raise ConfigurationError(msg)
        return
    low = config.low if config.low is not None else schema.get("minimum")
    high = config.high if config.high is not None else schema.get("maximum")
    if low is None or high is None or not low < high:
        msg = f"{where}: bins needs low < high (here, or as minimum and maximum in task.schema)"
        raise ConfigurationError(msg)


def _is_bounded_integer(schema: Mapping[str, Any], types: set[str]) -> bool:
    low, high = schema.get("minimum"), schema.get("maximum")
    if not types <= {"integer", "null"} or low is None or high is None:
        return False
    return bool(high - low < _MAX_CATEGORIES)


def _list_categories(schema: Mapping[str, Any]) -> list[Any]:
    """Return the values that a histogram shows even if they do not occur."""
    if "enum" in schema:
        return [value for value in schema["enum"] if isinstance(value, str | int | float)]
    return [False, True] if list_types(schema) - {"null"} == {"boolean"} else []


def list_aggregator_specs(
    configs: Iterable[ReduceEntry], schema: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Return the settings of the aggregators as plain dicts, without the final reducers."""
    aggregators = (one for one in configs if isinstance(one, AggregatorConfig))
    return [to_aggregator_spec(one, schema) for one in aggregators]


def to_aggregator_spec(
    config: AggregatorConfig, schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the settings as a plain dict.

    The field has its shortest name that says whether it is of the answer or of the input, and a
    histogram the range of its schema.
    """
    plain = config.model_dump()
    if config.group_by is None:
        del plain["group_by"], plain["max_groups"]
    else:
        path, sub = resolve_field(config.group_by, schema, elements=True)
        plain |= {"group_by": str(path), "groups": _list_categories(sub)}
    if plain.get("field") is not None:
        path, sub = resolve_field(plain["field"], schema, elements=True)
        plain["field"] = str(path)
        if isinstance(config, HistogramConfig) and config.bins is None:
            plain["categories"] = _list_categories(sub)
        if isinstance(config, HistogramConfig) and isinstance(config.bins, int):
            plain["low"] = config.low if config.low is not None else sub.get("minimum")
            plain["high"] = config.high if config.high is not None else sub.get("maximum")
    return plain
