"""Items of a stage: the results of the stage before, selected and joined, read from disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...backends.core.errors import ConfigurationError, InputError
from ...backends.core.samples import SampleFold, find_row_error
from ...backends.core.selection import Selection
from ...backends.core.types import Json, Row
from ...backends.inputs.column_types import describe_columns
from ...backends.inputs.item_store import ItemStore, NamedRows
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder, get_run_ids
from ...configs.raw_settings import get_at_path, read_settings
from ...nodes.operators import FailedItem


@dataclass(slots=True)
class PassedOn:
    """What became of the results of a stage on their way to the next one.

    Attributes:
        passed: Results that are items of the next stage.
        failed: Failed items, which are never passed on.
        unselected: Results that do not fulfil ``where``.
    """

    passed: int = 0
    failed: int = 0
    unselected: int = 0

    def to_json(self) -> dict[str, Json]:
        """Return the counts as plain data."""
        return {"passed": self.passed, "failed": self.failed, "unselected": self.unselected}


class StageReader:
    """Results of one finished stage, by index or id; close it after use.

    Args:
        name: The name of the stage.
        path: Its folder.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, folder = name, RunFolder(path)
        about = folder.read_provenance()
        with ExitStack() as stack:
            self.store = stack.enter_context(ItemStore(folder.items))
            self.journal = stack.enter_context(
                Journal(folder.journal, get_run_ids(about), len(self.store))
            )
            self._stack = stack.pop_all()
        task = get_at_path(read_settings(folder.settings).data, ("task",))
        task = task if isinstance(task, Mapping) else {}
        schema = task.get("schema")
        self._fold = SampleFold.from_task(task) if self.store.samples > 1 else None
        schema = schema if isinstance(schema, Mapping) else None
        self.answer_schema = schema if self._fold is None else self._fold.fold_schema(schema)
        self._indices: dict[str, int] | None = None

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def find_output(self, item: str) -> Json:
        """Return the answer about the item of an id; None if it failed or there is none."""
        if self._indices is None:
            self._indices = {name: index for index, name in enumerate(self.store.iter_ids())}
        index = self._indices.get(item)
        return None if index is None else self.read_result(index)[2]

    def list_ended(self) -> list[int]:
        """Return the indices of the items that have ended; of samples, the first ones of rows."""
        rows = range(0, len(self.store), self.store.samples)
        return [index for index in rows if self._is_ended(index)]

    def _is_ended(self, index: int) -> bool:
        return all(map(self.journal.is_finished, range(index, index + self.store.samples)))

    def iter_failed(self) -> Iterator[FailedItem]:
        """Yield the failed items; with samples, the rows of which no sample has an answer."""
        samples, journal = self.store.samples, self.journal
        found = {
            n - n % samples for name in journal.count_failures() for n in journal.find_failed(name)
        }
        for index in sorted(found):
            if not self._is_ended(index) or self.read_result(index)[1] != "failed":
                continue
            records = [journal.read_record(index + n) for n in range(samples)]
            name = find_row_error([record["error_class"] for record in records])
            error = next(one["error"] for one in records if one["error_class"] == name)
            (item,) = self.store.read(index, index + 1)
            yield FailedItem(item, str(name), str(error))

    def read_result(self, index: int) -> tuple[str, str, Json]:
        """Return id, status and answer of an item; with samples, of its row, whose first it is.

        An item that has not ended counts as failed.
        """
        if not self._is_ended(index):
            return "", "failed", None
        records = [self.journal.read_record(index + n) for n in range(self.store.samples)]
        name, outputs = (
            str(records[0]["id"]),
            [record["output"] for record in records if record["status"] == "done"],
        )
        if not outputs:
            return name, "failed", None
        return name, "done", outputs[0] if self._fold is None else self._fold.fold(outputs).output


@dataclass(frozen=True)
class StageRows:
    """The items of a stage from the results of an earlier one.

    Attributes:
        root: Folder of the pipeline.
        source: Name of the stage whose results they are.
        where: Conditions on its results, or None.
        joined: Names of further stages whose answers are added by the id of the item.
        counts: What became of the results, once the rows were read.
    """

    root: Path
    source: str
    where: str | None = None
    joined: Sequence[str] = ()
    counts: PassedOn = field(default_factory=PassedOn)

    def open(self) -> NamedRows:
        """Return the rows, which are read when they are written; blocks.

        Raises:
            ConfigurationError: ``where`` cannot be read, or a stage has the name of a column.
            JournalError: The earlier stage is damaged.
        """
        stages = self.root / "stages"
        source = StageReader(self.source, stages / self.source)
        try:
            columns = source.store.columns
            selection = self._parse(source)
            joined = [one for one in self.joined if one not in columns]
            for name in (self.source, *joined):
                if name in source.store.columns:
                    raise ConfigurationError(
                        f"stages: the items of stage {self.source!r} have a column {name!r} "
                        "already, where the answer of that stage belongs; rename the stage"
                    )
            types = {one.name: one.type for one in source.store.types}
            id_column = source.store.id_column
        finally:
            source.close()
        name = f"stage {self.source!r}"
        if self.where is not None:
            name += f" where {self.where}"
        return NamedRows(name, self._iter_rows(selection, joined), types, id_column)

    def describe(self) -> dict[str, Any]:
        """Return the JSON Schema of the rows; blocks.

        Raises:
            JournalError: An earlier stage is damaged.
        """
        stages = self.root / "stages"
        with ExitStack() as stack:
            source = StageReader(self.source, stages / self.source)
            stack.callback(source.close)
            columns = describe_columns(source.store.types)
            found = describe_rows(columns, source.name, source.answer_schema)
            for name in self.joined:
                if name not in source.store.columns:
                    other = StageReader(name, stages / name)
                    stack.callback(other.close)
                    found = describe_rows(found, name, other.answer_schema)
        return found

    def find_none(self) -> PassedOn | None:
        """Return what became of the results if none is passed on, else None; blocks.

        Raises:
            ConfigurationError: ``where`` cannot be read.
            JournalError: The earlier stage is damaged.
        """
        rows = replace(self, joined=(), counts=PassedOn())
        try:
            next(rows.open().iter_entries())
        except InputError:
            return rows.counts
        return None

    def _parse(self, source: StageReader) -> Selection | None:
        if self.where is None:
            return None
        columns = describe_columns(source.store.types)
        try:
            return Selection.parse(self.where, source.answer_schema, columns)
        except ConfigurationError as error:
            raise ConfigurationError(f"stages: where: {error.message}") from None

    def _iter_rows(
        self, selection: Selection | None, joined: Sequence[str]
    ) -> Iterator[tuple[str, Row]]:
        stages = self.root / "stages"
        with ExitStack() as stack:
            source = StageReader(self.source, stages / self.source)
            stack.callback(source.close)
            others = [StageReader(name, stages / name) for name in joined]
            for other in others:
                stack.callback(other.close)
            ended = source.list_ended()
            for index, (row, _) in zip(ended, source.store.iter_rows(ended), strict=True):
                name, status, output = source.read_result(index)
                if status != "done":
                    self.counts.failed += 1
                    continue
                if selection is not None and not selection.holds("done", output, row):
                    self.counts.unselected += 1
                    continue
                self.counts.passed += 1
                row[self.source] = output
                row |= {other.name: other.find_output(name) for other in others}
                yield name, row
        if not self.counts.passed:
            raise InputError(self._explain_none())

    def _explain_none(self) -> str:
        """Return why the stage has no items."""
        counts, why = self.counts, list[str]()
        if counts.failed:
            command = f"fanfold failures {shlex.quote(str(self.root))} --stage {self.source}"
            why.append(f"{counts.failed:,} failed ({command})")
        if counts.unselected:
            do = "does" if counts.unselected == 1 else "do"
            why.append(f"{counts.unselected:,} {do} not fulfil where: {self.where}")
        return f"no result of stage {self.source!r} is passed on: {', '.join(why)}"


def describe_rows(
    columns: Mapping[str, Any], source: str, answer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the JSON Schema of the rows that a stage passes on.

    Args:
        columns: JSON Schema of its own rows.
        source: The name of the stage.
        answer: JSON Schema of its answers; None for free text.
    """
    properties = dict(columns.get("properties", {}))
    properties[source] = {"type": "string"} if answer is None else dict(answer)
    return {**columns, "type": "object", "properties": properties}
