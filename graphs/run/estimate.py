"""Dry run: read, probe, render and count a sample; no model call."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ...backends.budget.pricing import Price, find_model_price
from ...backends.budget.tokens import LEAST_SHARE, LIKELY_SHARE, open_token_counter
from ...backends.core.errors import InvalidItemError, NoEndpointError
from ...backends.core.money import BudgetLimits
from ...backends.core.templates import Template
from ...backends.core.types import Item, Message
from ...backends.discovery.connect import (
    ReadyEndpoints,
    check_cache,
    make_model_params,
    open_endpoint_set,
)
from ...backends.discovery.node_local import ready_endpoints
from ...backends.discovery.probe import ProbeResult, select_model
from ...backends.discovery.resolve import EndpointSet, has_own_servers, is_simulated_command
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import ItemStore, load_input
from ...backends.inputs.source import make_input_spec, needed_columns
from ...backends.simulated.process import make_simulation_spec
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.prices import find_provider_name
from ...nodes.item.prepare import build_messages
from .forecast import Forecast, Range, RunPlan, forecast, read_item_stats
from .items import check_item_graph
from .prepare import check_endpoints, check_input_setting


def sample_indices(total: int, count: int, seed: str = "") -> list[int]:
    """Return so many indices, one by chance out of each of as many equal parts.

    Inputs are often sorted, by length for one; the first items tell little about the others.

    Args:
        total: How many items there are.
        count: How many indices to return, at most all.
        seed: The same seed gives the same indices.
    """
    if count >= total:
        return list(range(total))
    dice = random.Random(seed)
    edges = [part * total // count for part in range(count + 1)]
    return [dice.randrange(lo, hi) for lo, hi in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some items of an input, as they would be asked.

    Attributes:
        summary: What the input holds.
        messages: What would be sent for each item first.
        first_id: Name of the input's first item that can be asked, else of the first.
        first: What would be sent for it; empty if there is none.
    """

    summary: InputSummary
    messages: tuple[list[Message], ...]
    first_id: str
    first: list[Message]


def read_sample(config: RunConfig, count: int) -> Sample:
    """Read an input and render a sample of it; blocks.

    Args:
        config: The settings.
        count: Items to render.

    Raises:
        InputError: The input cannot be read, or does not fit the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.arrow"
        summary = load_input(make_input_spec(config, None), file, needed_columns(config))
        with ItemStore(file) as store:
            chosen = sample_indices(len(store), count, summary.digest)
            rendered = tuple(messages for _, messages in _render_prompts(config, store, chosen))
            first = next(_render_prompts(config, store, range(len(store))), (summary.first, []))
    return Sample(summary, rendered, first[0].id, first[1])


def _render_prompts(
    config: RunConfig, store: ItemStore, indices: Sequence[int]
) -> Iterator[tuple[Item, list[Message]]]:
    """Yield the items that can be asked, with what would be sent."""
    prompt = Template.parse(config.task.prompt)
    for index in indices:
        (item,) = store.read(index, index + 1)
        if item.problem is None:
            try:
                yield item, build_messages(config.task.system, prompt, item.row)
            except InvalidItemError:
                continue  # it will fail without a call


_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class PromptCount:
    """The prompts of a sample, counted.

    Attributes:
        items: How many.
        tokens: Tokens of one.
        longest: Tokens of the longest.
        exact: Whether the model's own tokenizer counted them.
        how: By what means, in words.
    """

    items: int
    tokens: Range
    longest: int
    exact: bool
    how: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would ask and take.

    Attributes:
        input: What the input holds.
        endpoints: One line per endpoint.
        model: The model's name.
        simulated: Whether the endpoints are simulated.
        system: The constant text, sent first.
        first_id: Name of the first item that can be asked.
        first_prompt: Its question, as it would be sent.
        prompt_count: The sample's prompts.
        context: Tokens of the shortest context among the endpoints, or None when unknown.
        price: What the model costs, or None.
        plan: What is going to be asked.
        forecast: What it will take.
    """

    input: InputSummary
    endpoints: tuple[str, ...]
    model: str
    simulated: bool
    system: str
    first_id: str
    first_prompt: str
    prompt_count: PromptCount
    context: int | None
    price: Price | None
    plan: RunPlan
    forecast: Forecast


async def estimate_run(
    loaded: LoadedConfig, sample: int = 200, like: Path | None = None
) -> Estimate:
    """Read the input, probe the endpoints, render a sample, count its tokens.

    Args:
        loaded: The settings.
        sample: Items to render.
        like: Folder of a run that tells how long answers are and what they take.

    Raises:
        ConfigurationError: Something does not fit, no endpoint serves the model, or a budget in
            dollars meets a model without a price.
    """
    check_input_setting(loaded)
    check_item_graph(loaded.config)
    check_endpoints(loaded)
    await asyncio.to_thread(check_cache, loaded.config)
    config = loaded.config
    async with _open_probed(loaded) as (serving, lines):
        cost = await asyncio.to_thread(find_model_price, config, serving.model, serving.simulated)
        seen = None
        if like is not None:
            seen = await asyncio.to_thread(read_item_stats, like, serving.simulated)
        taken = await asyncio.to_thread(read_sample, config, sample)
        counted = await _count_prompts(config, serving, taken)
    asked = taken.summary.items - taken.summary.invalid
    plan = make_run_plan(
        config, asked, counted.tokens, cost, count_nodes(config, _node_urls(serving))
    )
    return Estimate(
        input=taken.summary,
        endpoints=lines,
        model=serving.model,
        simulated=serving.simulated,
        system=config.task.system,
        first_id=taken.first_id,
        first_prompt=_question(taken),
        prompt_count=counted,
        context=min((s.max_model_len for s in serving.specs if s.max_model_len), default=None),
        price=cost,
        plan=plan,
        forecast=forecast(plan, seen),
    )


def _question(taken: Sample) -> str:
    return str(taken.first[-1]["content"]) if taken.first else "(no item can be asked)"


def make_run_plan(
    config: RunConfig, items: int, first: Range, cost: Price | None, nodes: int | None
) -> RunPlan:
    """Return what a run is going to ask.

    Args:
        config: The settings.
        items: Items that will be asked.
        first: Tokens of an item's first prompt.
        cost: What it costs, or None.
        nodes: Nodes that are held meanwhile, or None.
    """
    budget, limits = config.budget, config.limits
    return RunPlan(
        items=items,
        first=first,
        max_tokens=config.model.max_tokens,
        repairs=config.task.repairs if config.task.answer_schema is not None else 0,
        streams=limits.streams,
        requests_per_s=limits.requests_per_s,
        tokens_per_min=limits.tokens_per_min,
        nodes=nodes,
        price=cost,
        caps=BudgetLimits.from_settings(
            budget.usd, budget.tokens, budget.requests, budget.node_hours
        ),
    )


def count_nodes(config: RunConfig, urls: Iterable[str]) -> int | None:
    """Return how many nodes serve the model; None where nobody knows.

    Args:
        config: The settings.
        urls: The endpoints that are nodes' own, not a gateway's.
    """
    if config.endpoints.simulated is not None:
        return make_simulation_spec(config).nodes
    if config.backend.node_endpoints:
        return config.backend.workers * max(1, len(config.backend.endpoints))
    named = {urlsplit(url).hostname or "" for url in urls}
    return sum(find_provider_name(host) is None for host in named) or None


def _node_urls(serving: ReadyEndpoints) -> list[str]:
    behind = serving.endpoint_set is not None and serving.endpoint_set.gateway is not None
    return [] if behind else [spec.url for spec in serving.specs]


@asynccontextmanager
async def _open_probed(
    loaded: LoadedConfig,
) -> AsyncIterator[tuple[ReadyEndpoints, tuple[str, ...]]]:
    """Return who would be asked, with a line for each."""
    config, written = loaded.config, loaded.plain["endpoints"]
    if config.backend.node_endpoints and config.endpoints.simulated is None:
        async with ready_endpoints(config, written) as up:
            yield up, ("each worker asks its own node, which is not asked from here",)
        return
    try:
        async with open_endpoint_set(config, written) as place:
            if config.endpoints.simulated is not None:
                spec = make_simulation_spec(config)
                nodes = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
                line = f"SIMULATED fleet of {nodes} serving {spec.model!r}"
                yield ReadyEndpoints(place.specs, spec.model, simulated=True), (line,)
                return
            up, lines = await _probe_endpoints(config, place)
    except NoEndpointError as error:
        if not config.endpoints.waits_for_endpoints and not has_own_servers(config):
            raise
        if config.model.name is None:
            msg = f"{error.message}; to check before endpoints are there, set model.name"
            raise NoEndpointError(msg) from None
        up = ReadyEndpoints((), config.model.name, is_simulated_command(config))
        lines = (f"none yet: {error.message}",)
    yield up, lines


async def _probe_endpoints(
    config: RunConfig, place: EndpointSet
) -> tuple[ReadyEndpoints, tuple[str, ...]]:
    found = await place.probe()
    matched = select_model(found, config.model.name or place.model, config.endpoints.models)
    chosen = () if place.reason is None else (place.reason,)
    up = ReadyEndpoints(matched.specs, matched.model, matched.simulated, matched.absent, place)
    return up, (*chosen, *(_line(one, matched.model) for one in found))


def _line(found: ProbeResult, model: str) -> str:
    """Return what an endpoint said of itself; ours is the first of many models."""
    if found.error:
        return f"{found.label}: not reachable: {found.error}"
    kind = " SIMULATED" if found.simulated else ""
    context = "".join(f", context {n:,}" for _, n in found.max_model_len[:1])
    listed = sorted(found.models, key=lambda name: name != model)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    models = ", ".join(listed[:_SHOWN]) + more
    return f"{found.label}:{kind} serves {models}{context}, {1000 * (found.latency_s or 0):.0f} ms"


async def _count_prompts(config: RunConfig, serving: ReadyEndpoints, taken: Sample) -> PromptCount:
    """Count the tokens of a sample's prompts."""
    fixed = make_model_params(config, serving.model).body()
    async with open_token_counter(serving) as counter, asyncio.TaskGroup() as group:
        bodies = ({**fixed, "messages": messages} for messages in taken.messages)
        tasks = [group.create_task(counter.count(body)) for body in bodies]
        await asyncio.wait(tasks) if tasks else None
        how = counter.method
    counts = [task.result() for task in tasks]
    tokens = [float(count.tokens) for count in counts]
    mean = Range.from_sample(tokens, taken.summary.items - taken.summary.invalid)
    exact = all(count.exact for count in counts)
    if not exact:
        mean = Range(mean.low * LEAST_SHARE, mean.likely * LIKELY_SHARE, mean.high)
    longest = max((count.tokens for count in counts), default=0)
    return PromptCount(len(counts), mean, longest, exact, how)
