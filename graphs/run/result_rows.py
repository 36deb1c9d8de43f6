"""Rows of the results: what the journal records of an item, beside its columns of the input."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, tee
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import split_column
from ...backends.core.images import show_images
from ...backends.core.samples import FoldRule, SampleFold, find_row_error
from ...backends.core.templates import ItemPrompt
from ...backends.core.types import PART_COLUMN, PART_FIELDS, Json, Row, find_row_id
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.results import ResultLayout, make_layout, make_rows
from ...backends.storage.results_schema import (
    FREE_TEXT,
    INPUT_ROW,
    INTEGER,
    NUMBER,
    ROW_BYTES,
    TIES,
    CellType,
    ResultRow,
)
from ...backends.storage.run_folder import RunFolder, get_run_ids, read_extents
from ...configs.raw_settings import expand_variables, get_at_path, read_settings

if TYPE_CHECKING:
    from ...backends.storage.journal import Journal
    from ...backends.storage.journal_file import RunIds


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
        messages = self.prompt.build_messages(row)
        images = record.get("images")
        return show_images(messages, images) if images else messages


@dataclass(frozen=True, slots=True)
class ResultSource:
    """The results of a run, as far as its items have ended.

    Attributes:
        journal: The run's journal.
        store: Its items.
        layout: The columns of the results.
        priced: Whether tokens have a price.
        prompts: Renders the messages; None leaves them out.
        fold: Folds the samples of each row to one; None gives each item a row.
    """

    journal: Journal
    store: ItemStore
    layout: ResultLayout
    priced: bool
    prompts: PromptRenderer | None = None
    fold: SampleFold | None = None

    def iter_rows(self, status: str | None = None) -> Iterator[ResultRow]:
        """Yield the rows in input order; optionally of one status only.

        Raises:
            JournalError: The journal or the items are damaged.
        """
        rows = make_rows(self._join_records(None if self.fold else status), priced=self.priced)
        if self.fold is not None:
            folded = fold_rows(rows, self.fold)
            return (row for row in folded if status is None or row["status"] == status)
        if self.store.samples > 1:
            return map(_name_sample, rows)
        return rows

    def _join_records(self, status: str | None) -> Iterator[dict[str, Any]]:
        records, ahead = tee(self.journal.read_records(status))
        rows = self.store.iter_rows(record["index"] for record in ahead)
        for record, (row, size) in zip(records, rows, strict=True):
            record |= {INPUT_ROW: row, ROW_BYTES: size}
            if self.prompts is not None:
                record["prompt"] = self.prompts.render(record, row)
            yield record


def fold_rows(rows: Iterable[ResultRow], fold: SampleFold) -> Iterator[ResultRow]:
    """Yield one row for the samples of each row of the input, once all of them have ended.

    Args:
        rows: Rows of the samples, in their order.
        fold: How the answers are folded.
    """
    for _, some in groupby(rows, lambda row: row["index"] // fold.samples):
        samples = list(some)
        if len(samples) == fold.samples:
            yield _fold_row(samples, fold)


_SUMS: Final = (
    "attempts",
    "repairs",
    "reused",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "wasted_tokens",
    "usd",
    "pieces",
)


def _fold_row(samples: Sequence[ResultRow], fold: SampleFold) -> ResultRow:
    """Return the row of all samples: sums of counts and costs, and the longest latency."""
    first = samples[0]
    folded = fold.fold([row.get("output") for row in samples if row["status"] == "done"])
    error_class = None if folded.answers else find_row_error([r["error_class"] for r in samples])
    error = next((row for row in samples if row["error_class"] == error_class), None)
    shown = next((row for row in samples if row.get("prompt") is not None), first)
    sums = {name: [row[name] for row in samples if row[name] is not None] for name in _SUMS}
    return {
        **first,
        "id": find_row_id(first["id"], first.get("sample") or 0),
        "status": "done" if folded.answers else "failed",
        "output": folded.output,
        "samples": folded.answers,
        "agreement": folded.agreement,
        "spread": folded.spread,
        TIES: [vote.field for vote in folded.votes if vote.is_tie],
        "error_class": error_class,
        "error": None if error_class is None or error is None else error["error"],
        "reasoning": None,
        "raw": None,
        "prompt": shown.get("prompt"),
        **{name: _get_common(samples, name) for name in ("endpoint", "model")},
        **{name: sum(values) if values else None for name, values in sums.items()},
        "latency_s": max(row["latency_s"] or 0.0 for row in samples),
        "finished_at": max(row["finished_at"] or "" for row in samples) or None,
    }


def _get_common(rows: Sequence[ResultRow], name: str) -> Json:
    """Return the value that all rows have; None if they differ."""
    value = rows[0].get(name)
    return value if all(row.get(name) == value for row in rows) else None


def _name_sample(row: ResultRow) -> ResultRow:
    sample = row.get("sample") or 0
    return {**row, "row_id": find_row_id(row["id"], sample), "sample": sample + 1}


def make_result_layout(
    schema: Mapping[str, Json] | None,
    store: ItemStore,
    optional: Collection[str] = (),
    fold: SampleFold | None = None,
    certain: bool = False,
) -> ResultLayout:
    """Return the columns of a run's results.

    Args:
        schema: The task's JSON Schema, or None for free text.
        store: The run's items.
        optional: Names of optional columns.
        fold: How the samples of a row are folded; None gives each item a row.
        certain: Whether records have the certainty of a field.
    """
    parts = {"pieces": INTEGER} if _has_parts(store) else {}
    if fold is not None:
        return make_layout(
            fold.fold_schema(schema),
            store.types,
            store.id_column,
            tuple(optional),
            {
                "samples": INTEGER,
                **{
                    name: shape
                    for name, kind in (("agreement", "vote"), ("spread", "mean"))
                    if (shape := _make_figure_type(fold.rule, kind)) is not None
                },
                **parts,
            },
        )
    further = {"row_id": FREE_TEXT, "sample": INTEGER} if store.samples > 1 else {}
    further |= {"certainty": NUMBER} if certain else {}
    return make_layout(schema, store.types, store.id_column, tuple(optional), further | parts)


def _has_parts(store: ItemStore) -> bool:
    """Return True if items are parts of documents (``input.split``)."""
    if PART_COLUMN not in store.types.names:
        return False
    place = store.types.field(PART_COLUMN).type
    return pa.types.is_struct(place) and set(PART_FIELDS).issubset(field.name for field in place)


def _make_figure_type(rule: FoldRule, kind: str) -> CellType | None:
    """Return the type of a figure that fields of one kind of fold have; None if there are none."""
    if rule.kind != "fields":
        return NUMBER if rule.kind == kind else None
    parts = {name: _make_figure_type(one, kind) for name, one in rule.fields.items()}
    found = tuple((name, part) for name, part in parts.items() if part is not None)
    return CellType("struct", found) if found else None


@contextmanager
def open_result_source(
    folder: RunFolder, optional: Collection[str] = (), *, samples: bool = False
) -> Iterator[ResultSource]:
    """Open the results of a run for reading; the run may be going on.

    Settings that results do not need, such as keys of endpoints, are not resolved.

    Args:
        folder: The run's folder.
        optional: Names of optional columns.
        samples: Whether each sample has a row, in place of one for all samples of a row.

    Raises:
        ConfigurationError: The settings cannot be read, or a variable in the prompt is not set; or
            there are no samples, or the folder is that of a pipeline.
        JournalError: The journal, the items or the aggregate are damaged.
    """
    from ...backends.storage.journal import Journal  # noqa: PLC0415 - `check` needs layouts only

    about = folder.read_provenance()
    if folder.is_pipeline:
        msg = (
            f"{folder.path}: is a pipeline; give the folder of one of its stages "
            f"({', '.join(about['stages'])}), e.g. {folder.stages / about['stages'][0]}"
        )
        raise ConfigurationError(msg)
    run: RunIds = get_run_ids(about)
    extents = read_extents(folder)
    settings = read_settings(folder.settings).data
    prompts = read_prompts(settings, str(folder.settings)) if "prompt" in optional else None
    with (
        ItemStore(folder.items) as store,
        Journal(folder.journal, run, about["input"]["items"], extents) as journal,
    ):
        if samples and store.samples == 1:
            msg = f"{folder.path}: each row was asked once (task.samples), so it has no samples"
            raise ConfigurationError(msg)
        schema = get_at_path(settings, ("task", "schema"))
        schema = schema if isinstance(schema, dict) else None
        is_folded = store.samples > 1 and not samples
        fold = SampleFold.from_task(settings.get("task") or {}) if is_folded else None
        certain = get_at_path(settings, ("task", "certainty")) is not None
        layout = make_result_layout(schema, store, optional, fold, certain)
        priced = journal.total_usage().nano_usd > 0
        yield ResultSource(journal, store, layout, priced, prompts, fold)


def list_asked_columns(prompt: ItemPrompt, layout: ResultLayout) -> set[str]:
    """Return the columns of the results that are in the prompt, by their names there."""
    given = layout.input_names()
    found = (split_column(name, given) for name in prompt.columns)
    return {given[column] for column, _ in filter(None, found)}


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
