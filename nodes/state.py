"""State of the map-reduce graph: JSON-safe, and of a size that does not grow with the items."""

from __future__ import annotations

import operator
from typing import Annotated, Any, NotRequired

from langgraph.channels import UntrackedValue
from langgraph.managed import RemainingSteps
from pydantic import Field
from typing_extensions import TypedDict

from ..backends.core.types import Json, RunKey
from .aggregators import combine_states


class ShardState(TypedDict):
    """Input of the node ``shard``: its run and its range of items.

    Keys:
        may_wait: Whether later supersteps have items: those of the range need not be folded in now
            if all have ended. A checkpoint of an earlier version has no such key.
    """

    run: RunKey
    lo: int
    hi: int
    may_wait: NotRequired[bool]


def add_tallies(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Add two tallies key by key."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


def max_by_key(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Keep the larger value of each key."""
    return {key: max(a.get(key, 0), b.get(key, 0)) for key in a | b}


def join_ranges(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    """Return ranges in order, those that touch each other as one."""
    joined = list[list[int]]()
    for lo, hi in sorted([*a, *b]):
        if joined and joined[-1][1] == lo:
            joined[-1] = [joined[-1][0], hi]
        else:
            joined.append([lo, hi])
    return joined


def add_paces(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Add two paces key by key."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


class RunInput(TypedDict, total=False):
    """Input of a run: items, or a path, or nothing for the configured input.

    It does not contain the run folder: LangGraph keeps an input in its first checkpoint, and the
    folder can be moved. The context names it.

    No key outlives the invocation, so that a thread can be used again.
    """

    items: Annotated[
        list[dict[str, Any]],
        Field(
            description="The items, one mapping of columns each.",
            examples=[[{"id": "aspirin", "smiles": "CC(=O)Oc1ccccc1C(=O)O"}]],
        ),
        UntrackedValue,
    ]
    path: Annotated[
        str | None,
        Field(
            description="A file or folder of items on the server, in place of the configured input."
        ),
        UntrackedValue,
    ]
    preset: Annotated[
        str | None, Field(description="Preset to run, in place of the context's."), UntrackedValue
    ]


class LoadState(TypedDict, total=False):
    """Input of the node ``load``.

    Keys:
        given: ``path`` and ``preset`` of the input, and whether there are ``items``.
        items: The items; no checkpoint contains them.
    """

    given: dict[str, Any]
    items: list[dict[str, Any]]


class RunOutput(TypedDict, total=False):
    """Output of a run.

    Keys:
        aggregate: One entry per aggregator.
        progress: Counts of items, requests and tokens.
        results: Paths of the results, and whether they are simulated. No checkpoint contains it.
    """

    aggregate: list[dict[str, Any]]
    progress: dict[str, Any]
    results: Annotated[dict[str, Any], UntrackedValue]


class RunState(RunInput, RunOutput, total=False):
    """Complete state of a run.

    Keys:
        run: The run's key.
        total: Number of items.
        shard_items: Items per shard.
        window: Shards per superstep.
        sizing: How remote shards are sized; None keeps ``shard_items``.
        stages: Stages of a pipeline that have not ended.
        sent: First item of the present superstep, and its items per shard.
        cursor: First item that was not sent in a shard yet.
        left: Shards that the budget did not cover, each ``[lo, hi]``.
        needed: The amount that the budget did not cover.
        again: Shards that are sent again in the present superstep.
        ended: Ranges of items that had all ended before their superstep; they are folded in
            with the last one, while its items are in flight.
        asked: Number of the last question about the budget.
        refusal: Why its answer was refused, or None.
        pace: Number of items that workers finished, and the sum of the workers' seconds.
        tally: Counts over the finished shards.
        parts: The combined aggregate of the finished shards.
        remaining: Supersteps left by LangGraph's recursion limit; no checkpoint contains it.
    """

    run: RunKey
    total: int
    shard_items: int
    window: int
    sizing: dict[str, Json] | None
    stages: list[str]
    sent: list[int]
    cursor: int
    left: Annotated[list[list[int]], operator.add]
    needed: Annotated[dict[str, int], max_by_key]
    again: list[list[int]]
    ended: Annotated[list[list[int]], join_ranges]
    asked: int
    refusal: str | None
    pace: Annotated[dict[str, float], add_paces]
    tally: Annotated[dict[str, int], add_tallies]
    parts: Annotated[dict[str, Any], combine_states]
    remaining: RemainingSteps
