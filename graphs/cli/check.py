"""``fanfold check``: validate a configuration and estimate a run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from ...backends.budget.pricing import explain_no_price
from ...backends.budget.tokens import find_encoding_name
from ...backends.core.errors import ConfigurationError, NoEndpointError
from ...backends.core.money import NANO_PER_USD
from ...backends.core.terminal import count_nouns
from ...backends.discovery.resolve import get_gateway_url, list_endpoint_specs
from ...backends.discovery.sources import find_registry_file, read_registry_file
from ...backends.storage.run_folder import EVALUATION_REFUSED
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.overrides import Overrides
from ..run.console import print_json, print_lines, print_messages
from ..run.estimate import Estimate, estimate_run
from .format import budget_lines, cost_lines, describe_items, format_usd_amount

if TYPE_CHECKING:
    from ...backends.inputs.base import InputSummary
    from ..run.stage_estimate import PipelineEstimate, StageEstimate

_SHOWN_HOSTS: Final = 5
_TRACING: Final = ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "LANGSMITH_TRACING_V2")
_TRACERS: Final = ("LANGSMITH_ENDPOINT", "LANGCHAIN_ENDPOINT")
_LANGSMITH: Final = "https://api.smith.langchain.com"


def check_config(
    config: str,
    overrides: Overrides,
    sample: int,
    like: Path | None = None,
    as_json: bool = False,
) -> None:
    """Check settings, input and endpoints; print an estimate of the run.

    Args:
        config: A preset or a file.
        overrides: Settings changed by options.
        sample: Number of prompts to render and count.
        like: Run folder to take answer lengths, times and, where no tokenizer counts them, prompt
            lengths from.
        as_json: Print one JSON object instead of text.

    Raises:
        ConfigurationError: The settings are wrong. If only the price for a budget in dollars is
            missing, the estimate is printed first.
    """
    loaded, notices = overrides.resolve(config)
    if loaded.config.stages is not None:
        from ..run.pipeline import find_stage_warnings

        print_messages([*notices, *find_stage_warnings(loaded)])
        _check_pipeline(loaded, as_json)
        return
    found = asyncio.run(estimate_run(loaded, sample, like))
    print_messages(notices)
    if as_json:
        print_json(_data(loaded, found))
    else:
        print_lines(_lines(loaded, found))
    if found.problem is not None:
        raise ConfigurationError(found.problem)


def _check_pipeline(loaded: LoadedConfig, as_json: bool) -> None:
    """Check the settings of a pipeline; print an estimate of each stage.

    Raises:
        ConfigurationError: The settings are wrong, or the price for a budget is missing.
    """
    from ..run.stage_estimate import estimate_pipeline

    found = asyncio.run(estimate_pipeline(loaded))
    if as_json:
        print_json(_pipeline_data(loaded, found))
    else:
        print_lines(list(_pipeline_lines(loaded, found)))
    if found.problem is not None:
        raise ConfigurationError(found.problem)


def _pipeline_data(loaded: LoadedConfig, found: PipelineEstimate) -> dict[str, Any]:
    read, total = found.input, found.total
    return {
        "config": loaded.source,
        "input": {
            "source": read.source,
            "items": read.items,
            "skipped": read.skipped_total,
            "invalid": read.invalid,
        },
        "endpoints": {name: list(lines) for name, lines in found.endpoints.items()},
        "simulated": found.simulated,
        "stages": [one.to_json() for one in found.stages],
        "estimate": {
            "calls": total.requests,
            "tokens": total.tokens,
            "usd": total.nano_usd / NANO_PER_USD if total.nano_usd else None,
        },
        "kept_for_reduce": found.kept.to_json(),
        "problem": found.problem,
    }


def _pipeline_lines(loaded: LoadedConfig, found: PipelineEstimate) -> Iterator[str]:
    read = found.input
    yield f"settings: {loaded.source}: valid"
    yield f"input: {count_nouns(read.items, 'item')} from {read.source}{_describe_left_out(read)}"
    for name, lines in found.endpoints.items():
        yield from (f"endpoint, from stage {name}: {line}" for line in lines)
    for one in found.stages:
        operator = one.stage.config.operator
        what = "map" if operator is None else operator.op
        items = count_nouns(one.items, "item")
        yield f"stage {one.stage.name} ({what}), at most {items}: {_describe(one)}"
        for level in one.levels if operator is not None else ():
            yield (
                f"  {level.level}: {count_nouns(level.calls, 'call')}, about "
                f"{level.prompt_tokens:,} prompt tokens, at most {level.answer_tokens:,} "
                "completion tokens"
            )
    total = found.total
    dollars = f", {format_usd_amount(total.nano_usd / NANO_PER_USD)}" if total.nano_usd else ""
    calls = count_nouns(total.requests, "call")
    yield f"all stages: at most {calls}, {total.tokens:,} tokens{dollars}"
    yield "every result counts as passed on, and repairs are left out"
    limits = found.stages[0].stage.loaded.config.budget
    if any(limits.model_dump(include={"usd", "tokens", "requests"}).values()) and any(found.kept):
        kept = found.kept
        yield (
            f"kept for stages that reduce: {count_nouns(kept.requests, 'request')}, "
            f"{kept.tokens:,} tokens"
            + (f", {format_usd_amount(kept.nano_usd / NANO_PER_USD)}" if kept.nano_usd else "")
        )


def _describe(one: StageEstimate) -> str:
    amount = one.amount
    prompt = sum(level.prompt_tokens for level in one.levels)
    answers = sum(level.answer_tokens for level in one.levels)
    dollars = (
        f", at most {format_usd_amount(amount.nano_usd / NANO_PER_USD)}"
        if one.prices.priced
        else ""
    )
    return (
        f"{count_nouns(amount.requests, 'call')}, about {prompt:,} prompt tokens, at most "
        f"{answers:,} completion tokens{dollars}"
    )


def _describe_left_out(read: InputSummary) -> str:
    skipped = f", {read.skipped_total:,} skipped" if read.skipped_total else ""
    return skipped + (f", {read.invalid:,} invalid" if read.invalid else "")


def _lines(loaded: LoadedConfig, found: Estimate) -> list[str]:
    read = found.input
    return [
        f"settings: {loaded.source}: valid",
        f"input: {describe_items(read.items, read.samples)} from {read.source}"
        + _describe_left_out(read),
        *(f"endpoint: {line}" for line in found.endpoints),
        *(
            ("system text:", *(f"  {line}" for line in found.system.splitlines()))
            * bool(found.system)
        ),
        *(
            [f"examples: {len(examples):,}, before every prompt"]
            if (examples := loaded.config.task.examples)
            else []
        ),
        f"first prompt (item {found.first_id}):",
        *(f"  {line}" for line in found.first_prompt.splitlines()),
        _sample_line(found),
        *([f"hint: {found.late}"] if found.late is not None else []),
        *_context_lines(found),
        *_price_lines(loaded, found),
        *(
            [f"answers and times: as in {found.forecast.measured}"]
            if found.forecast.measured
            else []
        ),
        *cost_lines(found.forecast, found.plan),
        *budget_lines(found.forecast, found.plan),
        *_graph_lines(loaded),
        *_batch_lines(loaded.config, found),
        *_unlimited_lines(found),
        *_evaluation_lines(found),
        *_reuse(loaded),
        *_host_lines(loaded.config),
    ]


def _sample_line(found: Estimate) -> str:
    counted = found.prompt_count
    if not counted.items:
        return "sample: no valid item"
    about = "" if counted.exact else "about "
    return (
        f"sample: {count_nouns(counted.items, 'prompt')}, {about}{counted.tokens.likely:,.0f} "
        "tokens on "
        f"average, {counted.longest:,} at most ({counted.how})"
    )


def _context_lines(found: Estimate) -> list[str]:
    longest, answer = found.prompt_count.longest, found.plan.max_tokens
    if found.context is None or longest + answer <= found.context:
        return []
    return [
        f"WARNING: the longest sampled prompt plus an answer of {answer:,} tokens exceeds the "
        f"model's context of {found.context:,}; such answers are truncated, or their items fail"
    ]


def _price_lines(loaded: LoadedConfig, found: Estimate) -> list[str]:
    if found.price is None:
        why = explain_no_price(loaded.config, found.model, found.simulated)
        return [f"price: unknown: {why}; set model.price"]
    lines = [f"price: {found.price}"]
    longest = found.price.longest_prompt
    if longest is not None and found.prompt_count.longest > longest:
        lines.append(
            f"WARNING: prompts above {longest:,} tokens cost more than this price; "
            "set model.price for them"
        )
    return lines


def _reuse(loaded: LoadedConfig) -> list[str]:
    if loaded.config.cache == "off":
        return []
    return ["equal requests are paid once (cache); this estimate ignores the savings"]


def _graph_lines(loaded: LoadedConfig) -> list[str]:
    if loaded.config.task.graph is None:
        return []
    return [
        "task.graph makes the calls: these figures assume one call per item with task.prompt; "
        "use fanfold run --pilot to measure the real calls"
    ]


def _batch_lines(config: RunConfig, found: Estimate) -> Iterator[str]:
    if (batches := _count_batches(config, found)) is not None:
        lines, backend = found.plan.items, config.backend
        yield (
            f"batches: {count_nouns(batches, 'file')} with {count_nouns(lines, 'request')}, "
            f"{backend.lines:,} at most in "
            f"each, {backend.active:,} at a time, in {backend.dir}; invalid answers and missing "
            "lines add some; a submitted batch cannot be recalled"
        )
        yield "the time above does not apply: a batch service does not say how fast it is"


def _count_batches(config: RunConfig, found: Estimate) -> int | None:
    """Return the number of batches for the first requests of all items."""
    return -(-found.plan.items // config.backend.lines) if config.backend.is_batch else None


def _unlimited_lines(found: Estimate) -> list[str]:
    if not found.unlimited:
        return []
    return [
        f"without max_tokens: {count_nouns(found.unlimited, 'request')}, whose answers may be "
        "longer than these "
        "figures assume"
    ]


def _evaluation_lines(found: Estimate) -> list[str]:
    refused = [f"evaluate: {EVALUATION_REFUSED}"] if found.evaluated and found.simulated else []
    return [*found.evaluated, *refused]


def list_receiving_hosts(
    config: RunConfig, environment: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return the hosts that a run sends data to, each with its role.

    Makes no request, so servers that a registry lists or ``auto`` finds are not included.

    Args:
        config: The settings.
        environment: Environment variables; default: those of this process.
    """
    environment = os.environ if environment is None else environment
    return list(dict.fromkeys((*_endpoint_hosts(config), *_other_hosts(config, environment))))


def _endpoint_hosts(config: RunConfig) -> Iterator[tuple[str, str]]:
    endpoints = config.endpoints.model_copy(update={"api_key": SecretStr("EMPTY")})
    if endpoints.simulated is not None:
        yield "127.0.0.1", "simulated fleet"
    elif endpoints.auto:
        yield "(not known yet)", "endpoints that auto finds, see docs/configuration.md"
    elif endpoints.aegis_registry is not None:
        yield _host(endpoints.aegis_registry), "registry of endpoints, gets no items"
        yield "(not known yet)", "endpoints that the registry lists"
    elif endpoints.first is not None:
        yield _host(get_gateway_url(endpoints.first, os.environ)), "gateway"
        if endpoints.first.token is None and endpoints.first.token_command is None:
            yield "auth.globus.org", "renews the login of alcf-tokens, gets no items"
    elif endpoints.file is not None and (file := find_registry_file(Path(endpoints.file))):
        yield _host(read_registry_file(file).url), "registry of endpoints, gets no items"
        yield "(not known yet)", "endpoints that the registry lists"
    else:
        try:
            specs = list_endpoint_specs(endpoints, {})
        except NoEndpointError:
            yield "(not known yet)", f"endpoints that {endpoints.file} will list"
            return
        yield from ((_host(spec.url), "endpoint") for spec in specs)


def _other_hosts(config: RunConfig, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from config.backend.receiving_hosts()
    if any(environment.get(name, "").lower() in {"true", "1"} for name in _TRACING):
        url = next((environment[n] for n in _TRACERS if environment.get(n)), _LANGSMITH)
        yield _host(url), _describe_tracing(environment)
    name = config.model.name
    if (
        config.endpoints.simulated is None
        and name is not None
        and find_encoding_name(name) is not None
    ):
        yield "openaipublic.blob.core.windows.net", "vocabulary of tiktoken, gets no items"


def _describe_tracing(environment: Mapping[str, str]) -> str:
    """Return what LangSmith gets of a run, as docs/langgraph.md describes it."""
    from ..run.shard_plan import SHOWN_ITEMS

    withheld_by = {
        "HIDE_INPUTS": f"prompts of up to {SHOWN_ITEMS} items (with --trace: of all), pasted items",
        "HIDE_OUTPUTS": "the answers to these prompts, the aggregate",
    }
    sent = [
        what
        for name, what in withheld_by.items()
        if not any(environment.get(f"{n}_{name}") == "true" for n in ("LANGSMITH", "LANGCHAIN"))
    ]
    return f"LangSmith (tracing is on), gets {'; '.join([*sent, 'names and times of nodes'])}"


def _host(url: str) -> str:
    return urlsplit(url if "://" in url else f"//{url}").hostname or url


def _host_lines(config: RunConfig) -> Iterator[str]:
    by_what = dict[str, list[str]]()
    for host, what in list_receiving_hosts(config):
        by_what.setdefault(what, []).append(host)
    for what, hosts in by_what.items():
        more = f" and {len(hosts) - _SHOWN_HOSTS:,} more" if len(hosts) > _SHOWN_HOSTS else ""
        yield f"connects to: {', '.join(hosts[:_SHOWN_HOSTS])}{more} ({what})"


def _data(loaded: LoadedConfig, found: Estimate) -> dict[str, Any]:
    read, counted = found.input, found.prompt_count
    return {
        "config": loaded.source,
        "input": {
            "source": read.source,
            "items": read.items,
            "samples": read.samples,
            "skipped": read.skipped_total,
            "invalid": read.invalid,
        },
        "endpoints": list(found.endpoints),
        "hosts": [{"host": h, "what": what} for h, what in list_receiving_hosts(loaded.config)],
        "model": found.model,
        "simulated": found.simulated,
        "first_item": found.first_id,
        "first_prompt": found.first_prompt,
        "sample": {
            "items": counted.items,
            "tokens": counted.tokens.to_json(1),
            "longest": counted.longest,
            "exact": counted.exact,
            "counted": counted.how,
        },
        "late_repeat": None if found.late is None else asdict(found.late),
        "price": None if found.price is None else found.price.to_json(),
        "context": found.context,
        "nodes": found.plan.nodes,
        "streams": found.plan.streams,
        "batches": _count_batches(loaded.config, found),
        "estimate": found.forecast.to_json(),
        "evaluate": list(_evaluation_lines(found)),
        "problem": found.problem,
    }
