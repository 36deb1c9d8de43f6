"""The command ``check``: what a run would ask and take, in words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ..backends.tariffs import explained
from ..configs.load import Loaded
from .estimate import Estimate, estimate
from .options import SAMPLE
from .saying import print_json, print_lines, say
from .telling import budget_lines, cost_lines
from .wish import Wish


def check(
    config: str,
    wish: Wish,
    sample: int = SAMPLE,
    like: Path | None = None,
    as_json: bool = False,
) -> None:
    """Check settings, input and endpoints; print what a run would ask and take.

    Args:
        config: A preset or a file.
        wish: What the options ask for.
        sample: Items whose prompts are rendered and counted.
        like: Folder of a run that tells how long answers are and what they take.
        as_json: Whether to print one JSON object instead.
    """
    loaded, notices = wish.settled(config)
    found = asyncio.run(estimate(loaded, sample, like))
    say(notices)
    if as_json:
        print_json(_data(loaded, found))
        return
    print_lines(_lines(loaded, found))


def _lines(loaded: Loaded, found: Estimate) -> list[str]:
    read = found.input
    return [
        f"settings: {loaded.source}: valid",
        f"input: {read.items:,} items from {read.source}"
        + (f", {read.skipped_total:,} skipped" if read.skipped_total else "")
        + (f", {read.invalid:,} cannot be asked" if read.invalid else ""),
        *(f"endpoint: {line}" for line in found.endpoints),
        *(
            ("system text:", *(f"  {line}" for line in found.system.splitlines()))
            * bool(found.system)
        ),
        f"first prompt (item {found.first_id}):",
        *(f"  {line}" for line in found.first_prompt.splitlines()),
        _sample_line(found),
        *_too_long(found),
        *_price_lines(loaded, found),
        *(
            [f"answers and times: as in {found.forecast.measured}"]
            if found.forecast.measured
            else []
        ),
        *cost_lines(found.forecast, found.plan),
        *budget_lines(found.forecast, found.plan),
        *_own_graph(loaded),
        *_reuse(loaded),
    ]


def _sample_line(found: Estimate) -> str:
    counted = found.counted
    if not counted.items:
        return "sample: no item can be asked"
    about = "" if counted.exact else "about "
    return (
        f"sample: {counted.items:,} prompts, {about}{counted.tokens.likely:,.0f} tokens on "
        f"average, {counted.longest:,} at most ({counted.how})"
    )


def _too_long(found: Estimate) -> list[str]:
    longest, answer = found.counted.longest, found.plan.max_tokens
    if found.context is None or longest + answer <= found.context:
        return []
    return [
        f"WARNING: the longest of these prompts and an answer of {answer:,} tokens do not fit the "
        f"context of {found.context:,}; such items are cut short or fail"
    ]


def _price_lines(loaded: Loaded, found: Estimate) -> list[str]:
    if found.price is None:
        why = explained(loaded.config, found.model, found.simulated)
        return [f"price: none: {why}; model.price sets one"]
    lines = [f"price: {found.price}"]
    longest = found.price.longest_prompt
    if longest is not None and found.counted.longest > longest:
        lines.append(
            f"WARNING: prompts above {longest:,} tokens cost more than this price says; "
            "set model.price for them"
        )
    return lines


def _reuse(loaded: Loaded) -> list[str]:
    if loaded.config.cache == "off":
        return []
    return ["equal requests are paid once (cache); what that may save is not counted here"]


def _own_graph(loaded: Loaded) -> list[str]:
    if loaded.config.task.graph is None:
        return []
    return [
        "task.graph makes the calls: these figures are for one call per item with task.prompt; "
        "a pilot measures what it really asks"
    ]


def _data(loaded: Loaded, found: Estimate) -> dict[str, Any]:
    read, counted = found.input, found.counted
    return {
        "config": loaded.source,
        "input": {
            "source": read.source,
            "items": read.items,
            "skipped": read.skipped_total,
            "invalid": read.invalid,
        },
        "endpoints": list(found.endpoints),
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
        "price": None if found.price is None else found.price.to_json(),
        "context": found.context,
        "nodes": found.plan.nodes,
        "streams": found.plan.streams,
        "estimate": found.forecast.to_json(),
    }
