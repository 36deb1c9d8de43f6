"""Fan-out and fan-in: choose the next shards, and the node that follows."""

from __future__ import annotations

import math
from typing import Final, cast

from langgraph.runtime import Runtime
from langgraph.types import Overwrite, Send

from ...backends.core.errors import RunStoppedError
from ..context import Context
from ..state import RunState

_WAVES: Final = 4
"""Shards per worker for the items left, so that all workers end at about the same time."""


async def dispatch(state: RunState, runtime: Runtime[Context]) -> RunState:  # noqa: ARG001 - a node
    """Choose the next shards, or those left over, and send each with one ``Send``.

    Raises:
        RunStoppedError: LangGraph's recursion limit is too low for the run; nothing is sent.
    """
    check_step_limit(state, supersteps_left(state))
    if left := state.get("left"):
        return cast(RunState, {"again": left, "left": Overwrite([]), "needed": Overwrite({})})
    lo, total = state["cursor"], state["total"]
    size, count = _choose_sizes(state, total - lo)
    return {"cursor": min(total, lo + count * size), "sent": [lo, size], "again": []}


def supersteps_left(state: RunState) -> int:
    """Return the maximum number of supersteps after ``dispatch``, with the engine's last check.

    A window takes three: dispatch, its shards, gather. The size of remote shards only grows
    with measured times, so the number of windows only falls.
    """
    open_ = state["total"] - state["cursor"]
    size, count = _choose_sizes(state, open_)
    later = open_ if state.get("left") else max(0, open_ - size * count)
    return 4 + 3 * -(-later // (state["shard_items"] * state["window"]))


def check_step_limit(state: RunState, needed: int) -> None:
    """Check that the recursion limit leaves enough supersteps after the present one.

    Raises:
        RunStoppedError: It does not; names a limit that is enough.
    """
    remaining = state.get("remaining")
    if remaining is None or remaining >= needed:
        return
    start: RunState = {**state, "cursor": 0, "left": [], "pace": {}}
    enough = 2 + supersteps_left(start)  # the input and load come before
    msg = (
        f"run {state['run']['id']}: LangGraph's recursion_limit ends it before its last step; "
        f"raise recursion_limit to {enough} and resume the run"
    )
    raise RunStoppedError(msg)


def _choose_sizes(state: RunState, left: int) -> tuple[int, int]:
    """Return items per shard, and shards per superstep.

    For remote shards the first superstep is small and measures the time per item. Later shards
    have the size that a worker finishes in the time that the settings aim at. A shard has all
    samples of its rows.
    """
    sizing = state.get("sizing")
    if sizing is None:
        return state["shard_items"], state["window"]
    workers, least, pace = sizing["workers"], state["shard_items"], state.get("pace") or {}
    if not pace.get("items"):
        first = 2 * workers
        return least, first if left > 2 * _WAVES * first * least else state["window"]
    seconds = pace["seconds"] / pace["items"]
    aim = math.sqrt(sizing["least_s"] * sizing["most_s"])
    share = -(-left // (_WAVES * workers))
    size = max(least, min(share, int(aim / max(seconds, 1e-6))))
    samples = sizing.get("samples", 1)  # a checkpoint of an earlier version has none
    return -(-size // samples) * samples, state["window"]


def fan_out(state: RunState) -> list[Send]:
    """Send the shards that are left over, or those of the window before the cursor.

    The last window comes with the ranges that had ended before, so that a resumed run calls the
    model before it folds them in.
    """
    (lo, size), hi, run = state["sent"], state["cursor"], state["run"]
    ranges, may_wait = state.get("again"), False
    if not ranges:
        ranges, may_wait = [[lo, min(lo + size, hi)] for lo in range(lo, hi, size)], True
        if hi == state["total"]:
            ranges, may_wait = ranges + (state.get("ended") or []), False
    return [
        Send("shard", {"run": run, "lo": lo, "hi": hi, "may_wait": may_wait}) for lo, hi in ranges
    ]


async def gather(state: RunState, runtime: Runtime[Context]) -> RunState:  # noqa: ARG001 - a node
    """Wait for the shards; the state's reducers combine their parts of the aggregate."""
    return {}


def route_after_gather(state: RunState) -> str:
    """Return the node after ``gather``: a pause for the budget, another window, or the end."""
    if state.get("left"):
        return "approve"
    return "dispatch" if state["cursor"] < state["total"] else "reduce"
