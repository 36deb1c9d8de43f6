"""Estimate a run without model calls: read the input, probe endpoints, count a sample."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ...backends.budget.price import Price
from ...backends.budget.pricing import describe_missing_price, look_up_price
from ...backends.budget.tokens import (
    LEAST_SHARE,
    LIKELY_SHARE,
    TokenCount,
    TokenCounter,
    open_token_counter,
)
from ...backends.core.aio import call_stoppable
from ...backends.core.errors import ConfigurationError, InvalidItemError, NoEndpointError
from ...backends.core.images import add_images, show_content
from ...backends.core.money import BudgetLimits
from ...backends.core.request_urls import (
    REQUEST_KINDS,
    REQUEST_URLS,
    find_file_problem,
    read_input_text,
)
from ...backends.core.templates import ItemPrompt
from ...backends.core.terminal import count_nouns
from ...backends.core.types import CHAT_URL, Item, Message, Row
from ...backends.discovery.connect import (
    ReadyEndpoints,
    check_cache,
    check_endpoints,
    check_tags,
    find_rate_limits,
    find_token_window,
    make_fleet_policy,
    make_model_params,
    open_endpoint_set,
)
from ...backends.discovery.probe import Deployment, ProbeResult, select_model, simplify_model
from ...backends.discovery.resolve import EndpointSet, has_own_servers, is_simulated_command
from ...backends.fleet.endpoint import EndpointSpec, describe_spellings
from ...backends.fleet.policy import FleetPolicy, ModelParams
from ...backends.inputs.base import InputSummary
from ...backends.inputs.formats import needed_columns
from ...backends.inputs.images import open_images
from ...backends.inputs.item_order import LEAST_ROWS, LateRepeat, find_late_repeat, sample_rows
from ...backends.inputs.item_store import ItemStore, load_input
from ...backends.simulated.process import make_simulation_spec
from ...backends.storage.results import ResultLayout
from ...backends.storage.run_folder import get_run_ids, open_folder
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.prices import find_provider_name
from ...configs.raw_settings import read_settings
from .final_reducers import check_final_reducers
from .forecast import AnswerLimit, Forecast, Range, RunPlan, forecast, read_item_stats
from .input_check import check_fields, check_input_setting, check_requests
from .part_length import explain_long_parts, find_longest_parts
from .result_rows import make_result_layout


def sample_indices(total: int, count: int, seed: str = "") -> list[int]:
    """Return random indices, one from each of ``count`` equal parts.

    Inputs are often sorted, for example by length, so the first items are not representative.

    Args:
        total: Number of items.
        count: Number of indices to return, at most ``total``.
        seed: Seed of the random choice.
    """
    if count >= total:
        return list(range(total))
    rng = random.Random(seed)
    edges = [part * total // count for part in range(count + 1)]
    return [rng.randrange(lo, hi) for lo, hi in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of the input, rendered as messages.

    Attributes:
        summary: Summary of the input.
        messages: The first messages of each item.
        first_id: Id of the first valid item, else of the first item.
        first: Its messages; empty if no item is valid.
        problem: Why that item is not valid, or None.
        max_tokens: Limit of an answer in tokens; of requests, the mean of those that have one.
        unlimited: Requests without such a limit.
        layout: Columns of the results.
        evaluated: Lines about the gold values of the section evaluate.
        late: A repeated part of the prompts that should stand before others, or None.
        long_parts: Rows of the longest parts of documents that may exceed the model's context.
    """

    summary: InputSummary
    messages: tuple[list[Message], ...]
    first_id: str
    first: list[Message]
    problem: str | None
    max_tokens: int
    unlimited: int
    layout: ResultLayout
    evaluated: tuple[str, ...] = ()
    late: LateRepeat | None = None
    long_parts: Sequence[Row] = ()


def read_sample(config: RunConfig, count: int, ready: ReadyEndpoints) -> Sample:
    """Read an input and render a sample of it; blocks.

    Args:
        config: The settings.
        count: Items to render.
        ready: The endpoints.

    Raises:
        InputError: The input cannot be read, or does not fit the task.
        ConfigurationError: The endpoints refuse a request of the input.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.arrow"
        samples = config.task.samples
        summary = load_input(config.input, file, needed_columns(config), samples=samples)
        with ItemStore(file) as store:
            check_requests(config, ready, store)
            chosen = sample_indices(len(store), count, summary.digest)
            rendered = tuple(messages for _, messages in _render_prompts(config, store, chosen))
            first = next(_render_prompts(config, store, range(len(store))), (summary.first, []))
            problem = None if first[1] else _find_problem(config, summary.first)
            longest, unlimited = _find_limits(config, store)
            layout = make_result_layout(
                config.task.answer_schema,
                store,
                fold=config.make_fold(),
                certain=config.task.certainty is not None,
            )
            evaluated = _check_gold_values(config, store)
            late = _find_late_repeat(config, store)
            long_parts = find_longest_parts(config, ready, store)
    return Sample(
        summary,
        rendered,
        first[0].id,
        first[1],
        problem,
        longest,
        unlimited,
        layout,
        evaluated,
        late,
        long_parts,
    )


def _find_late_repeat(config: RunConfig, store: ItemStore) -> LateRepeat | None:
    rows = len(store) // store.samples
    if rows < LEAST_ROWS or config.input.is_batch or config.task.graph is not None:
        return None
    items = store.read_at([row * store.samples for row in sample_rows(rows)])
    valid = (item.row for item in items if item.problem is None)
    return find_late_repeat(config.parse_prompt(), valid)


def _check_gold_values(config: RunConfig, store: ItemStore) -> tuple[str, ...]:
    if not config.evaluate:
        return ()
    from .evaluation import check_gold_values  # noqa: PLC0415 - numpy is slow to import

    try:
        return tuple(check_gold_values(config, store))
    except ConfigurationError:  # check_fields raises it with the name of the file
        return ()


_SLICE: Final = 256


def _find_limits(config: RunConfig, store: ItemStore) -> tuple[int, int]:
    """Return the limit of an answer, and the number of requests without one."""
    if not config.input.is_batch:
        return config.model.max_tokens, 0
    from ...backends.fleet.request import max_usage  # noqa: PLC0415 - for batches only

    total = limited = unlimited = 0
    for lo in range(0, len(store), _SLICE):
        for item in store.read(lo, min(len(store), lo + _SLICE)):
            url, body = item.row["url"], item.row["body"]
            kind = REQUEST_KINDS.get(url)
            if url == CHAT_URL or (kind is not None and kind.generates):
                most = max_usage(body).completion if kind is None else body.get("max_tokens")
                total += most or 0
                limited += bool(most)
                unlimited += not most
    return -(-total // max(1, limited)), unlimited


def read_messages(config: RunConfig, prompt: ItemPrompt, row: Row) -> list[Message]:
    """Return the messages of an item's first request, of images only the beginning; blocks.

    Raises:
        InvalidItemError: The item fails without a request.
    """
    if not config.input.is_batch:
        images, first = open_images(config), prompt.build_messages(row)
        return first if images is None else add_images(first, images.load_heads(row))
    if row["url"] not in REQUEST_URLS:
        raise InvalidItemError(f"url {row['url']!r} is not supported")
    if (kind := REQUEST_KINDS.get(row["url"])) is not None:
        if kind.file is not None:
            hosts = config.batch.allowed_media_domains
            if problem := find_file_problem(row["body"].get(kind.file), hosts):
                raise InvalidItemError(f"body.{kind.file}: {problem}")
        return [{"role": "user", "content": read_input_text(row["body"], kind)}]
    messages: list[Message] = row["body"]["messages"]
    return messages


def _render_prompts(
    config: RunConfig, store: ItemStore, indices: Sequence[int]
) -> Iterator[tuple[Item, list[Message]]]:
    """Yield the valid items with their messages."""
    prompt = config.parse_prompt()
    for index in indices:
        (item,) = store.read(index, index + 1)
        if item.problem is None:
            try:
                yield item, read_messages(config, prompt, item.row)
            except InvalidItemError:
                continue  # it will fail without a call


def _find_problem(config: RunConfig, item: Item) -> str | None:
    """Return why an item fails without a call, or None."""
    if item.problem is not None:
        return item.problem
    try:
        read_messages(config, config.parse_prompt(), item.row)
    except InvalidItemError as error:
        return error.message
    return None


_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class PromptCount:
    """Token counts of the prompts of a sample.

    Attributes:
        items: Number of prompts.
        tokens: Tokens per prompt.
        longest: Tokens of the longest prompt.
        exact: True if the model's own tokenizer counted them.
        how: Name of the counting method.
    """

    items: int
    tokens: Range
    longest: int
    exact: bool
    how: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        input: Summary of the input.
        endpoints: One line per endpoint.
        model: The model's name.
        simulated: Whether the endpoints are simulated.
        system: The system text.
        first_id: Id of the first valid item.
        first_prompt: Its rendered prompt.
        prompt_count: Token counts of the sample.
        context: Tokens of the shortest context among the endpoints, or None if unknown.
        price: Price of the model, or None.
        plan: The requests of the run.
        forecast: Estimated tokens, cost and time.
        problem: Why a run with these settings would stop before its first call, or None.
        unlimited: Requests of a batch without a limit of their answer.
        evaluated: Lines about the gold values of the section evaluate.
        late: A repeated part of the prompts that should stand before others, or None.
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
    problem: str | None = None
    unlimited: int = 0
    evaluated: tuple[str, ...] = ()
    late: LateRepeat | None = None


async def estimate_run(
    loaded: LoadedConfig, sample: int = 200, like: Path | None = None
) -> Estimate:
    """Estimate a run: read the input, probe the endpoints, render a sample, count its tokens.

    Args:
        loaded: The settings.
        sample: Number of items to render.
        like: Run folder to take answer lengths and times from, and prompt lengths where no
            tokenizer counts them.

    Raises:
        ConfigurationError: A setting is wrong, or no endpoint serves the model.
    """
    check_input_setting(loaded)
    if loaded.config.task.graph is not None:
        from .item_engine import check_item_graph  # noqa: PLC0415 - imports LangGraph

        check_item_graph(loaded.config)
    check_endpoints(loaded)
    await asyncio.to_thread(check_cache, loaded.config)
    if loaded.config.backend.is_batch:
        from ...backends.batch.files import check_batch_settings  # noqa: PLC0415 - for batches only

        await asyncio.to_thread(check_batch_settings, loaded.config.backend)
    config = loaded.config
    async with open_probed(loaded) as (ready, lines):
        if config.backend.is_batch:
            from ...backends.batch.transport import get_deployment  # noqa: PLC0415 - as above

            get_deployment(ready)
        cost = await asyncio.to_thread(look_up_price, config, ready.model, ready.simulated)
        problem = seen = None
        if cost is None and config.budget.usd is not None:
            problem = describe_missing_price(config, ready.model, ready.simulated)
        if like is not None:
            limit = AnswerLimit(config.model.max_tokens)
            seen = await asyncio.to_thread(read_item_stats, like, ready.simulated, limit)
        sampled = await call_stoppable(read_sample, config, sample, ready)
        check_fields(loaded, sampled.summary)
        await check_final_reducers(loaded, sampled.layout)
        counted = await _count_prompts(config, ready, sampled, like)
        problem = problem or await explain_long_parts(config, ready, sampled.long_parts)
    valid = sampled.summary.items - sampled.summary.invalid
    policy = make_fleet_policy(config, ready.endpoint_set)
    plan = make_run_plan(
        config,
        valid,
        counted.tokens,
        cost,
        count_nodes(config, _node_urls(ready)),
    )
    plan = limit_rates(replace(plan, max_tokens=sampled.max_tokens), config, policy, ready.specs)
    return Estimate(
        input=sampled.summary,
        endpoints=lines,
        model=ready.model,
        simulated=ready.simulated,
        system=config.task.system,
        first_id=sampled.first_id,
        first_prompt=_question(sampled, config),
        prompt_count=counted,
        context=min((s.max_model_len for s in ready.specs if s.max_model_len), default=None),
        price=cost,
        plan=plan,
        forecast=forecast(plan, seen),
        problem=problem,
        unlimited=sampled.unlimited,
        evaluated=sampled.evaluated,
        late=sampled.late,
    )


def _question(sampled: Sample, config: RunConfig) -> str:
    if sampled.first and config.task.messages is not None and not config.task.examples:
        return "\n".join(f"{one['role']}: {show_content(one['content'])}" for one in sampled.first)
    if sampled.first:
        return show_content(sampled.first[-1]["content"])
    return f"(no valid item; item {sampled.first_id}: {sampled.problem})"


def make_run_plan(
    config: RunConfig,
    items: int,
    first: Range,
    cost: Price | None,
    nodes: int | None,
) -> RunPlan:
    """Return the plan of a run, without the limits on its rate.

    Args:
        config: The settings.
        items: Number of items.
        first: Tokens of an item's first prompt.
        cost: Price of the model, or None.
        nodes: Nodes held during the run, or None.
    """
    budget, limits = config.budget, config.limits
    return RunPlan(
        items=items,
        first=first,
        max_tokens=config.model.max_tokens,
        repairs=config.task.repairs if config.task.answer_schema is not None else 0,
        streams=limits.streams,
        nodes=nodes,
        price=cost,
        caps=BudgetLimits.from_settings(
            budget.usd, budget.tokens, budget.requests, budget.node_hours
        ),
    )


def limit_rates(
    plan: RunPlan, config: RunConfig, policy: FleetPolicy, specs: Iterable[EndpointSpec]
) -> RunPlan:
    """Return a plan with the rates that all limits together allow.

    Args:
        plan: The plan.
        config: The settings.
        policy: How the fleet is used.
        specs: The endpoints.
    """
    if config.backend.is_batch:  # batches are not counted
        return plan
    members = list(specs)
    requests_per_s, tokens_per_min = find_rate_limits(policy.rate_limit, config.limits, members)
    return replace(
        plan,
        requests_per_s=requests_per_s,
        tokens_per_min=tokens_per_min,
        window_s=find_token_window(members),
        is_gateway=policy.whole_answers,
    )


def count_nodes(config: RunConfig, urls: Iterable[str]) -> int | None:
    """Return the number of nodes that serve the model, or None if unknown.

    Args:
        config: The settings.
        urls: Endpoints on nodes, without those of a gateway.
    """
    if config.endpoints.simulated is not None:
        return make_simulation_spec(config).nodes
    if config.backend.node_endpoints:
        return config.backend.workers * max(1, len(config.backend.endpoints))
    named = {urlsplit(url).hostname or "" for url in urls}
    return sum(find_provider_name(host) is None for host in named) or None


def _node_urls(ready: ReadyEndpoints) -> list[str]:
    behind = ready.endpoint_set is not None and ready.endpoint_set.gateway is not None
    return [] if behind else [spec.url for spec in ready.specs]


@asynccontextmanager
async def open_probed(
    loaded: LoadedConfig,
) -> AsyncIterator[tuple[ReadyEndpoints, tuple[str, ...]]]:
    """Open the endpoints and yield them with one line for each."""
    config, written = loaded.config, loaded.plain["endpoints"]
    if config.backend.node_endpoints and config.endpoints.simulated is None:
        from ...backends.discovery.node_local import (  # noqa: PLC0415 - for servers of nodes
            ready_endpoints,
        )

        async with ready_endpoints(config, written) as ready:
            yield ready, ("each worker uses the endpoints of its own node; not checked from here",)
        return
    try:
        async with open_endpoint_set(config, written) as endpoint_set:
            if config.endpoints.simulated is not None:
                spec = make_simulation_spec(config)
                nodes = count_nouns(spec.nodes, "node")
                line = f"SIMULATED fleet of {nodes} serving {spec.model!r}"
                yield ReadyEndpoints(endpoint_set.specs, spec.model, simulated=True), (line,)
                return
            ready, lines = await _probe_endpoints(config, endpoint_set)
    except NoEndpointError as error:
        if not config.endpoints.waits_for_endpoints and not has_own_servers(config):
            raise
        if config.model.name is None:
            msg = f"{error.message}; to check without endpoints, set model.name"
            raise NoEndpointError(msg) from None
        ready = ReadyEndpoints((), config.model.name, is_simulated_command(config))
        lines = (f"none yet: {error.message}",)
    yield ready, lines


async def _probe_endpoints(
    config: RunConfig, endpoint_set: EndpointSet
) -> tuple[ReadyEndpoints, tuple[str, ...]]:
    name = config.model.name or endpoint_set.model
    check_tags(endpoint_set, name, config.endpoints.models)
    found = await endpoint_set.probe()
    matched = select_model(found, name, config.endpoints.models)
    chosen = () if endpoint_set.reason is None else (endpoint_set.reason,)
    specs, gateway = matched.specs, endpoint_set.gateway
    if gateway is not None:
        specs = gateway.make_members(found, specs, matched.model)
    ready = ReadyEndpoints(specs, matched.model, matched.simulated, matched.absent, endpoint_set)
    repeated = (f"WARNING: {line}" for one in found if (line := describe_spellings(one.spec)))
    return ready, (*chosen, *(_line(one, matched.model) for one in found), *repeated)


def _is_same(deployment: Deployment, model: str) -> bool:
    return simplify_model(deployment.model) == simplify_model(model)


def _line(found: ProbeResult, model: str) -> str:
    """Return one line about an endpoint; the run's model is listed first."""
    if found.error:
        return f"{found.label}: not reachable: {found.error}"
    kind = " SIMULATED" if found.simulated else ""
    context = "".join(f", context {n:,}" for _, n in found.max_model_len[:1])
    states = (f", {d.state.value}" for d in found.deployments if d.state and _is_same(d, model))
    context += "".join(states)
    listed = sorted(found.models, key=lambda name: simplify_model(name) != simplify_model(model))
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    models = ", ".join(listed[:_SHOWN]) + more
    return f"{found.label}:{kind} serves {models}{context}, {1000 * (found.latency_s or 0):.0f} ms"


async def _count_prompts(
    config: RunConfig, ready: ReadyEndpoints, sampled: Sample, like: Path | None
) -> PromptCount:
    """Count the tokens of a sample's prompts; correct an estimate by the prompts of another run."""
    fixed = make_model_params(config, ready.model).body()
    bodies = [{**fixed, "messages": messages} for messages in sampled.messages]
    async with open_token_counter(ready) as counter:
        counts, how = await _count_all(counter, bodies), counter.method
        exact, ratio = all(count.exact for count in counts), None
        if not exact and like is not None:
            ratio = await _measure_ratio(counter, like, len(bodies))
    tokens = [float(count.tokens) for count in counts]
    mean = Range.from_sample(tokens, sampled.summary.items - sampled.summary.invalid)
    longest = max((count.tokens for count in counts), default=0)
    if ratio is not None:
        mean, longest = mean * ratio, round(longest * ratio.high)
        how += f", corrected by the prompts of {like}"
    elif not exact:
        mean = Range(mean.low * LEAST_SHARE, mean.likely * LIKELY_SHARE, mean.high)
    return PromptCount(len(counts), mean, longest, exact, how)


async def _count_all(
    counter: TokenCounter, bodies: Sequence[Mapping[str, Any]]
) -> list[TokenCount]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(counter.count(body)) for body in bodies]
    return [task.result() for task in tasks]


async def _measure_ratio(counter: TokenCounter, like: Path, count: int) -> Range | None:
    """Return the tokens that another run's prompts have per token counted, or None if unknown."""
    prompts = await asyncio.to_thread(_read_answered_prompts, like, count)
    counts = await _count_all(counter, [body for body, _ in prompts])
    ratios = [
        reported / counted.tokens
        for (_, reported), counted in zip(prompts, counts, strict=True)
        if counted.tokens
    ]
    return Range.from_sample(ratios, sys.maxsize) if ratios else None


def _read_answered_prompts(path: Path, count: int) -> list[tuple[dict[str, Any], int]]:
    """Return prompts of a run, each with its tokens by the server's report; blocks.

    Items that took several requests are left out: their tokens are a sum.

    Args:
        path: The run's folder.
        count: Number of items to read.

    Raises:
        ConfigurationError: The run cannot be read.
    """
    from ...backends.storage.journal import Journal  # noqa: PLC0415 - few estimates read a run

    folder = open_folder(path)
    about, settings = folder.read_provenance(), read_settings(folder.settings).data
    task = settings["task"]
    if task.get("graph") or task.get("images"):
        return []  # it writes its own prompts; or tokens of images, which differ from texts'
    role = (settings.get("model") or {}).get("system_role") or "system"
    prompt = ItemPrompt.parse(task, role)
    fixed, found = ModelParams(about["model"], schema=task.get("schema")).body(), []
    total = about["input"]["items"]
    is_batch = (settings.get("input") or {}).get("format") == "openai_batch"
    with (
        Journal(folder.journal, get_run_ids(about), total) as journal,
        ItemStore(folder.items) as store,
    ):
        ended = [index for index in range(total) if journal.is_finished(index)]
        for index in (ended[at] for at in sample_indices(len(ended), count)):
            record = journal.read_record(index)
            if record["requests"] == 1 and record["prompt_tokens"]:
                (item,) = store.read(index, index + 1)
                if is_batch and item.row["url"] != CHAT_URL:
                    continue
                messages = (
                    item.row["body"]["messages"] if is_batch else prompt.build_messages(item.row)
                )
                found.append(({**fixed, "messages": messages}, record["prompt_tokens"]))
    return found
