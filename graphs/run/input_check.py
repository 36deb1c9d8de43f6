"""Check the input of a run: that it is set, and that it fits settings and endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import split_column
from ...backends.discovery.connect import ReadyEndpoints
from ...backends.inputs.base import InputSummary, did_you_mean
from ...backends.inputs.batch_requests import explain_gateway_refusal, explain_unlimited
from ...configs.aggregators import check_aggregators
from ...configs.evaluation import resolve_evaluations
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig

if TYPE_CHECKING:
    from ...backends.inputs.item_store import ItemStore


def check_input_setting(
    loaded: LoadedConfig, items: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Check that an input is configured, and a folder for its images if it has some.

    Raises:
        ConfigurationError: There are no items, path or dataset; or no folder.
    """
    given, images = loaded.config.input, loaded.config.task.images
    if items is None and given.path is None and given.dataset is None:
        msg = f"{loaded.source}: the key 'input.path' (or 'input.dataset') is missing"
        raise ConfigurationError(msg)
    has_folder = items is None and given.path is not None
    if images is not None and images.folder is None and not has_folder and not images.urls:
        msg = (
            f"{loaded.source}: task.images: items that are given in memory or by a data set have "
            "no folder; set task.images.folder, or task.images.urls: true"
        )
        raise ConfigurationError(msg)


def check_fields(loaded: LoadedConfig, summary: InputSummary) -> None:
    """Check the fields that settings name against the answer and the input.

    Raises:
        ConfigurationError: A field does not exist, or means two things.
    """
    try:
        _check_prompt_fields(loaded.config, summary.row_schema)
        check_aggregators(
            loaded.config.reduce,
            loaded.config.result_schema,
            summary.row_schema,
            has_samples=loaded.config.task.samples > 1,
        )
        resolve_evaluations(loaded.config.evaluate, loaded.config.result_schema, summary.row_schema)
    except ConfigurationError as error:
        raise ConfigurationError(f"{loaded.source}: {error.message}") from None


def _check_prompt_fields(config: RunConfig, inputs: Mapping[str, Any]) -> None:
    """Check that the fields inside columns that the prompt uses exist in some row.

    A column whose values are no objects, or not only, fails its items instead: it may still have
    objects with too many keys to be described.

    Raises:
        ConfigurationError: No row has the field.
    """
    texts = [text for _, text in config.parse_prompt().messages]
    for name, where in {name: text.where for text in texts for name in text.columns}.items():
        column, keys = split_column(name, inputs["properties"]) or (name, ())
        at, schema = column, inputs["properties"].get(column, {})
        for key in keys:
            if schema.get("type") != "object":
                break
            if key not in schema["properties"]:
                raise ConfigurationError(
                    f"{where} uses {{{name}}}, but {at!r} of the input has no field {key!r} in "
                    f"any row; its fields: {', '.join(schema['properties'])}"
                    f"{did_you_mean(key, schema['properties'])}"
                )
            at, schema = f"{at}.{key}", schema["properties"][key]


_SLICE: Final = 256


def check_requests(
    config: RunConfig,
    ready: ReadyEndpoints,
    store: ItemStore,
    is_finished: Callable[[int], bool] = lambda _: False,
) -> None:
    """Check that endpoints and budget fit the requests of a batch, before one is sent; blocks.

    Args:
        config: The settings.
        ready: The endpoints.
        store: The requests.
        is_finished: Whether a request needs no answer any more.

    Raises:
        ConfigurationError: The endpoints are behind a gateway that refuses a request, or a budget
            does not limit the cost of one.
    """
    behind = ready.endpoint_set is not None and ready.endpoint_set.gateway is not None
    counts_tokens = config.budget.counts_tokens
    if not config.input.is_batch or not (behind or counts_tokens):
        return
    for lo in range(0, len(store), _SLICE):
        for index, item in enumerate(store.read(lo, min(len(store), lo + _SLICE)), lo):
            if is_finished(index):
                continue
            problem = None
            if behind:
                problem = explain_gateway_refusal(item.row, by_batch=config.backend.is_batch)
            if counts_tokens:
                problem = problem or explain_unlimited(item.row, counts_tokens=True)
            if problem is not None:
                msg = f"{config.input.path}, request {item.id!r}: {problem}; no request was sent"
                raise ConfigurationError(msg)
