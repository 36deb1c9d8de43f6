"""Row sources, input summary, messages and RDKit helpers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from ..core.errors import InputError, MissingExtraError
from ..core.types import Item, Json, Row

if TYPE_CHECKING:
    from .column_types import ArrowTypes

OnDuplicate: TypeAlias = Literal["error", "first", "suffix"]


@dataclass(frozen=True, slots=True)
class ItemEntry:
    """One item, ready for the store.

    Attributes:
        id: The item's name.
        row: Its columns as JSON.
        problem: Why it must not be sent to the model, or None.
        values: Its columns.
    """

    id: str
    row: bytes
    problem: str | None
    values: Row


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """Row that was skipped.

    Attributes:
        id: Name of the row.
        reason: Why it was skipped.
    """

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputSummary:
    """Result of reading and checking an input.

    Attributes:
        items: Number of items.
        columns: Names of the columns over all items, in order of appearance.
        row_schema: JSON Schema of the rows.
        digest: BLAKE2b (128 bits, hexadecimal) over ids and rows in order, after the limit.
        skipped: The skipped rows, at most the first 1,000.
        skipped_total: Number of skipped rows.
        invalid: Number of items that carry a problem.
        source: The input in words, e.g. ``molecules.csv`` or ``dataset molecules``.
        first: The first item.
        samples: Items of each row.
    """

    items: int
    columns: tuple[str, ...]
    row_schema: dict[str, Json]
    digest: str
    skipped: tuple[SkippedRow, ...]
    skipped_total: int
    invalid: int
    source: str
    first: Item
    samples: int = 1

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.items // self.samples


NCI_DATASET: Final = "rdkit-nci5k"

SmilesCheck: TypeAlias = Callable[[Json], str | None]
"""Returns what is wrong with a SMILES, or None."""


@contextmanager
def open_smiles_check(feature: str = "checking SMILES") -> Iterator[SmilesCheck]:
    """Yield a check of SMILES; silence RDKit's own log meanwhile.

    Args:
        feature: What needs RDKit, for the message.

    Yields:
        The check.

    Raises:
        MissingExtraError: RDKit is not installed.
    """
    try:
        from rdkit import Chem, rdBase  # noqa: PLC0415 - the extra 'chem' may be absent
    except ImportError as error:
        raise MissingExtraError(feature, "chem") from error
    with rdBase.BlockLogs():
        yield lambda value: _check_smiles(Chem.MolFromSmiles, value)


def find_nci_file() -> Path:
    """Return the path of the NCI molecules in RDKit.

    Each line is ``smiles``, white space, ``mol_id``.

    Raises:
        MissingExtraError: RDKit is not installed.
        InputError: RDKit was built without its data.
    """
    try:
        from rdkit import RDConfig  # noqa: PLC0415 - the extra 'chem' may be absent
    except ImportError as error:
        feature = (
            f"'dataset: {NCI_DATASET}' (or use 'dataset: molecules', 20 molecules without RDKit)"
        )
        raise MissingExtraError(feature, "chem") from error
    path = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    if not path.is_file():
        raise InputError(
            f"'dataset: {NCI_DATASET}' needs {path}, which is missing in this build of RDKit; "
            "install RDKit's wheel (pip install rdkit), or use 'dataset: molecules'"
        )
    return path


def _check_smiles(parse: Callable[[str], Any], value: Json) -> str | None:
    if not isinstance(value, str):
        return f"SMILES {value!r} is not text"
    if not value.strip():
        return "SMILES is blank"
    return None if parse(value) is not None else f"SMILES {value!r} cannot be parsed by RDKit"


_SHOWN: Final = 30


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    by_fold = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), by_fold, n=1)
    return f"; did you mean {by_fold[near[0]]!r}?" if near else ""


def missing_column_error(
    where: str, name: str, user: str, there: Collection[str], *, has_fields: bool = False
) -> InputError:
    """Return the error for a required column that the input does not have.

    Args:
        where: The file, or the position of the row.
        name: The column.
        user: What needs it, e.g. ``"input.id"``.
        there: The existing columns.
        has_fields: Whether a name with dots may be that of a field inside a column.
    """
    shown = ", ".join(list(there)[:_SHOWN]) or "none"
    more = ", …" if len(there) > _SHOWN else ""
    column, dot, _ = name.partition(".")
    hint, named = did_you_mean(name, there), repr(name)
    if dot and has_fields:
        hint, named = hint or did_you_mean(column, there), f"{name!r} or {column!r}"
    return InputError(
        f"{where} has no column {named}, which {user} needs; its columns: {shown}{more}{hint}"
    )


@dataclass(frozen=True, slots=True)
class RowSource:
    """Source of rows.

    Attributes:
        name: The input in words, for messages and summaries.
        rows: Opens the input and yields ``(position, row)``; reads only as far as it is consumed.
        describe_position: Returns a position in words, e.g. ``a.jsonl, line 7``.
        id: Default column of ids; None for row numbers.
        drop_unparsable: Column of SMILES; rows that RDKit cannot parse are skipped.
        ragged: Whether rows may differ in their columns.
        types: Returns the types that the input declares for its columns.
        problem: Column that says why a row must not be sent, or None; items do not have it.
    """

    name: str
    rows: Callable[[], Iterator[tuple[int, Row]]]
    describe_position: Callable[[int], str]
    id: str | None = None
    drop_unparsable: str | None = None
    ragged: bool = False
    types: Callable[[], ArrowTypes] = dict
    problem: str | None = None


def describe_line(path: Path) -> Callable[[int], str]:
    """Return a `RowSource.describe_position` for text files; positions are line numbers from 1."""
    return lambda line: f"{path}, line {line}"


def format_id(value: Json) -> str | None:
    """Convert a cell of the id column to an id.

    Args:
        value: Text or a number; None counts as blank.

    Returns:
        The text without surrounding blanks (``""`` when blank); None when the value is neither
        text nor a number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None
