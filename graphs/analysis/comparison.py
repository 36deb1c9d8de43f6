"""Comparison of two runs over the same items: agreement, gold figures, cost and latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from ...backends.budget.cost import Cost, read_cost
from ...backends.budget.price import read_price
from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import find_properties
from ...backends.core.money import NANO_PER_USD
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json, Row
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.results_schema import INPUT_ROW
from ...backends.storage.run_folder import RunFolder, get_run_ids, read_evaluation
from ...configs.evaluation import (
    Evaluation,
    find_gold_column,
    read_number,
    resolve_evaluation,
)
from ...configs.raw_settings import get_at_path, read_settings
from ..run.fingerprint import diff_settings
from ..run.result_rows import ResultSource, open_result_source
from ..run.statistics import (
    Figure,
    Floats,
    Integers,
    LabelPairs,
    agree_on_labels,
    compare_numbers,
    mcnemar,
    mean_difference,
    share,
)

Change: TypeAlias = Literal["changed", "only_a", "only_b", "same"]

_MOST_LABELS: Final = 500
"""Labels beyond which only the share of equal values is computed."""
_LONGEST: Final = 200
"""Characters of a text that is kept while runs are compared; of a longer one, its digest."""
_ROW_NUMBERS: Final = 1_000
"""Ids that are looked at to see whether they are row numbers."""
_SHOWN_IDS: Final = 3


@dataclass(frozen=True, slots=True)
class RunSide:
    """One of the two runs.

    Attributes:
        folder: Its folder.
        provenance: Its provenance.
        counts: Its items: all, done, failed, open.
        cost: Its cost.
        latencies: Median and 95th percentile in seconds over the items that both answered; None
            without any.
    """

    folder: RunFolder
    provenance: Mapping[str, Any]
    counts: Mapping[str, int]
    cost: Cost
    latencies: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain data."""
        usage, about, price = self.cost.usage, self.provenance, read_price(self.provenance)
        nano = self.cost.nano_usd
        median, late = self.latencies or (None, None)
        return {
            "folder": str(self.folder.path),
            "run": about["run"],
            "name": about["name"],
            "model": about["model"],
            "simulated": bool(about["simulated"]),
            **self.counts,
            "requests": usage.requests,
            "reused": usage.reused,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "usd": None if nano is None else nano / NANO_PER_USD,
            "price": None if price is None else str(price),
            "latency_median_s": median,
            "latency_p95_s": late,
        }


@dataclass(frozen=True, slots=True)
class ChangedItem:
    """An item in both runs, with both values of a field."""

    id: str
    change: Change
    a: Json
    b: Json

    def to_json(self) -> dict[str, Any]:
        """Return the item as plain data."""
        return {"id": self.id, "change": self.change, "a": self.a, "b": self.b}


@dataclass(frozen=True, slots=True)
class FieldComparison:
    """A field of both runs.

    Attributes:
        field: Its name.
        kind: Whether labels or numbers are compared.
        both: Items with a value in both runs.
        only_a: Items with a value in the first run only.
        only_b: Items with a value in the second run only.
        changed: Items with different values.
        figures: Figures of the items with both values.
        rows: Items, changed ones first, up to a limit.
    """

    field: str
    kind: str
    both: int
    only_a: int
    only_b: int
    changed: int
    figures: Mapping[str, Figure]
    rows: tuple[ChangedItem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the field as plain data."""
        return {
            "field": self.field,
            "kind": self.kind,
            "both": self.both,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "changed": self.changed,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True, slots=True)
class GoldComparison:
    """The figures of both runs against the same gold values.

    Attributes:
        gold: Column with the gold values.
        field: Field of the answers.
        a: Figures of the first run, as in ``evaluation.json``.
        b: Figures of the second run.
        difference: Accuracy or mean absolute error of the second run minus that of the first one,
            over the items that both answered; None if the input has no such gold column.
        only_a: Items that only the first run has right; None for numbers.
        only_b: Items that only the second run has right.
        p: P value of McNemar's exact test; None for numbers.
    """

    gold: str
    field: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    difference: Figure | None = None
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "gold": self.gold,
            "field": self.field,
            "a": dict(self.a),
            "b": dict(self.b),
            "difference": None if self.difference is None else self.difference.to_json(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "mcnemar_p": self.p,
        }


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs over the same items.

    Attributes:
        a: The first run.
        b: The second run.
        common: Items of both.
        only_a: Items of the first run only.
        only_b: Items of the second run only.
        different: Items of both whose columns differ.
        fields: The fields that both answers have.
        fields_only_a: Fields of the first run's answers only.
        fields_only_b: Fields of the second run's answers only.
        gold: Figures against gold values that both runs have.
        settings: Differences of the settings that decide the answers, a line each.
        warnings: What a reader must know.
    """

    a: RunSide
    b: RunSide
    common: int
    only_a: int
    only_b: int
    different: int
    fields: tuple[FieldComparison, ...]
    fields_only_a: tuple[str, ...] = ()
    fields_only_b: tuple[str, ...] = ()
    gold: tuple[GoldComparison, ...] = ()
    settings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "version": 1,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "items": {
                "common": self.common,
                "only_a": self.only_a,
                "only_b": self.only_b,
                "different_input": self.different,
            },
            "fields": [one.to_json() for one in self.fields],
            "fields_only_a": list(self.fields_only_a),
            "fields_only_b": list(self.fields_only_b),
            "gold": [one.to_json() for one in self.gold],
            "settings": list(self.settings),
            "warnings": list(self.warnings),
        }


def compare_runs(
    a: RunFolder, b: RunFolder, fields: Sequence[str] = (), limit: int = 20
) -> RunComparison:
    """Compare two runs; blocks. Both are only read, and may be going on.

    Args:
        a: The first run.
        b: The second run.
        fields: Fields of the answers; none takes all texts, numbers and booleans that both have.
        limit: Items of each field to list.

    Raises:
        ConfigurationError: The runs have different items, or there is no such field.
        JournalError: A run is damaged.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(open_result_source(one)) for one in (a, b)]
        return _Comparer((a, b), sources).compare(fields, limit)


class _Track:
    """A field of both runs, item by item: numbers, or codes of labels; NaN where there is none."""

    def __init__(self, evaluation: Evaluation, sizes: tuple[int, int]) -> None:
        self.evaluation = evaluation
        self.codes = dict[str, int]()
        self.values = tuple(np.full(size, np.nan) for size in sizes)
        self.gold = np.full(sizes[0], np.nan)

    def set(self, side: int, index: int, output: Json) -> None:
        self.values[side][index] = self._encode(self.evaluation.field.pick(output, {}))

    def set_gold(self, index: int, row: Row) -> None:
        self.gold[index] = self._encode(self.evaluation.pick_gold(row), is_gold=True)

    def _encode(self, value: Json, *, is_gold: bool = False) -> float:
        if self.evaluation.kind == "numeric":
            number = read_number(value)
            return float("nan") if number is None else number
        label = self.evaluation.read_label(value, is_gold=is_gold)
        if label is None:
            return float("nan")
        if len(label) > _LONGEST:
            label = blake2b(label.encode(errors="surrogatepass")).hexdigest()
        return self.codes.setdefault(label, len(self.codes))


class _Comparer:
    """Reads two runs once each, and joins their items."""

    def __init__(self, runs: Sequence[RunFolder], sources: Sequence[ResultSource]) -> None:
        self._runs, self._sources = runs, sources
        self._about = [run.read_provenance() for run in runs]
        self._settings = [read_settings(run.settings).data for run in runs]
        self._ids = [list(source.store.iter_ids()) for source in sources]
        self._sizes = (len(self._ids[0]), len(self._ids[1]))
        places = {name: n for n, name in enumerate(self._ids[1])}
        joined = [(n, places[name]) for n, name in enumerate(self._ids[0]) if name in places]
        self._at = np.array(joined, np.int64).reshape(-1, 2).T
        self._latency = [np.full(size, np.nan) for size in self._sizes]

    def compare(self, names: Sequence[str], limit: int) -> RunComparison:
        different = self._check_items()
        evaluations = self._choose_fields(names)
        tracks = [_Track(one, self._sizes) for one in evaluations]
        gold, entries = self._find_gold()
        for side, source in enumerate(self._sources):
            self._read(side, source, [*tracks, *gold], gold)
        known = [self._list_fields(side) for side in (0, 1)]
        common = self._at.shape[1]
        return RunComparison(
            a=self._describe(0),
            b=self._describe(1),
            common=common,
            only_a=self._sizes[0] - common,
            only_b=self._sizes[1] - common,
            different=different,
            fields=tuple(self._compare_field(track, limit) for track in tracks),
            fields_only_a=tuple(name for name in known[0] if name not in known[1]),
            fields_only_b=tuple(name for name in known[1] if name not in known[0]),
            gold=tuple(
                self._compare_gold(
                    *pair, next((t for t in gold if _key(t) == _key_of(pair[0])), None)
                )
                for pair in entries
            ),
            settings=tuple(self._diff_settings()),
            warnings=tuple(self._find_warnings(different)),
        )

    # -- items -----------------------------------------------------------------------------

    def _check_items(self) -> int:
        """Return how many items of both runs have different columns.

        Raises:
            ConfigurationError: The runs have different items.
        """
        common, (a, b) = self._at.shape[1], self._runs
        if not common:
            first, second = (", ".join(ids[:_SHOWN_IDS]) for ids in self._ids)
            raise ConfigurationError(
                f"{a.path} has {count_nouns(self._sizes[0], 'item')} ({first}, …) and {b.path} has "
                f"{self._sizes[1]:,} ({second}, …), but no id is in both: compare runs over the "
                "same items, with the same input.id"
            )
        stores = [source.store for source in self._sources]
        if stores[0].digest == stores[1].digest:
            return 0
        shared = sorted(set(stores[0].columns) & set(stores[1].columns))
        digests = [_digest_rows(store, shared) for store in stores]
        different = int((digests[0][self._at[0]] != digests[1][self._at[1]]).sum())
        if 2 * different > common and all(map(_are_row_numbers, self._ids)):
            raise ConfigurationError(
                f"{a.path} and {b.path} number their rows, and {different:,} of the {common:,} "
                "items with the same number have different columns: they are not the same items; "
                "set input.id in both runs"
            )
        return different

    def _find_warnings(self, different: int) -> Iterator[str]:
        simulated = [bool(about["simulated"]) for about in self._about]
        if all(simulated):
            yield "SIMULATED: the answers of both runs are simulated and say nothing about a model"
        elif any(simulated):
            path = self._runs[simulated.index(True)].path
            yield f"SIMULATED: the answers of {path} are simulated and say nothing about a model"
        if different:
            yield (
                f"{different:,} of the {self._at.shape[1]:,} items in both runs have other values "
                "in the columns of the input, so their questions may differ"
            )
        for run, source in zip(self._runs, self._sources, strict=True):
            if still_open := source.journal.count_items().open:
                yield f"{run.path}: {count_nouns(still_open, 'open item')}"

    # -- fields ----------------------------------------------------------------------------

    def _schema(self, side: int) -> Mapping[str, Any] | None:
        found = get_at_path(self._settings[side], ("task", "schema"))
        return found if isinstance(found, Mapping) else None

    def _list_fields(self, side: int) -> dict[str, Evaluation]:
        """Return the fields of a run's answers that have one value per item."""
        schema = self._schema(side)
        names = [
            f"output.{name}"
            for name in find_properties(schema or {})
            if "." not in name and not name.endswith("[]")
        ]
        found = dict[str, Evaluation]()
        for name in names or ["output"]:
            try:
                one = resolve_evaluation("", name, schema, None)
            except ConfigurationError:  # a list or an object
                continue
            found[one.field_name] = one
        return found

    def _choose_fields(self, names: Sequence[str]) -> list[Evaluation]:
        """Return the fields to compare.

        Raises:
            ConfigurationError: An answer has no such field, or nothing can be compared.
        """
        if names:
            return [
                self._join_kinds(*(self._resolve(name, side) for side in (0, 1))) for name in names
            ]
        a, b = (self._list_fields(side) for side in (0, 1))
        both = [self._join_kinds(one, b[name]) for name, one in a.items() if name in b]
        if not both:
            raise ConfigurationError(
                f"the answers have no field in common ({self._runs[0].path}: {_list(a)}; "
                f"{self._runs[1].path}: {_list(b)}); name a field inside others with --field"
            )
        return both

    def _resolve(self, name: str, side: int) -> Evaluation:
        try:
            return resolve_evaluation("", name, self._schema(side), None)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"--field {name}: {self._runs[side].path}: {error.message}"
            ) from None

    @staticmethod
    def _join_kinds(a: Evaluation, b: Evaluation) -> Evaluation:
        """Return how a field is read in both runs: as numbers if it is a number in both."""
        if a.kind == b.kind:
            return a
        return Evaluation("", a.field, "categorical")

    def _read(
        self, side: int, source: ResultSource, tracks: Sequence[_Track], gold: Sequence[_Track]
    ) -> None:
        latency = self._latency[side]
        for row in source.iter_rows():
            if row["status"] != "done":
                continue
            index, output, seconds = row["index"], row["output"], row.get("latency_s")
            if seconds is not None and not row.get("reused"):
                latency[index] = seconds
            for track in tracks:
                track.set(side, index, output)
            if side == 0:
                for track in gold:
                    track.set_gold(index, row[INPUT_ROW])

    def _compare_field(self, track: _Track, limit: int) -> FieldComparison:
        a, b = (values[at] for values, at in zip(track.values, self._at, strict=True))
        has_a, has_b = ~np.isnan(a), ~np.isnan(b)
        both = has_a & has_b
        changed = both & (a != b)
        if track.evaluation.kind == "numeric":
            figures = {"agreement": share(int((both & ~changed).sum()), int(both.sum()))}
            figures |= compare_numbers(a[both], b[both])
            figures["mean_difference"] = mean_difference(b[both], a[both])
        else:
            figures = self._agree(track, a[both].astype(np.int64), b[both].astype(np.int64))
        return FieldComparison(
            field=track.evaluation.field_name,
            kind=track.evaluation.kind,
            both=int(both.sum()),
            only_a=int((has_a & ~has_b).sum()),
            only_b=int((has_b & ~has_a).sum()),
            changed=int(changed.sum()),
            figures=figures,
            rows=tuple(self._list_rows(track, a, b, limit)),
        )

    @staticmethod
    def _agree(track: _Track, a: Integers, b: Integers) -> dict[str, Figure]:
        if len(track.codes) > _MOST_LABELS:
            return {"agreement": share(int((a == b).sum()), len(a))}
        return agree_on_labels(LabelPairs.count(a, b, len(track.codes)))

    def _list_rows(self, track: _Track, a: Floats, b: Floats, limit: int) -> Iterator[ChangedItem]:
        """Yield items with a value: changed ones, those with one value, then the others.

        Changed numbers are in the order of their difference, the largest first.
        """
        has_a, has_b = ~np.isnan(a), ~np.isnan(b)
        changed = np.flatnonzero(has_a & has_b & (a != b))
        if track.evaluation.kind == "numeric":
            changed = changed[np.argsort(-np.abs(a[changed] - b[changed]), kind="stable")]
        groups: list[tuple[Change, Integers]] = [
            ("changed", changed),
            ("only_a", np.flatnonzero(has_a & ~has_b)),
            ("only_b", np.flatnonzero(has_b & ~has_a)),
            ("same", np.flatnonzero(has_a & (a == b))),
        ]
        for change, places in groups:
            for place in places[:limit].tolist():
                first, second = self._at[:, place].tolist()
                values = (self._value(track, 0, first), self._value(track, 1, second))
                yield ChangedItem(self._ids[0][first], change, *values)
            limit -= min(limit, len(places))

    def _value(self, track: _Track, side: int, index: int) -> Json:
        journal = self._sources[side].journal
        if not journal.is_done(index):
            return None
        return track.evaluation.field.pick(journal.read_record(index).get("output"), {})

    # -- gold values, cost and latency ---------------------------------------------------------

    def _find_gold(self) -> tuple[list[_Track], list[_Entries]]:
        """Return the comparisons with gold values that both runs have, and how to read them."""
        kept = [read_evaluation(run) or {"evaluations": []} for run in self._runs]
        a, b = ({_key_of(one): one for one in each["evaluations"]} for each in kept)
        entries = [(one, b[key]) for key, one in a.items() if key in b]
        inputs = self._sources[0].store.summary().row_schema
        tracks = list[_Track]()
        for first, second in entries:
            is_here = find_gold_column(first["gold"], inputs["properties"]) is not None
            if is_here and first.get("source") == second.get("source") == "input":
                one = resolve_evaluation(first["gold"], first["field"], self._schema(0), inputs)
                if one.kind == first["kind"] == second["kind"]:
                    tracks.append(_Track(one, self._sizes))
        return tracks, entries

    def _compare_gold(
        self, first: Mapping[str, Any], second: Mapping[str, Any], track: _Track | None
    ) -> GoldComparison:
        found = GoldComparison(first["gold"], first["field"], first["metrics"], second["metrics"])
        if track is None:
            return found
        a, b = (values[at] for values, at in zip(track.values, self._at, strict=True))
        gold = track.gold[self._at[0]]
        known = ~(np.isnan(a) | np.isnan(b) | np.isnan(gold))
        a, b, gold = a[known], b[known], gold[known]
        if track.evaluation.kind == "numeric":
            difference = mean_difference(np.abs(b - gold), np.abs(a - gold))
            return replace(found, difference=difference)
        right_a, right_b = a == gold, b == gold
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        return replace(
            found,
            difference=mean_difference(right_b.astype(np.float64), right_a.astype(np.float64)),
            only_a=only_a,
            only_b=only_b,
            p=mcnemar(only_a, only_b),
        )

    def _describe(self, side: int) -> RunSide:
        run, about, journal = self._runs[side], self._about[side], self._sources[side].journal
        counted = journal.count_items()
        latency = self._latency[side][self._at[side]]
        other = self._latency[1 - side][self._at[1 - side]]
        seconds = latency[~(np.isnan(latency) | np.isnan(other))]
        latencies = None
        if len(seconds):
            median, late = np.percentile(seconds, [50, 95]).tolist()
            latencies = (median, late)
        return RunSide(
            folder=run,
            provenance=about,
            counts={
                "items": self._sizes[side],
                "done": counted.done,
                "failed": counted.failed,
                "open": counted.open,
            },
            cost=read_cost(run, get_run_ids(about), journal.usage_by_session),
            latencies=latencies,
        )

    def _diff_settings(self) -> list[str]:
        models = [about["model"] for about in self._about]
        b = dict(self._settings[1])
        b["model"] = {**(b.get("model") or {}), "name": models[1]}
        return diff_settings(self._settings[0], b, models[0])


_Entries: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The same comparison in the evaluations of both runs."""


def _key_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["gold"], entry["field"]


def _key(track: _Track) -> tuple[str, str]:
    return track.evaluation.gold, track.evaluation.field_name


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"


def _are_row_numbers(ids: Sequence[str]) -> bool:
    return all(name == str(n) for n, name in enumerate(ids[:_ROW_NUMBERS], start=1))


def _digest_rows(store: ItemStore, columns: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return a digest of some columns of each item."""
    found = np.zeros(len(store), np.uint64)
    for n, (row, _) in enumerate(store.iter_rows(range(len(store)))):
        data = orjson.dumps([row.get(name) for name in columns], option=orjson.OPT_SORT_KEYS)
        found[n] = int.from_bytes(blake2b(data, digest_size=8).digest())
    return found
