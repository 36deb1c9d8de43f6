"""What flows between nodes: JSON-safe, and of a size that does not grow with the items."""

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
    """One item on its way.

    Keys:
        id: The item's name.
        row: Its columns.
        problem: Why it must not be asked, or None.
        messages: The conversation so far.
        reply: The last reply: content, finish_reason, refusal.
        repairs: How often the answer was sent back.
        output: The valid answer, once there is one.
        error: Class and text of what ended the item, if it failed.
        raw: Text of the answer that was rejected last, or of the last answer.
    """

    id: str
    row: dict[str, Any]
    problem: str | None
    messages: list[Message]
    reply: dict[str, Any]
    repairs: int
    output: Json
    error: dict[str, str]
    raw: str


class ItemInput(TypedDict):
    """One item to be asked about by itself."""

    id: Annotated[str, Field(description="The item's name.")]
    row: Annotated[
        dict[str, Any],
        Field(
            description="Its columns, which the prompt names.",
            examples=[{"smiles": "CC(=O)Oc1ccccc1C(=O)O"}],
        ),
    ]


class ItemOutput(TypedDict, total=False):
    """How an item ended: an answer, or an error."""

    id: str
    output: Json
    error: dict[str, str]


class RunKey(TypedDict):
    """Which run it is; never where its folder lies, for folders move.

    Keys:
        id: The run's id.
        name: Name of its folder below the default place of run folders; None when the caller
            names the folder.
    """

    id: str
    name: str | None


class ShardState(TypedDict):
    """What a shard is sent: its run and its range of items."""

    run: RunKey
    lo: int
    hi: int


def add_tallies(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Add two tallies key by key."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


def max_by_key(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Keep the larger of each."""
    return {key: max(a.get(key, 0), b.get(key, 0)) for key in a | b}


def add_paces(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Add two paces key by key."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


class RunInput(TypedDict, total=False):
    """What a run is given: items, or a path, or nothing for the configured input.

    The run's folder is none of them: LangGraph keeps an input in its first checkpoint, and the
    folder may move. The context names it.

    None of the keys outlives the invocation, so that a thread can be used again.
    """

    items: Annotated[
        list[dict[str, Any]],
        Field(
            description="The items themselves, one mapping of columns each.",
            examples=[[{"id": "aspirin", "smiles": "CC(=O)Oc1ccccc1C(=O)O"}]],
        ),
        UntrackedValue,
    ]
    path: Annotated[
        str | None,
        Field(description="A file or folder of items, on the server, in place of the configured."),
        UntrackedValue,
    ]
    preset: Annotated[
        str | None, Field(description="Preset to run, in place of the context's."), UntrackedValue
    ]


class LoadState(TypedDict, total=False):
    """What ``load`` is sent.

    Keys:
        given: ``path`` and ``preset`` of the input, and whether there are ``items``.
        items: The items, which no checkpoint keeps.
    """

    given: dict[str, Any]
    items: list[dict[str, Any]]


class RunOutput(TypedDict, total=False):
    """What a run ends with.

    Keys:
        aggregate: One entry per reduce stage.
        progress: Counts of items, requests and tokens.
        results: Where the results lie, and whether they are simulated. No checkpoint keeps it.
    """

    aggregate: list[dict[str, Any]]
    progress: dict[str, Any]
    results: Annotated[dict[str, Any], UntrackedValue]


class RunState(RunInput, RunOutput, total=False):
    """The whole state of a run.

    Keys:
        run: Which run it is.
        total: Number of items.
        shard_items: Items per shard.
        window: Shards per superstep.
        sizing: How shards that are worked on elsewhere are sized; None keeps ``shard_items``.
        sent: First item of the present superstep, and its items per shard.
        cursor: First item that no shard was sent for yet.
        left: Shards that the budget did not carry to their end, each ``[lo, hi]``.
        needed: What the budget did not carry.
        again: Shards that are sent again in the present superstep.
        pace: Items that workers elsewhere have finished, and the seconds that each took for its
            own, added up.
        tally: Counts over the finished shards.
        parts: The finished shards' aggregate, combined.
        remaining: Supersteps that LangGraph's recursion limit leaves; no checkpoint keeps it.
    """

    run: RunKey
    total: int
    shard_items: int
    window: int
    sizing: dict[str, Json] | None
    sent: list[int]
    cursor: int
    left: Annotated[list[list[int]], operator.add]
    needed: Annotated[dict[str, int], max_by_key]
    again: list[list[int]]
    pace: Annotated[dict[str, float], add_paces]
    tally: Annotated[dict[str, int], add_tallies]
    parts: Annotated[dict[str, Any], combine_states]
    remaining: RemainingSteps
