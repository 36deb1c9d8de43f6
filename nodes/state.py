"""State of both graphs: JSON-safe, and of a size that does not grow with the items."""

from __future__ import annotations

import operator
from typing import Annotated, Any

from langgraph.channels import UntrackedValue
from langgraph.managed import RemainingSteps
from pydantic import Field
from typing_extensions import TypedDict

from ..backends.core.types import Json, Message
from .aggregators import combine_states


class ItemState(TypedDict, total=False):
    """State of one item.

    Keys:
        id: The item's name.
        row: Its columns.
        problem: Why no request may be sent for it, or None.
        messages: The conversation so far.
        images: What its record says of its images.
        reply: The last reply: content, finish_reason, refusal; its reasoning, if the server sent it
            apart; its logprobs, if the task asks for a certainty; unless it ended regularly, also
            its completion_tokens and the max_tokens that were sent, or None where unknown.
        repairs: How often the answer was sent back.
        output: The valid answer, once there is one.
        error: Class and text of what ended the item, if it failed.
        raw: Text of the last rejected answer, or of the last answer, without its reasoning.
        reasoning: The reasoning before the last answer, or None.
        certainty: The probability that the server gave to the value of a field, if the task asks
            for it; None if the server said none.
    """

    id: str
    row: dict[str, Any]
    problem: str | None
    messages: list[Message]
    images: list[dict[str, Json]]
    reply: dict[str, Any]
    repairs: int
    output: Json
    error: dict[str, str]
    raw: str
    reasoning: str | None
    certainty: float | None


class ItemInput(TypedDict):
    """Input of the item graph: one item."""

    id: Annotated[str, Field(description="The item's name.")]
    row: Annotated[
        dict[str, Any],
        Field(
            description="Its columns, which the prompt names.",
            examples=[{"smiles": "CC(=O)Oc1ccccc1C(=O)O"}],
        ),
    ]


class ItemOutput(TypedDict, total=False):
    """Result of an item: an answer, or an error."""

    id: str
    output: Json
    error: dict[str, str]


class RunKey(TypedDict):
    """Identity of a run, without the path of its folder, because folders can be moved.

    Keys:
        id: The run's id.
        name: Name of its folder in the default parent folder; None if the caller names the folder.
    """

    id: str
    name: str | None


class ShardState(TypedDict):
    """Input of the node ``shard``: its run and its range of items."""

    run: RunKey
    lo: int
    hi: int


def add_tallies(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Add two tallies key by key."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


def max_by_key(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Keep the larger value of each key."""
    return {key: max(a.get(key, 0), b.get(key, 0)) for key in a | b}


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
    asked: int
    refusal: str | None
    pace: Annotated[dict[str, float], add_paces]
    tally: Annotated[dict[str, int], add_tallies]
    parts: Annotated[dict[str, Any], combine_states]
    remaining: RemainingSteps
