"""Estimates of the stages of a pipeline: for ``check``, and for what the budget keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...backends.budget.pricing import look_up_price
from ...backends.budget.tokens import estimate_text_tokens
from ...backends.core.money import NANO_PER_USD, NO_PRICES, Amount, TokenPrices
from ...backends.core.types import Json, Usage
from ...backends.core.values import to_json_text
from ...backends.inputs.item_store import ItemStore
from ...configs.loader import LoadedConfig
from ...nodes.operators import LevelPlan, SizeEstimate
from .estimate import sample_indices
from .pipeline import Stage

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
    """

    stage: Stage
    items: int
    levels: Sequence[LevelPlan]
    prices: TokenPrices

    @property
    def amount(self) -> Amount:
        """Return requests, tokens and dollars of all levels, without repairs."""
        total = Amount()
        for level in self.levels:
            usage = Usage(level.prompt_tokens, level.answer_tokens)
            one = self.prices.amount(usage)
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
    """Return the number of items in a store, and the mean tokens of their columns; blocks.

    Raises:
        JournalError: The store is damaged.
    """
    with ItemStore(path) as store:
        chosen = sample_indices(len(store), _SAMPLE, store.digest)
        tokens = [estimate_text_tokens(to_json_text(row)) for row, _ in store.iter_rows(chosen)]
        return len(store), sum(tokens) / max(1, len(tokens))


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
    stages: Sequence[Stage], items: int, tokens: float, served: ServedModel
) -> Iterator[StageEstimate]:
    """Yield the estimates of stages that follow each other.

    Args:
        stages: The stages, the first of which has the items.
        items: Number of items; every result of a stage counts as passed on.
        tokens: Mean tokens of the columns of an item.
        served: What is known of the model.
    """
    sizes = {stages[0].source: (items, tokens)}
    for stage in stages:
        count, per_item = sizes.get(stage.source, (items, tokens))
        config = stage.loaded.config
        answer = config.model.max_tokens
        price = look_up_price(config, config.model.name or served.name, served.simulated)
        prices = NO_PRICES if price is None else price.token_prices
        if stage.config.operator is None:
            fixed = estimate_text_tokens(f"{config.task.system} {config.task.prompt}")
            prompt = int(count * (fixed + per_item))
            yield StageEstimate(
                stage, count, [LevelPlan("", count, prompt, count * answer)], prices
            )
            sizes[stage.name] = count, per_item + min(answer, _LIKELY_ANSWER)
        else:
            size = SizeEstimate(count, per_item, served.context, answer)
            yield StageEstimate(stage, count, stage.make_operator().plan(size), prices)
            sizes[stage.name] = count, float(min(answer, _LIKELY_ANSWER))


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
        if not any(one.config.operator is not None for one in later[1:]):
            return Amount()
        if given != "auto":
            return Amount(given.requests, given.tokens, int(given.usd * NANO_PER_USD))
        about = stage.folder.read_provenance()
        count, tokens = measure_rows(items)
        served = ServedModel(about["model"], bool(about["simulated"]))
        found = estimate_stages(later, count, tokens, served)
        kept = Amount()
        for one in found:
            if one.stage.number > stage.number and one.stage.config.operator is not None:
                kept = kept.plus(one.amount)
        return kept

    return estimate
