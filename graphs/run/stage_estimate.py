"""Estimates of the stages of a pipeline: for ``check``, and for what the budget keeps."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...backends.budget.pricing import describe_missing_price, look_up_price
from ...backends.core.aio import call_stoppable
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import NANO_PER_USD, NO_PRICES, Amount, TokenPrices
from ...backends.core.text_tokens import estimate_text_tokens
from ...backends.core.types import Json, Usage
from ...backends.core.values import to_json_text
from ...backends.discovery.connect import ReadyEndpoints, check_endpoints
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import ItemStore, load_input
from ...configs.budget import ReserveConfig
from ...configs.loader import LoadedConfig
from ...nodes.operators import LevelPlan, SizeEstimate
from .estimate import open_probed, sample_indices
from .input_check import check_input_setting
from .part_length import check_part_lengths
from .pipeline import Stage, check_columns, list_models, list_stages

_SAMPLE = 200
_LIKELY_ANSWER = 128
"""Tokens by which an answer makes the items of the next stage longer, at most."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """The most that a stage is expected to take, if every result is passed on.

    Attributes:
        stage: The stage.
        items: Its items.
        levels: Its levels; a stage without an operator has one.
        prices: Prices of tokens; zero where none is known.
        small_prices: The same of the small model of a cascade.
    """

    stage: Stage
    items: int
    levels: Sequence[LevelPlan]
    prices: TokenPrices
    small_prices: TokenPrices = NO_PRICES

    @property
    def amount(self) -> Amount:
        """Return requests, tokens and dollars of all levels, without repairs."""
        total = Amount()
        for level in self.levels:
            usage = Usage(level.prompt_tokens, level.answer_tokens)
            one = (self.small_prices if level.is_small else self.prices).amount(usage)
            total = total.plus(one._replace(requests=level.calls, node_ms=0))
        return total

    def to_json(self) -> dict[str, Json]:
        """Return the estimate as plain data."""
        amount, operator = self.amount, self.stage.config.operator
        return {
            "stage": self.stage.name,
            "op": "map" if operator is None else operator.op,
            "items": self.items,
            "calls": amount.requests,
            "prompt_tokens": sum(level.prompt_tokens for level in self.levels),
            "completion_tokens": sum(level.answer_tokens for level in self.levels),
            "usd": amount.nano_usd / NANO_PER_USD if self.prices.priced else None,
            "levels": [
                {
                    "level": level.level,
                    "calls": level.calls,
                    "prompt_tokens": level.prompt_tokens,
                    "completion_tokens": level.answer_tokens,
                }
                for level in self.levels
            ]
            if operator is not None
            else [],
        }


def measure_rows(path: Path) -> tuple[int, float]:
    """Return the number of rows in a store of items, and the mean tokens of a row; blocks.

    Raises:
        JournalError: The store is damaged.
    """
    with ItemStore(path) as store:
        chosen = sample_indices(len(store), _SAMPLE, store.digest)
        tokens = [estimate_text_tokens(to_json_text(row)) for row, _ in store.iter_rows(chosen)]
        return len(store) // store.samples, sum(tokens) / max(1, len(tokens))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is known of the model that the endpoints serve.

    Attributes:
        name: Its name, for stages whose settings name none.
        simulated: Whether the endpoints are simulated.
        context: Its context in tokens, or None if unknown.
    """

    name: str
    simulated: bool
    context: int | None = None


def estimate_stages(
    stages: Sequence[Stage], items: int, tokens: float, served: Mapping[str, ServedModel]
) -> Iterator[StageEstimate]:
    """Yield the estimates of stages that follow each other.

    Args:
        stages: The stages, the first of which has the items.
        items: Number of items; every result of a stage counts as passed on.
        tokens: Mean tokens of the columns of an item.
        served: What is known of the model of each stage, by its name; ``NAME, small`` is that of
            the small model of a cascade.
    """
    sizes = {stages[0].source: (items, tokens)}
    for stage in stages:
        count, per_item = sizes.get(stage.source, (items, tokens))
        config, model = stage.loaded.config, served[stage.name]
        answer = stage.choose_answer_tokens(model.context)
        prices = _find_prices(stage.loaded, model)
        if stage.config.operator is None:
            fixed = estimate_text_tokens(f"{config.task.system} {config.task.prompt}")
            calls = count * config.task.samples
            prompt = int(calls * (fixed + per_item))
            yield StageEstimate(
                stage, count, [LevelPlan("", calls, prompt, calls * answer)], prices
            )
            sizes[stage.name] = count, per_item + min(answer, _LIKELY_ANSWER)
        else:
            size = SizeEstimate(count, per_item, model.context, answer)
            operator = stage.make_operator()
            small = NO_PRICES
            if stage.small is not None:
                small = _find_prices(stage.small, served.get(f"{stage.name}, small", model))
            yield StageEstimate(stage, count, operator.plan(size), prices, small)
            columns = per_item if operator.passes_columns else 0.0
            sizes[stage.name] = operator.count_results(count), columns + min(answer, _LIKELY_ANSWER)


def _find_prices(loaded: LoadedConfig, served: ServedModel) -> TokenPrices:
    name = loaded.config.model.name or served.name
    price = look_up_price(loaded.config, name, served.simulated)
    return NO_PRICES if price is None else price.token_prices


def make_reserve(loaded: LoadedConfig, stages: Sequence[Stage]) -> Callable[[Stage, Path], Amount]:
    """Return a function that estimates what the budget keeps during a stage.

    It keeps what later stages that reduce need: the amounts in the settings, or an estimate by the
    items of the stage.

    Args:
        loaded: The settings of the pipeline.
        stages: Its stages.
    """
    given = loaded.config.budget.reserve_for_reduce

    def estimate(stage: Stage, items: Path) -> Amount:
        later = stages[stage.number :]
        if not any(one.config.reduces for one in later[1:]):
            return Amount()
        if given != "auto":
            return _read_reserve(given)
        about = stage.folder.read_provenance()
        count, tokens = measure_rows(items)
        served = ServedModel(about["model"], bool(about["simulated"]))
        models = dict.fromkeys((one.name for one in later), served)
        found = estimate_stages(later, count, tokens, models)
        kept = Amount()
        for one in found:
            if one.stage.number > stage.number and one.stage.config.reduces:
                kept = kept.plus(one.amount)
        return kept

    return estimate


@dataclass(frozen=True, slots=True)
class PipelineEstimate:
    """The estimate of a pipeline.

    Attributes:
        input: Summary of the input.
        endpoints: By stage, one line for each endpoint; stages with the same ones share an entry.
        simulated: Whether the endpoints are simulated.
        stages: The estimate of each stage.
        kept: What the budget keeps for stages that reduce, during the first stage.
        problem: Why a run would stop before its first call, or None.
    """

    input: InputSummary
    endpoints: Mapping[str, Sequence[str]]
    simulated: bool
    stages: Sequence[StageEstimate]
    kept: Amount
    problem: str | None = None

    @property
    def total(self) -> Amount:
        """Return requests, tokens and dollars of all stages."""
        total = Amount()
        for one in self.stages:
            total = total.plus(one.amount)
        return total


async def estimate_pipeline(loaded: LoadedConfig) -> PipelineEstimate:
    """Estimate a pipeline: read the input, probe the endpoints of each stage, call no model.

    Args:
        loaded: The settings.

    Raises:
        ConfigurationError: A setting is wrong, or no endpoint serves the model of a stage.
    """
    check_input_setting(loaded)
    served, lines, groups = dict[str, ServedModel](), dict[str, Sequence[str]](), {}
    problem = None
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "items.arrow"
        stages = list_stages(loaded, Path(temporary))
        summary = await call_stoppable(load_input, stages[0].loaded.config.input, file, ())
        check_columns(loaded, summary)
        items, tokens = await asyncio.to_thread(measure_rows, file)
        for name, one in list_models(stages):
            check_endpoints(one)
            key = to_json_text([one.plain["endpoints"], one.plain["model"]["name"]])
            if key not in groups:
                async with open_probed(one) as (ready, found):
                    lengths = [spec.max_model_len for spec in ready.specs if spec.max_model_len]
                    context = min(lengths, default=None)
                    groups[key] = ServedModel(ready.model, ready.simulated, context)
                    if one is stages[0].loaded:
                        problem = await _find_long_parts(one, ready, file)
                lines[name] = found
            served[name] = groups[key]
    found_stages = list(estimate_stages(stages, items, tokens, served))
    unpriced = [one for one in found_stages if not one.prices.priced]
    if loaded.config.budget.usd is not None and unpriced:
        first = unpriced[0].stage
        model = served[first.name]
        problem = describe_missing_price(first.loaded.config, model.name, model.simulated)
    return PipelineEstimate(
        summary,
        lines,
        any(one.simulated for one in served.values()),
        found_stages,
        _sum_reserve(loaded, found_stages),
        problem,
    )


async def _find_long_parts(loaded: LoadedConfig, ready: ReadyEndpoints, items: Path) -> str | None:
    try:
        await check_part_lengths(loaded.config, ready, items)
    except ConfigurationError as error:
        return error.message
    return None


def _sum_reserve(loaded: LoadedConfig, stages: Sequence[StageEstimate]) -> Amount:
    given, kept = loaded.config.budget.reserve_for_reduce, Amount()
    later = [one for one in stages[1:] if one.stage.config.reduces]
    if given != "auto":
        return _read_reserve(given) if later else kept
    for one in later:
        kept = kept.plus(one.amount)
    return kept


def _read_reserve(given: ReserveConfig) -> Amount:
    return Amount(given.requests, given.tokens, int(given.usd * NANO_PER_USD))
