"""Rows of the results: what the journal records of an item, beside its columns of the input."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from typing import Any

from ...backends.core.templates import ItemPrompt
from ...backends.core.types import Json, Row
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import RunIds
from ...backends.storage.results import ResultLayout, make_layout, make_rows
from ...backends.storage.results_schema import INPUT_ROW, ROW_BYTES, ResultRow
from ...backends.storage.run_folder import RunFolder, get_run_ids, read_extents
from ...configs.loader import read_settings
from ...configs.raw_settings import expand_variables, get_at_path


@dataclass(frozen=True, slots=True)
class PromptRenderer:
    """Renders the first messages of an item again, as its run sent them.

    Attributes:
        prompt: The templates of the messages; None if the items are requests themselves.
    """

    prompt: ItemPrompt | None

    def render(self, record: Mapping[str, Any], row: Row) -> Json:
        """Return the messages, or None if the item failed before they were rendered."""
        if self.prompt is None:
            body = row.get("body")
            return body.get("messages") if isinstance(body, dict) else None
        if record.get("question") is None:
            return None
        return self.prompt.build_messages(row)


@dataclass(frozen=True, slots=True)
class ResultSource:
    """The results of a run, as far as its items have ended.

    Attributes:
        journal: The run's journal.
        store: Its items.
        layout: The columns of the results.
        priced: Whether tokens have a price.
        prompts: Renders the messages; None leaves them out.
    """

    journal: Journal
    store: ItemStore
    layout: ResultLayout
    priced: bool
    prompts: PromptRenderer | None = None

    def iter_rows(self, status: str | None = None) -> Iterator[ResultRow]:
        """Yield the rows in input order; optionally of one status only.

        Raises:
            JournalError: The journal or the items are damaged.
        """
        return make_rows(self._join_records(status), priced=self.priced)

    def _join_records(self, status: str | None) -> Iterator[dict[str, Any]]:
        records, ahead = tee(self.journal.read_records(status))
        rows = self.store.iter_rows(record["index"] for record in ahead)
        for record, (row, size) in zip(records, rows, strict=True):
            record |= {INPUT_ROW: row, ROW_BYTES: size}
            if self.prompts is not None:
                record["prompt"] = self.prompts.render(record, row)
            yield record


def make_result_layout(
    schema: Mapping[str, Json] | None, store: ItemStore, optional: Collection[str] = ()
) -> ResultLayout:
    """Return the columns of a run's results.

    Args:
        schema: The task's JSON Schema, or None for free text.
        store: The run's items.
        optional: Names of optional columns.
    """
    return make_layout(schema, store.types, store.id_column, tuple(optional))


@contextmanager
def open_result_source(folder: RunFolder, optional: Collection[str] = ()) -> Iterator[ResultSource]:
    """Open the results of a run for reading; the run may be going on.

    Settings that results do not need, such as keys of endpoints, are not resolved.

    Args:
        folder: The run's folder.
        optional: Names of optional columns.

    Raises:
        ConfigurationError: The settings cannot be read, or a variable in the prompt is not set.
        JournalError: The journal, the items or the aggregate are damaged.
    """
    about = folder.read_provenance()
    run: RunIds = get_run_ids(about)
    extents = read_extents(folder)
    settings = read_settings(folder.settings).data
    prompts = read_prompts(settings, str(folder.settings)) if "prompt" in optional else None
    with (
        ItemStore(folder.items) as store,
        Journal(folder.journal, run, about["input"]["items"], extents) as journal,
    ):
        schema = get_at_path(settings, ("task", "schema"))
        layout = make_result_layout(schema if isinstance(schema, dict) else None, store, optional)
        priced = journal.total_usage().nano_usd > 0
        yield ResultSource(journal, store, layout, priced, prompts)


def read_prompts(settings: Mapping[str, Any], source: str) -> PromptRenderer:
    """Return what renders the messages of a run.

    Args:
        settings: The settings of the run as they are in its folder.
        source: Their name for messages.

    Raises:
        ConfigurationError: A variable in the prompt is not set.
    """
    if get_at_path(settings, ("input", "format")) == "openai_batch":
        return PromptRenderer(None)
    task = dict(settings["task"])
    texts = {name: task.get(name) for name in ("system", "prompt", "messages", "examples")}
    task |= expand_variables(texts, os.environ, source, "task")
    role = get_at_path(settings, ("model", "system_role")) or "system"
    return PromptRenderer(ItemPrompt.parse(task, role))
