"""The order in which a run works on its items: choose it, and store it in the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from ...backends.core.errors import InvalidItemError
from ...backends.core.parsing import join_messages
from ...backends.inputs.item_order import LEAST_ROWS, find_groups, write_order
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.run_folder import RunFolder
from ...configs.models import RunConfig


def store_order(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Choose the order of a new run and write it to its folder; blocks.

    Without a file the order is that of the input. Long prompts do not go first if a budget may end
    the run before all items are asked: it would pay for fewer of them. A graph of the user's own
    (``task.graph``) makes prompts that are not known before.

    Returns:
        The entry of the provenance: ``by`` (``input`` or ``prefix``), and the groups.

    Raises:
        JournalError: The file cannot be written.
    """
    by_input = {"by": "input"}
    with ItemStore(folder.items) as store:
        rows = len(store) // store.samples
        if config.limits.order == "input" or rows < LEAST_ROWS or config.task.graph is not None:
            return by_input
        budget = config.budget
        is_limited = any((budget.usd, budget.tokens, budget.requests, budget.node_hours))
        found = find_groups(rows, _PromptReader(config, store).read, long_first=not is_limited)
    if found is None:
        return by_input
    groups, order = found
    write_order(folder.order, order)
    return {
        "by": "prefix",
        "prefix": groups.prefix,
        "groups": groups.groups,
        "grouped": groups.grouped,
    }


class _PromptReader:
    """Reads the prompts of rows as texts, without images."""

    def __init__(self, config: RunConfig, store: ItemStore) -> None:
        self._config, self._store = config, store
        self._prompt = config.parse_prompt()

    def read(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield the text of each row; an empty one if its item fails without a request."""
        samples = self._store.samples
        for item in self._store.read_at([row * samples for row in rows]):
            text = ""
            if item.problem is None:
                if self._config.input.is_batch:  # some kinds of requests have no messages
                    text = join_messages(item.row["body"].get("messages") or ())
                else:
                    with suppress(InvalidItemError):  # recorded as failed when its turn comes
                        text = join_messages(self._prompt.build_messages(item.row))
            yield text
