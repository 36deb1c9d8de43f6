"""First node of a run: read and check the input, and write it to the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from langgraph.runtime import Runtime
from langgraph.types import Overwrite, Send

from ...backends.core.errors import InputError
from ..context import Context
from ..state import LoadState, RunState

_KEYS: Final = ("items", "path", "preset")


def check_run_input(
    given: object,
    parents: Sequence[str] = (),
    *,
    where: str = "input",
    keys: Sequence[str] = _KEYS,
) -> None:
    """Check the input of a run: items, a path, a preset, or nothing for the bound input.

    Args:
        given: The input.
        parents: Keys of a parent graph's state, which are ignored.
        where: How messages name the input.
        keys: The allowed keys.

    Raises:
        InputError: A key is unknown or empty, or two inputs are given.
    """
    listed = ", ".join(keys)
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise InputError(f"{where}: give a mapping with one of {listed} (found {kind})")
    if unknown := [str(key) for key in given if key not in keys and key not in parents]:
        raise InputError(f"{where}: {describe_unknown_keys(unknown, keys)}; give {listed}, or {{}}")
    named = {key: given[key] for key in keys if key in given}
    if named and all(value is None for value in named.values()):
        msg = f"{where}.{'/'.join(named)} is null; give a value, or {{}} for the bound input"
        raise InputError(msg)
    items, path, preset = (named.get(key) for key in _KEYS)
    if items is not None and path is not None:
        raise InputError(f"{where}: give items or path, not both")
    if path is not None and not (isinstance(path, str | os.PathLike) and os.fspath(path)):
        raise InputError(f"{where}.path: {_named(path, 'a file or a folder')}")
    if preset is not None and not (isinstance(preset, str) and preset):
        raise InputError(f"{where}.preset: {_named(preset, 'a preset')}")
    if items is None:
        return
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        kind = type(items).__name__
        raise InputError(f"{where}.items: give a list of mappings (found {kind})")
    if not items:
        raise InputError(f"{where}.items is empty; it must hold at least one object")


def _named(value: object, what: str) -> str:
    kind = type(value).__name__
    return f"is empty; name {what}" if value == "" else f"name {what} as text (found {kind})"


def describe_unknown_keys(names: Sequence[str], known: Sequence[str]) -> str:
    """Return a phrase that lists unknown keys, each with the closest known key."""

    def hinted(name: str) -> str:
        close = get_close_matches(name, known, n=1)
        return f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name)

    return f"unknown {'key' if len(names) == 1 else 'keys'} {', '.join(map(hinted, names))}"


def send_input(state: RunState) -> list[Send]:
    """Send the input to ``load``.

    LangGraph removes untracked keys from the Sends in checkpoints, so no checkpoint contains the
    items. ``pasted`` is kept, so that a run that is resumed before its items were written does
    not continue with others.
    """
    check_run_input({key: value for key, value in state.items() if key in _KEYS})
    items, path = state.get("items"), state.get("path")
    given = {
        "path": None if path is None else os.fspath(path),
        "preset": state.get("preset"),
        "pasted": items is not None,
    }
    return [Send("load", {"given": given, "items": items})]


async def load(state: LoadState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Read and check the batch; the state keeps a reference to it, never the items.

    Raises:
        InputError: The batch is invalid, or the process that had the pasted items ended before it
            wrote them.
    """
    given, items = state["given"], state.get("items")
    if given["pasted"] and items is None:
        msg = "the run ended before its items were written; start it again with the items"
        raise InputError(msg)
    run = await runtime.context.prepare(given["path"], items, given.get("preset"))
    return {
        "run": run.key,
        "total": run.total,
        "shard_items": run.shard_items,
        "window": run.window,
        "sizing": run.sizing,
        "stages": list(run.stages),
        "cursor": 0,
        "left": Overwrite([]),
        "ended": Overwrite([]),
        "needed": Overwrite({}),
        "pace": Overwrite({}),
        "refusal": None,
        "tally": Overwrite({}),  # a thread may have run before
        "parts": Overwrite({}),
    }


def route_after_load(state: RunState) -> str:
    """Return the node after ``load``: the stages of a pipeline, or the shards of a run."""
    return "stages" if state.get("stages") else "dispatch"
