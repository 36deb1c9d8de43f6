"""Validation of rows: columns, ids, limits, SMILES."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import orjson

from ...configs.models import InputConfig, SplitConfig
from ..core.aio import check_stopped
from ..core.errors import InputError
from ..core.fields import split_column
from ..core.text_tokens import split_text
from ..core.types import PART_COLUMN, Json, Row, make_part_id
from ..core.values import MAX_DEPTH, is_too_deep
from .base import (
    ItemEntry,
    OnDuplicate,
    RowSource,
    SkippedRow,
    SmilesCheck,
    format_id,
    missing_column_error,
    open_smiles_check,
)

if TYPE_CHECKING:
    from .column_types import ArrowTypes

_REPORTED: Final = 5


class IdAssigner:
    """Assign ids to the rows of one input, in order.

    It keeps every id (about 100 bytes each) to recognise repeated ones; row numbers do not need
    this memory.
    """

    def __init__(
        self,
        source: RowSource,
        column: str | None,
        on_duplicate: OnDuplicate,
        samples: int = 1,
    ) -> None:
        """Start without any id.

        Args:
            source: The input.
            column: The id column; None for row numbers.
            on_duplicate: How to treat a repeated id.
            samples: Items of each row, whose ids must be free too.
        """
        self._source = source
        self._column = column
        self._on_duplicate = on_duplicate
        self._seen: set[str] = set()
        self._suffixes: dict[str, int] = {}
        self._blank: list[str] = []
        self._repeated: list[str] = []
        self._samples = samples
        self._sampled = dict[str, str]()
        """Ids of rows one of whose samples would have the id of another row, with that id."""

    def read_id(self, number: int, position: int, row: Row) -> str:
        """Return the row's own name, ``""`` when blank.

        Args:
            number: The row's number, from 1.
            position: Its position in the source.
            row: The row, with the id column.

        Raises:
            InputError: The id is neither text nor a number.
        """
        if self._column is None:
            return str(number)
        value = format_id(row[self._column])
        if value is None:
            raise InputError(
                f"{self._source.describe_position(position)}: the id in column {self._column!r} is "
                "neither text nor a number; use another column in input.id"
            )
        return value

    def assign(self, name: str, position: int) -> str | None:
        """Make the id unique.

        Args:
            name: The row's own name.
            position: Its position in the source.

        Returns:
            The id; None when the row is skipped as a duplicate, or will be reported.

        Raises:
            InputError: Enough blank or repeated ids have been found to report them; or a sample
                of another row has this id.
        """
        unique = self._assign(name, position)
        if unique is not None and self._column is not None and self._samples > 1:
            self._check_samples(unique, position)
        return unique

    def _check_samples(self, name: str, position: int) -> None:
        match = _SAMPLE_ID.fullmatch(name)
        other = self._sampled.get(name)
        if match is not None and int(match[2]) <= self._samples:
            self._sampled[match[1]] = name
            if match[1] in self._seen:
                other = match[1]
        if other is None:
            return
        row, sample = sorted((name, other), key=len)
        raise InputError(
            f"{self._source.describe_position(position)}: {sample!r} is the id of a row, and of a "
            f"sample of the row {row!r} (task.samples); rename the row, or use another column in "
            "input.id"
        )

    def _assign(self, name: str, position: int) -> str | None:
        if self._column is None:
            return name
        if name and name not in self._seen:
            self._seen.add(name)
            return name
        if name and self._on_duplicate == "first":
            return None
        if name and self._on_duplicate == "suffix":
            return self._add_suffix(name)
        self._note(name, position)
        return None

    def report_problems(self) -> None:
        """Report the blank and repeated ids noted so far.

        Raises:
            InputError: There are blank or repeated ids.
        """
        if self._blank:
            raise InputError(
                f"{self._source.name}: the id in column {self._column!r} is blank at "
                f"{'; '.join(self._blank)}; fill it, or set input.id to null for row numbers"
            )
        if self._repeated:
            raise InputError(
                f"{self._source.name}: ids in column {self._column!r} are repeated: "
                f"{'; '.join(self._repeated)}; set input.on_duplicate to 'first' or 'suffix', or "
                "input.id to another column or null"
            )

    def _add_suffix(self, name: str) -> str:
        count = self._suffixes.get(name, 1) + 1
        while (unique := f"{name}#{count}") in self._seen:
            count += 1
        self._suffixes[name] = count
        self._seen.add(unique)
        return unique

    def _note(self, name: str, position: int) -> None:
        where = self._source.describe_position(position)
        if name:
            self._repeated.append(f"{name!r} ({where})")
        else:
            self._blank.append(where)
        if len(self._blank) + len(self._repeated) >= _REPORTED:
            self.report_problems()


_SAMPLE_ID: Final = re.compile(r"(.+)~([2-9]|[1-9][0-9]{1,3})", re.DOTALL)
"""The id of a row and the number of its sample, from 2."""

MAX_SKIPPED_ROWS: Final = 1_000
"""Skipped rows that are listed; further ones are only counted."""


_TASK: Final = "the task"


class RowValidator:
    """Validate the rows of one source, and count them.

    Attributes:
        source: The input in words.
        columns: Names of all columns so far, in order of appearance (a dict used as a set).
        skipped: The skipped rows, at most `MAX_SKIPPED_ROWS`.
        skipped_total: Number of skipped rows.
        invalid: Number of items that carry a problem.
        id_column: Column whose texts are the ids of all items so far, unchanged; None if there is
            none.
    """

    def __init__(
        self,
        config: InputConfig,
        source: RowSource,
        columns: Collection[str],
        only: Collection[str] | None = None,
        samples: int = 1,
    ) -> None:
        """Store the arguments; open nothing.

        Args:
            config: The settings of the input.
            source: Source of the rows.
            columns: Columns, or fields inside columns, that the task needs.
            only: Ids of the rows to yield; None yields all.
            samples: Items of each row.
        """
        self._only = only
        self.source = source.name
        if config.split is not None:
            self.source += f", split into parts of at most {config.split.tokens:,} tokens"
        self.columns: dict[str, None] = {}
        self.skipped: list[SkippedRow] = []
        self.skipped_total = 0
        self.invalid = 0
        self._config = config
        self._source = source
        id_column = config.id if config.id is not None else source.id
        self._ids = IdAssigner(source, id_column, config.on_duplicate, samples)
        self.id_column = id_column
        self._needed = dict.fromkeys(columns, _TASK)
        if config.split is not None:
            parts = (PART_COLUMN, f"{PART_COLUMN}.")
            own = [one for one in self._needed if one == parts[0] or one.startswith(parts[1])]
            for name in own:  # a column that the parts will have
                del self._needed[name]
            self._needed[config.split.column] = "input.split.column"
        if config.smiles is not None:
            self._needed[config.smiles] = "input.smiles"
        if id_column is not None:
            self._needed[id_column] = "input.id"

    def iter_entries(self) -> Generator[ItemEntry, None, None]:
        """Read the source up to the limit.

        Yields:
            The items in order.

        Raises:
            InputError: A row does not fit, or there are no rows.
            MissingExtraError: SMILES are to be checked but RDKit is not installed.
        """
        count = 0
        with ExitStack() as stack:
            check = self._open_check(stack)
            for number, (position, row) in enumerate(self._source.rows(), start=1):
                check_stopped()
                entry = self._validate_row(number, position, row, check)
                if entry is not None:
                    chosen = 0
                    for one in self._list_items(entry, position):
                        yield one
                        chosen += 1
                    count += chosen > 0
                    if count == self._config.limit:
                        break
        self._ids.report_problems()
        if not count and self._only is not None:
            raise InputError(f"{self._source.name}: none of its rows is selected; nothing to run")
        if not count:
            skipped = f" ({self.skipped_total} were skipped)" if self.skipped_total else ""
            raise InputError(f"{self._source.name} has no rows{skipped}; nothing to run")

    def _open_check(self, stack: ExitStack) -> SmilesCheck | None:
        if self._config.smiles is None and self._source.drop_unparsable is None:
            return None
        return stack.enter_context(open_smiles_check())

    def _validate_row(
        self, number: int, position: int, row: Row, check: SmilesCheck | None
    ) -> ItemEntry | None:
        problem = None if self._source.problem is None else row.pop(self._source.problem, None)
        if missing := self._needed.keys() - row.keys():
            self._check_missing(position, row, missing)
        payload = self._encode(position, row)
        name = self._ids.read_id(number, position, row)
        if check is not None:
            dropped, found = self._check_smiles(row, check)
            problem = problem or found
            if dropped is not None:
                self._skip(name, dropped)
                return None
        unique = self._ids.assign(name, position)
        if unique is None:
            self._skip(name, f"repeated id, {self._source.describe_position(position)}")
            return None
        split = self._config.split
        if split is None and self._only is not None and unique not in self._only:
            return None
        if not row.keys() <= self.columns.keys():
            self.columns.update(dict.fromkeys(row))
        if self.id_column is not None and (row[self.id_column] != unique or split is not None):
            self.id_column = None
        self.invalid += problem is not None and split is None
        return ItemEntry(unique, payload, problem, row)

    def _list_items(self, entry: ItemEntry, position: int) -> Iterator[ItemEntry]:
        """Yield the items of a row: the row itself, or the parts of its text."""
        split = self._config.split
        if split is None:
            yield entry
            return
        if PART_COLUMN in entry.values:
            where = self._source.describe_position(position)
            raise InputError(
                f"{where}: there is a column {PART_COLUMN!r} already, where input.split says which "
                "part of the text an item is; rename it"
            )
        self.columns.setdefault(PART_COLUMN)
        text = _join_paragraphs(entry.values[split.column])
        if entry.problem is None and (text is None or (isinstance(text, str) and not text.strip())):
            self._skip(entry.id, f"its column {split.column!r} has no text, so it has no parts")
            return
        if entry.problem is None and isinstance(text, list | dict):
            entry = replace(entry, problem=_explain_no_text(split.column, text))
        for part in make_parts(entry, split, text):
            if self._only is None or part.id in self._only:
                self.invalid += part.problem is not None
                yield part

    def read_types(self) -> ArrowTypes:
        """Return the types that the input declares for its columns.

        Raises:
            InputError: The input cannot be read.
        """
        return self._source.types()

    def _check_smiles(self, row: Row, check: SmilesCheck) -> tuple[str | None, str | None]:
        """Return why the row is skipped, or else why its item must not be sent to the model."""
        drop, flag = self._source.drop_unparsable, self._config.smiles
        if drop is not None and (reason := check(row[drop])):
            return reason, None
        return None, check(row[flag]) if flag is not None and flag != drop else None

    def _skip(self, name: str, reason: str) -> None:
        self.skipped_total += 1
        if len(self.skipped) < MAX_SKIPPED_ROWS:
            self.skipped.append(SkippedRow(name, reason))

    def _check_missing(self, position: int, row: Row, names: Collection[str]) -> None:
        """Check that the task needs fields inside columns where it names no column.

        Raises:
            InputError: The column does not exist either.
        """
        for name in (name for name in self._needed if name in names):
            user = self._needed[name]
            if user == _TASK and split_column(name, row) is not None:
                continue
            where = (
                self._source.describe_position(position)
                if self._source.ragged
                else self._source.name
            )
            raise missing_column_error(where, name, user, row, has_fields=user == _TASK)

    def _encode(self, position: int, row: Row) -> bytes:
        try:
            payload = orjson.dumps(row)
        except orjson.JSONEncodeError as error:
            raise InputError(
                f"{self._source.describe_position(position)}: {_unencodable_columns(row)} "
                f"cannot be written as JSON: {error}; use text, numbers, booleans, null, and "
                "lists and objects of them"
            ) from error
        if is_too_deep(payload, row):
            where = self._source.describe_position(position)
            raise InputError(f"{where}: more than {MAX_DEPTH} levels of lists and objects")
        return payload


def _join_paragraphs(value: Json) -> Json:
    """Return a list of texts and numbers as the paragraphs of one text, anything else as it is."""
    if not isinstance(value, list):
        return value
    known = [one for one in value if one is not None]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in known):
        return value
    return "\n\n".join(map(str, known))


def _explain_no_text(column: str, value: list[Json] | dict[str, Json]) -> str:
    what = "an object" if isinstance(value, dict) else "a list, not only of texts"
    return (
        f"column {column!r} is {what}, which input.split cannot cut; give it one text, or a list "
        "of texts, its paragraphs"
    )


def make_parts(entry: ItemEntry, split: SplitConfig, value: Json) -> Iterator[ItemEntry]:
    """Yield the parts of a row's text, each with its place in the text.

    Args:
        entry: The row.
        split: How it is split.
        value: Its text; a row with anything else is its only part.
    """
    text = value if isinstance(value, str) else ""
    places = list(split_text(text, split.tokens, split.overlap))
    for number, (start, end) in enumerate(places, start=1):
        about = {
            "document": entry.id,
            "number": number,
            "of": len(places),
            "start": start,
            "end": end,
        }
        content = text[start:end] if isinstance(value, str) else value
        row = {**entry.values, split.column: content, PART_COLUMN: about}
        yield ItemEntry(make_part_id(entry.id, number), orjson.dumps(row), entry.problem, row)


def _unencodable_columns(row: Row) -> str:
    """Name the columns that have no JSON form."""
    return "column " + ", ".join(
        repr(name) for name, value in row.items() if not _is_encodable(name, value)
    )


def _is_encodable(name: str, value: Json) -> bool:
    try:
        orjson.dumps({name: value})
    except orjson.JSONEncodeError:
        return False
    return True
