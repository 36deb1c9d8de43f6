"""Evaluation of a run: its answers compared with gold values, and the file that keeps it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...backends.core.errors import ConfigurationError, InputError
from ...backends.core.samples import WHOLE
from ...backends.core.templates import ItemPrompt
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.inputs.base import did_you_mean, format_id
from ...backends.inputs.formats import open_source
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.results_schema import INPUT_ROW, TIES, ResultRow
from ...configs.evaluation import Evaluation, is_in_prompt, read_number, resolve_evaluations
from ...configs.models import InputConfig, RunConfig
from .statistics import Figure, LabelPairs, compare_labels, compare_numbers, f1_scores, share

INPUT: Final = "input"
"""Source of gold values that are in the columns of the input."""

_MOST_LABELS: Final = 500
"""Labels beyond which a field is no label."""
_SHOWN: Final = 5


class ValuePairs:
    """Two values per item, as labels or as numbers; 8 or 16 bytes per item.

    Attributes:
        names: The labels, with their numbers.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        """Start without items.

        Args:
            evaluation: Says how values are read.
        """
        self._evaluation = evaluation
        self._is_numeric = evaluation.kind == "numeric"
        kind = "d" if self._is_numeric else "i"
        self._first, self._second = array(kind), array(kind)
        self.names: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._first)

    def read(self, value: Json, *, is_gold: bool = False) -> float | str | None:
        """Return a value in the form in which it is compared; None if it has none."""
        if self._is_numeric:
            return read_number(value)
        return self._evaluation.read_label(value, is_gold=is_gold)

    def add(self, first: float | str, second: float | str) -> None:
        """Add an item with two values from :meth:`read`."""
        self._first.append(self._encode(first))
        self._second.append(self._encode(second))

    def _encode(self, value: float | str) -> Any:
        if isinstance(value, str):
            return self.names.setdefault(value, len(self.names))
        return value

    def sort_labels(self) -> list[str]:
        """Return the labels: those of the schema in its order, then others by name."""
        declared = [name for name in self._evaluation.labels or () if name in self.names]
        return [*declared, *sorted(self.names.keys() - set(declared))]

    def count(self, labels: Sequence[str]) -> LabelPairs:
        """Return the pairs of labels, counted.

        Args:
            labels: All labels, in the order of their numbers in the result.
        """
        numbers = np.zeros(max(1, len(self.names)), np.int64)
        for number, name in enumerate(labels):
            numbers[self.names[name]] = number
        first, second = (numbers[np.array(one, np.int64)] for one in (self._first, self._second))
        return LabelPairs.count(first, second, len(labels))

    def numbers(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the pairs of numbers."""
        return np.array(self._first), np.array(self._second)


class _Comparison:
    """One comparison: collects the items, and computes the figures."""

    def __init__(self, evaluation: Evaluation, notes: Iterable[str], source: str) -> None:
        self.evaluation, self._source = evaluation, source
        self._notes = list(notes)
        self._pairs = ValuePairs(evaluation)
        self._items = 0
        self._missing: Counter[str] = Counter()
        self._missing_labels: Counter[str] = Counter()
        self._unlabelled = 0
        self._unusable = 0
        self._unknown: Counter[str] = Counter()

    def add(
        self,
        gold: Json,
        output: Json,
        row: Mapping[str, Json],
        cause: str | None,
        ties: Collection[str] = (),
    ) -> None:
        """Add an item.

        Args:
            gold: Its gold value.
            output: Its answer.
            row: Its columns.
            cause: Why it has no answer, or None.
            ties: Names of the fields on which its samples do not agree.
        """
        known = self._pairs.read(gold, is_gold=True)
        if known is None:
            self._unlabelled += 1
            self._unusable += gold is not None and gold != ""
            return
        self._items += 1
        labels = self.evaluation.labels
        if labels is not None and known not in labels and len(self._unknown) <= _MOST_LABELS:
            self._unknown[str(known)] += 1
        value = None
        if cause is None:
            value = self._pairs.read(self.evaluation.field.pick(output, dict(row)))
        if value is None:
            self._missing[cause or ("tie" if self._is_tie(ties) else "no_value")] += 1
            if isinstance(known, str) and len(self._missing_labels) <= _MOST_LABELS:
                self._missing_labels[known] += 1
            return
        self._pairs.add(known, value)

    def _is_tie(self, ties: Collection[str]) -> bool:
        """Return True if a vote on the field, or on an object around it, has no winner."""
        path = self.evaluation.field
        names = {".".join(path.keys[:end]) or WHOLE for end in range(len(path.keys) + 1)}
        return path.source == "output" and not names.isdisjoint(ties)

    def to_json(self) -> dict[str, Any]:
        evaluation = self.evaluation
        found: dict[str, Any] = {
            "gold": evaluation.gold,
            "field": evaluation.field_name,
            "kind": evaluation.kind,
            "source": self._source,
            "items": self._items,
            "answered": len(self._pairs),
            "missing": self._items - len(self._pairs),
            "missing_by_cause": dict(self._missing),
            "unlabelled": self._unlabelled,
        }
        metrics: dict[str, Figure] = {}
        classes: dict[str, Any] = {}
        confusion: dict[str, Any] = {"labels": [], "counts": []}
        if evaluation.kind == "numeric":
            metrics = compare_numbers(*self._pairs.numbers())
        elif len(self._pairs.names) <= _MOST_LABELS:
            for name in self._missing_labels:  # a class without an answered item is shown too
                self._pairs.names.setdefault(name, len(self._pairs.names))
            labels = self._pairs.sort_labels()
            pairs = self._pairs.count(labels)
            metrics = self._label_metrics(pairs)
            classes = self._describe_classes(labels, pairs)
            confusion = {"labels": labels, "counts": pairs.matrix().tolist()}
        return found | {
            "metrics": {name: figure.to_json() for name, figure in metrics.items()},
            "classes": classes,
            "confusion": confusion,
            "notes": [*self._notes, *self._find_notes()],
        }

    def _label_metrics(self, pairs: LabelPairs) -> dict[str, Figure]:
        figures = compare_labels(pairs)
        right = int(pairs.sums()[0].sum())
        return {
            "accuracy": figures.pop("accuracy"),
            "accuracy_missing_wrong": share(right, self._items),
        } | figures

    def _describe_classes(self, labels: Sequence[str], pairs: LabelPairs) -> dict[str, Any]:
        hits, gold, answered = (one.tolist() for one in pairs.sums())
        f1 = f1_scores(pairs)
        classes = dict[str, Any]()
        for number, name in enumerate(labels):
            figures = {
                "precision": share(hits[number], answered[number]),
                "recall": share(hits[number], gold[number]),
                "f1": f1[number],
            }
            classes[name] = {
                **{key: figure.value for key, figure in figures.items()},
                "support": gold[number],
                "answers": answered[number],
                "missing": self._missing_labels[name],
                "intervals": {key: [figure.low, figure.high] for key, figure in figures.items()},
            }
        return classes

    def _find_notes(self) -> Iterator[str]:
        evaluation = self.evaluation
        if not self._items:
            yield f"no item has a gold value in {evaluation.gold!r}"
        if self._unusable:
            yield (
                f"{self._unusable:,} gold values in {evaluation.gold!r} cannot be read as a "
                f"{'number' if evaluation.kind == 'numeric' else 'label'}; their items are left out"
            )
        if self._unknown:
            yield describe_unknown_labels(evaluation, self._unknown)
        if len(self._pairs.names) > _MOST_LABELS:
            yield (
                f"{evaluation.field_name} and {evaluation.gold!r} have more than {_MOST_LABELS} "
                "different labels, so no figure is computed; compare a field with few labels, or "
                "give it an enum in task.schema"
            )


def describe_unknown_labels(evaluation: Evaluation, unknown: Mapping[str, int]) -> str:
    """Return which gold labels the field cannot have, with the labels that are similar."""
    known = evaluation.labels or ()
    folded = {label.casefold(): label for label in known}
    parts = list[str]()
    for name, count in sorted(unknown.items(), key=lambda one: -one[1])[:_SHOWN]:
        close = get_close_matches(name.casefold(), folded, n=1)
        hint = f"; did you mean {folded[close[0]]!r}? Case counts" if close else ""
        parts.append(f"{name!r} ({count_nouns(count, 'item')}{hint})")
    more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
    return (
        f"gold labels in {evaluation.gold!r} that {evaluation.field_name} cannot have: "
        f"{', '.join(parts)}{more}; such items count as wrong (labels: {', '.join(known[:20])})"
    )


class Evaluator:
    """Compares the answers of a run with gold values, item by item."""

    def __init__(
        self,
        evaluations: Iterable[Evaluation],
        notes: Mapping[str, Sequence[str]] | None = None,
        gold: Mapping[str, Json] | None = None,
        source: str = INPUT,
    ) -> None:
        """Start without items.

        Args:
            evaluations: The comparisons.
            notes: By gold column, what a reader of the figures must know.
            gold: Gold values by the id of the item; None takes those in the columns of the input.
            source: Where they are from: ``input``, or the name of a file.
        """
        self._comparisons = [
            _Comparison(one, (notes or {}).get(one.gold, ()), source) for one in evaluations
        ]
        self._gold = gold

    def watch(self, rows: Iterable[ResultRow]) -> Iterator[ResultRow]:
        """Yield the rows of results unchanged, and add their items."""
        for row in rows:
            self.add(row)
            yield row

    def add(self, row: ResultRow) -> None:
        """Add an item that has ended."""
        cause = None if row.get("status") == "done" else "failed"
        columns, ties = row.get(INPUT_ROW) or {}, row.get(TIES) or ()
        self._add(str(row.get("id")), row.get("output"), columns, cause, ties)

    def add_open(self, name: str, row: Mapping[str, Json]) -> None:
        """Add an item that has not ended."""
        self._add(name, None, row, "unfinished")

    def _add(
        self,
        name: str,
        output: Json,
        row: Mapping[str, Json],
        cause: str | None,
        ties: Collection[str] = (),
    ) -> None:
        for one in self._comparisons:
            gold = one.evaluation.pick_gold(row) if self._gold is None else self._gold.get(name)
            one.add(gold, output, row, cause, ties)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the comparisons with their figures; takes seconds for a million items."""
        return [one.to_json() for one in self._comparisons]


def make_evaluator(config: RunConfig, store: ItemStore) -> Evaluator:
    """Return what compares the answers of a run as its settings say.

    Raises:
        ConfigurationError: A field does not exist, or cannot be compared.
    """
    inputs = store.summary().row_schema
    found = resolve_evaluations(config.evaluate, config.result_schema, inputs)
    return Evaluator(found, find_leaks(config.parse_prompt(), found, inputs))


def find_leaks(
    prompt: ItemPrompt, evaluations: Iterable[Evaluation], inputs: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return, by gold column, that the prompt shows it to the model."""
    return {
        one.gold: [
            f"the prompt shows the gold column {one.gold!r} to the model, so the figures do not "
            "say what the model knows"
        ]
        for one in evaluations
        if is_in_prompt(one.gold, prompt, inputs["properties"])
    }


def check_gold_values(config: RunConfig, store: ItemStore) -> list[str]:
    """Return a line for each comparison, and for what is rarely intended in its gold values.

    Args:
        config: The settings, whose fields were checked.
        store: The items.

    Raises:
        JournalError: The items are damaged.
    """
    inputs = store.summary().row_schema
    found = resolve_evaluations(config.evaluate, config.result_schema, inputs)
    evaluator = Evaluator(found, find_leaks(config.parse_prompt(), found, inputs))
    rows = range(0, len(store), store.samples)  # the samples of a row share its gold values
    for row, _ in store.iter_rows(rows) if found else ():
        evaluator.add_open("", row)
    lines = list[str]()
    for one in evaluator.to_json():
        lines.append(
            f"evaluate: {one['field']} against {one['gold']!r} ({one['kind']}): {one['items']:,} "
            f"of {len(rows):,} items have a gold value"
        )
        lines += [f"WARNING: evaluate: {note}" for note in one["notes"]]
    return lines


def read_gold_file(path: Path, id_column: str, gold: str) -> dict[str, Json]:
    """Return the gold values of a file by id.

    Args:
        path: A file of any format of the input.
        id_column: Column with the ids of the items.
        gold: Column with the gold values.

    Raises:
        ConfigurationError: The file cannot be read, lacks a column, or has two values for an id.
    """
    where = f"--gold-file {path}"
    if not path.is_file():
        raise ConfigurationError(f"{where}: there is no such file")
    values = dict[str, Json]()
    try:
        source = open_source(InputConfig(path=str(path)), ())
        for position, row in source.rows():
            for column in (id_column, gold):
                if column not in row:
                    listed = ", ".join(row)
                    msg = (
                        f"{where}: no column {column!r} in {source.describe_position(position)} "
                        f"(it has {listed}){did_you_mean(column, row)}; name the id column with "
                        "--gold-id and the gold column with --gold"
                    )
                    raise ConfigurationError(msg)
            name = format_id(row[id_column])
            if name is None:
                place = source.describe_position(position)
                msg = f"{where}: the id in {place} is neither text nor a number"
                raise ConfigurationError(msg)
            if name in values and values[name] != row[gold]:
                msg = (
                    f"{where}: two gold values for {name!r}: {values[name]!r} and {row[gold]!r}; "
                    "keep one"
                )
                raise ConfigurationError(msg)
            values[name] = row[gold]
    except InputError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None
    return values
