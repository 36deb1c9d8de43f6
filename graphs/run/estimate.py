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

from ...backends.budget.pricing import Price, price
from ...backends.budget.tokens import LEAST, LIKELY, token_counter
from ...backends.core.errors import InvalidItemError, NoEndpointError
from ...backends.core.money import Caps
from ...backends.core.templates import Template
from ...backends.core.types import Item, Message
from ...backends.discovery.connect import Serving, check_cache, located, model_params
from ...backends.discovery.node_local import served
from ...backends.discovery.probe import Found, match
from ...backends.discovery.resolve import Place, serves_simulated, starts_servers
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import ItemStore, spill
from ...backends.inputs.source import input_spec, needed_columns
from ...backends.simulated.process import simulation
from ...configs.loader import Loaded
from ...configs.models import RunConfig
from ...configs.prices import provider_at
from ...nodes.item.prepare import asked
from .forecast import Forecast, Plan, Span, forecast, seen_in
from .items import check_graph
from .prepare import check_endpoints, check_input


def spread(total: int, count: int, seed: str = "") -> list[int]:
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


def take_sample(config: RunConfig, count: int) -> Sample:
    """Read an input and render a sample of it; blocks.

    Args:
        config: The settings.
        count: Items to render.

    Raises:
        InputError: The input cannot be read, or does not fit the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.arrow"
        summary = spill(input_spec(config, None), file, needed_columns(config))
        with ItemStore(file) as store:
            chosen = spread(len(store), count, summary.digest)
            rendered = tuple(messages for _, messages in _rendered(config, store, chosen))
            first = next(_rendered(config, store, range(len(store))), (summary.first, []))
    return Sample(summary, rendered, first[0].id, first[1])


def _rendered(
    config: RunConfig, store: ItemStore, indices: Sequence[int]
) -> Iterator[tuple[Item, list[Message]]]:
    """Yield the items that can be asked, with what would be sent."""
    prompt = Template.parse(config.task.prompt)
    for index in indices:
        (item,) = store.read(index, index + 1)
        if item.problem is None:
            try:
                yield item, asked(config.task.system, prompt, item.row)
            except InvalidItemError:
                continue  # it will fail without a call


_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Counted:
    """The prompts of a sample, counted.

    Attributes:
        items: How many.
        tokens: Tokens of one.
        longest: Tokens of the longest.
        exact: Whether the model's own tokenizer counted them.
        how: By what means, in words.
    """

    items: int
    tokens: Span
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
        counted: The sample's prompts.
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
    counted: Counted
    context: int | None
    price: Price | None
    plan: Plan
    forecast: Forecast


async def estimate(loaded: Loaded, sample: int = 200, like: Path | None = None) -> Estimate:
    """Read the input, probe the endpoints, render a sample, count its tokens.

    Args:
        loaded: The settings.
        sample: Items to render.
        like: Folder of a run that tells how long answers are and what they take.

    Raises:
        ConfigurationError: Something does not fit, no endpoint serves the model, or a budget in
            dollars meets a model without a price.
    """
    check_input(loaded)
    check_graph(loaded.config)
    check_endpoints(loaded)
    await asyncio.to_thread(check_cache, loaded.config)
    config = loaded.config
    async with _answering(loaded) as (serving, lines):
        cost = await asyncio.to_thread(price, config, serving.model, serving.simulated)
        seen = None
        if like is not None:
            seen = await asyncio.to_thread(seen_in, like, serving.simulated)
        taken = await asyncio.to_thread(take_sample, config, sample)
        counted = await _count(config, serving, taken)
    asked = taken.summary.items - taken.summary.invalid
    plan = plan_of(config, asked, counted.tokens, cost, nodes_of(config, _own_urls(serving)))
    return Estimate(
        input=taken.summary,
        endpoints=lines,
        model=serving.model,
        simulated=serving.simulated,
        system=config.task.system,
        first_id=taken.first_id,
        first_prompt=_question(taken),
        counted=counted,
        context=min((s.max_model_len for s in serving.specs if s.max_model_len), default=None),
        price=cost,
        plan=plan,
        forecast=forecast(plan, seen),
    )


def _question(taken: Sample) -> str:
    return str(taken.first[-1]["content"]) if taken.first else "(no item can be asked)"


def plan_of(
    config: RunConfig, items: int, first: Span, cost: Price | None, nodes: int | None
) -> Plan:
    """Return what a run is going to ask.

    Args:
        config: The settings.
        items: Items that will be asked.
        first: Tokens of an item's first prompt.
        cost: What it costs, or None.
        nodes: Nodes that are held meanwhile, or None.
    """
    budget, limits = config.budget, config.limits
    return Plan(
        items=items,
        first=first,
        max_tokens=config.model.max_tokens,
        repairs=config.task.repairs if config.task.answer_schema is not None else 0,
        streams=limits.streams,
        requests_per_s=limits.requests_per_s,
        tokens_per_min=limits.tokens_per_min,
        nodes=nodes,
        price=cost,
        caps=Caps.of(budget.usd, budget.tokens, budget.requests, budget.node_hours),
    )


def nodes_of(config: RunConfig, urls: Iterable[str]) -> int | None:
    """Return how many nodes serve the model; None where nobody knows.

    Args:
        config: The settings.
        urls: The endpoints that are nodes' own, not a gateway's.
    """
    if config.endpoints.simulated is not None:
        return simulation(config).nodes
    if config.backend.node_endpoints:
        return config.backend.workers * max(1, len(config.backend.endpoints))
    named = {urlsplit(url).hostname or "" for url in urls}
    return sum(provider_at(host) is None for host in named) or None


def _own_urls(serving: Serving) -> list[str]:
    behind = serving.place is not None and serving.place.gateway is not None
    return [] if behind else [spec.url for spec in serving.specs]


@asynccontextmanager
async def _answering(loaded: Loaded) -> AsyncIterator[tuple[Serving, tuple[str, ...]]]:
    """Return who would be asked, with a line for each."""
    config, written = loaded.config, loaded.plain["endpoints"]
    if config.backend.node_endpoints and config.endpoints.simulated is None:
        async with served(config, written) as up:
            yield up, ("each worker asks its own node, which is not asked from here",)
        return
    try:
        async with located(config, written) as place:
            if config.endpoints.simulated is not None:
                spec = simulation(config)
                nodes = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
                line = f"SIMULATED fleet of {nodes} serving {spec.model!r}"
                yield Serving(place.specs, spec.model, simulated=True), (line,)
                return
            up, lines = await _asked(config, place)
    except NoEndpointError as error:
        if not config.endpoints.awaited and not starts_servers(config):
            raise
        if config.model.name is None:
            msg = f"{error.message}; to check before endpoints are there, set model.name"
            raise NoEndpointError(msg) from None
        up = Serving((), config.model.name, serves_simulated(config))
        lines = (f"none yet: {error.message}",)
    yield up, lines


async def _asked(config: RunConfig, place: Place) -> tuple[Serving, tuple[str, ...]]:
    found = await place.ask()
    matched = match(found, config.model.name or place.model, config.endpoints.models)
    chosen = () if place.why is None else (place.why,)
    up = Serving(matched.specs, matched.model, matched.simulated, matched.absent, place)
    return up, (*chosen, *(_line(one, matched.model) for one in found))


def _line(found: Found, model: str) -> str:
    """Return what an endpoint said of itself; ours is the first of many models."""
    if found.error:
        return f"{found.label}: not reachable: {found.error}"
    kind = " SIMULATED" if found.simulated else ""
    context = "".join(f", context {n:,}" for _, n in found.max_model_len[:1])
    listed = sorted(found.models, key=lambda name: name != model)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    models = ", ".join(listed[:_SHOWN]) + more
    return f"{found.label}:{kind} serves {models}{context}, {1000 * (found.latency_s or 0):.0f} ms"


async def _count(config: RunConfig, serving: Serving, taken: Sample) -> Counted:
    """Count the tokens of a sample's prompts."""
    fixed = model_params(config, serving.model).body()
    async with token_counter(serving) as counter, asyncio.TaskGroup() as group:
        bodies = ({**fixed, "messages": messages} for messages in taken.messages)
        tasks = [group.create_task(counter.count(body)) for body in bodies]
        await asyncio.wait(tasks) if tasks else None
        how = counter.how
    counts = [task.result() for task in tasks]
    tokens = [float(count.tokens) for count in counts]
    mean = Span.mean(tokens, taken.summary.items - taken.summary.invalid)
    exact = all(count.exact for count in counts)
    if not exact:
        mean = Span(mean.low * LEAST, mean.likely * LIKELY, mean.high)
    longest = max((count.tokens for count in counts), default=0)
    return Counted(len(counts), mean, longest, exact, how)
