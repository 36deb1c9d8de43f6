"""Check that the parts of documents (``input.split``) fit into the model's context."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from ...backends.budget.tokens import TokenCount, TokenCounter, open_token_counter
from ...backends.core.errors import ConfigurationError, InvalidItemError
from ...backends.core.templates import ItemPrompt
from ...backends.core.text_tokens import estimate_text_tokens
from ...backends.core.types import Row
from ...backends.core.values import to_json_text
from ...backends.discovery.connect import ReadyEndpoints, make_model_params
from ...backends.inputs.item_store import ItemStore
from ...configs.models import RunConfig, SplitConfig

logger = logging.getLogger(__name__)

_COUNTED: Final = 8
"""Parts that the model's tokenizer counts: the longest ones by the estimate."""
_SLICE: Final = 256
_MARGIN: Final = 100
"""Tokens that a chat template and the schema's frame may add to an estimate."""
_LEAST: Final = 20
"""Least value of ``input.split.tokens``."""


def find_context(ready: ReadyEndpoints) -> int | None:
    """Return the longest context of the endpoints, to which a long prompt is sent at last.

    Returns:
        Tokens; None if one of the endpoints does not say it.
    """
    lengths = [spec.max_model_len for spec in ready.specs]
    known = [length for length in lengths if length]
    return max(known) if known and len(known) == len(lengths) else None


def find_longest_parts(config: RunConfig, ready: ReadyEndpoints, store: ItemStore) -> list[Row]:
    """Return the longest parts if some may exceed the context of the model; blocks.

    Args:
        config: The settings.
        ready: The endpoints.
        store: The items.

    Returns:
        Their rows; empty if all parts fit, or if it cannot be known.
    """
    split, context = config.input.split, find_context(ready)
    if split is None or context is None or config.input.is_batch or config.task.graph is not None:
        return []
    prompt = config.parse_prompt()
    if split.column not in prompt.columns:
        return []
    some = next(filter(None, _iter_parts(store, split.column)), [])
    bare = max((_estimate_prompt(config, prompt, row, split.column) for row in some), default=0)
    if not some or bare + split.tokens <= context - config.model.max_tokens:
        return []
    return heapq.nlargest(
        _COUNTED,
        chain.from_iterable(_iter_parts(store, split.column)),
        key=lambda row: estimate_text_tokens(str(row[split.column])),
    )


def _iter_parts(store: ItemStore, column: str) -> Iterator[list[Row]]:
    """Yield the rows of valid parts with a text, by slices."""
    for lo in range(0, len(store), _SLICE):
        items = store.read(lo, min(len(store), lo + _SLICE))
        yield [
            item.row
            for item in items
            if item.problem is None and isinstance(item.row.get(column), str)
        ]


def _estimate_prompt(config: RunConfig, prompt: ItemPrompt, row: Row, column: str) -> int:
    """Estimate the tokens of a prompt without its part; 0 if the row lacks a column."""
    try:
        messages = prompt.build_messages({**row, column: ""})
    except InvalidItemError:
        return 0
    schema = config.task.answer_schema
    texts = [*(str(one["content"]) for one in messages), to_json_text(schema or "")]
    return _MARGIN + sum(map(estimate_text_tokens, texts))


async def explain_long_parts(
    config: RunConfig, ready: ReadyEndpoints, rows: Sequence[Row]
) -> str | None:
    """Return why the longest parts do not fit into the model's context, and what does; else None.

    If only an estimate says so, it is logged as a warning: the server may accept them, and parts
    that it refuses are asked in pieces.

    Args:
        config: The settings.
        ready: The endpoints.
        rows: What :func:`find_longest_parts` has found.
    """
    split, context = config.input.split, find_context(ready)
    if split is None or context is None or not rows:
        return None
    prompt, fixed = config.parse_prompt(), make_model_params(config, ready.model).body()
    answer, longest, fitting = config.model.max_tokens, 0, split.tokens
    is_exact = True
    async with open_token_counter(ready) as counter:
        for row in rows:
            try:
                whole, exact = await _count(counter, fixed, prompt, row)
                bare, _ = await _count(counter, fixed, prompt, {**row, split.column: ""})
            except InvalidItemError:
                continue  # it fails without a call
            is_exact &= exact
            longest = max(longest, whole)
            part = max(1, estimate_text_tokens(str(row[split.column])))
            ratio = max(1, whole - bare) / part
            fitting = min(fitting, int((context - answer - bare) / ratio))
        how = counter.method
    if longest + answer <= context:
        return None
    found = (
        f"input.split.tokens: the longest prompt has {longest:,} tokens ({how}) and its answer may "
        f"have {answer:,} (model.max_tokens), which is more than the model's context of {context:,}"
    )
    if is_exact or answer >= context:
        return f"{found}: {_advise(split, fitting)}"
    logger.warning(
        "%s; this is an estimate: parts that the server refuses are asked in pieces. To avoid it, "
        "%s",
        found,
        _advise(split, fitting),
    )
    return None


async def _count(
    counter: TokenCounter, fixed: Mapping[str, Any], prompt: ItemPrompt, row: Row
) -> TokenCount:
    return await counter.count({**fixed, "messages": prompt.build_messages(row)})


def _advise(split: SplitConfig, fitting: int) -> str:
    fitting -= fitting % 10
    if fitting < _LEAST:
        return (
            "no part fits; lower model.max_tokens, shorten the prompt, or serve the model with a "
            "longer context"
        )
    overlap = ""
    if 2 * split.overlap >= fitting:
        overlap = f" and input.split.overlap to {fitting // 10}"
    return (
        f"set input.split.tokens to at most {fitting:,}{overlap}, or lower model.max_tokens, or "
        "serve the model with a longer context"
    )


async def check_part_lengths(config: RunConfig, ready: ReadyEndpoints, items: Path) -> None:
    """Check that the parts of documents fit into the model's context.

    Args:
        config: The settings.
        ready: The endpoints.
        items: File of the items.

    Raises:
        ConfigurationError: Some do not, by the model's own tokenizer; each would be refused before
            it is asked in pieces.
    """

    def find() -> list[Row]:
        with ItemStore(items) as store:
            return find_longest_parts(config, ready, store)

    rows = await asyncio.to_thread(find) if config.input.split is not None else []
    if problem := await explain_long_parts(config, ready, rows):
        raise ConfigurationError(problem)
