"""Sources, input summary, messages, RDKit helpers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from ..core.errors import InputError, MissingExtraError
from ..core.types import Item, Json, Row

OnDuplicate: TypeAlias = Literal["error", "first", "suffix"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Where the items come from and how they are named.

    Attributes:
        path: A csv, tsv, jsonl, ndjson, parquet or smi file, or a folder of .txt and .md files.
        dataset: Name of a dataset that comes with fanfold or with an extra.
        items: Rows already in memory.
        id: Column with the items' names. None: the dataset's own id column; the file name for a
            folder; the key ``id`` for ``items`` if any of them has it; else row numbers from 1.
        limit: Number of items after which reading stops, at least 1; None reads all.
        on_duplicate: What a repeated id means: an error; ``first`` keeps the first row;
            ``suffix`` names the others ``x#2``, ``x#3``, ….
        smiles: Column to check with RDKit; items that it cannot parse carry a problem.

    Raises:
        InputError: Not exactly one of path, dataset and items, or a limit below 1.
    """

    path: Path | None = None
    dataset: str | None = None
    items: Sequence[Mapping[str, Json]] | None = None
    id: str | None = None
    limit: int | None = None
    on_duplicate: OnDuplicate = "error"
    smiles: str | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself before any file is opened."""
        given = [key for key in ("path", "dataset", "items") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"input.{key}" for key in given) or "none of them"
            raise InputError(
                "input needs exactly one of input.path, input.dataset and input.items; "
                f"it has {found}"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(
                f"input.limit is {self.limit}; it must be at least 1, or null for all rows"
            )


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that became no item.

    Attributes:
        id: The row's name.
        reason: Why it was left out.
    """

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What the input holds, once read and checked.

    Attributes:
        items: Number of items.
        columns: Names of the columns over all items, in order of appearance.
        digest: BLAKE2b (128 bits, hexadecimal) over ids and rows in order, after the limit.
        skipped: The rows left out, at most the first 1,000.
        skipped_total: Number of rows left out.
        invalid: Number of items that carry a problem.
        source: The input in words, e.g. ``molecules.csv`` or ``dataset molecules``.
        first: The first item.
    """

    items: int
    columns: tuple[str, ...]
    digest: str
    skipped: tuple[SkippedRow, ...]
    skipped_total: int
    invalid: int
    source: str
    first: Item


NCI_DATASET: Final = "rdkit-nci5k"

SmilesCheck: TypeAlias = Callable[[Json], str | None]
"""Tells what is wrong with a SMILES, or None."""


@contextmanager
def open_smiles_check(feature: str = "checking SMILES") -> Iterator[SmilesCheck]:
    """Lend a check of SMILES; RDKit's own log is silent meanwhile.

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
    """Find the NCI molecules inside RDKit: ``smiles``, white space, ``mol_id`` on each line.

    Returns:
        The path of the file.

    Raises:
        MissingExtraError: RDKit is not installed.
        InputError: RDKit was built without its data.
    """
    try:
        from rdkit import RDConfig  # noqa: PLC0415 - the extra 'chem' may be absent
    except ImportError as error:
        feature = (
            f"'dataset: {NCI_DATASET}' (or take 'dataset: molecules', 20 molecules without RDKit)"
        )
        raise MissingExtraError(feature, "chem") from error
    path = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    if not path.is_file():
        raise InputError(
            f"'dataset: {NCI_DATASET}' needs {path}, which this build of RDKit lacks; install "
            "RDKit's "
            "wheel (pip install rdkit), or take 'dataset: molecules'"
        )
    return path


def _check_smiles(parse: Callable[[str], Any], value: Json) -> str | None:
    if not isinstance(value, str):
        return f"SMILES {value!r} is no text"
    if not value.strip():
        return "SMILES is blank"
    return None if parse(value) is not None else f"SMILES {value!r} cannot be parsed by RDKit"


_SHOWN: Final = 30


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    by_fold = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), by_fold, n=1)
    return f"; did you mean {by_fold[near[0]]!r}?" if near else ""


def missing_column_error(where: str, name: str, user: str, there: Collection[str]) -> InputError:
    """Return the error for a column that something needs and the input lacks.

    Args:
        where: The file, or the place of the row.
        name: The column.
        user: What needs it, e.g. ``"input.id"``.
        there: The columns that there are.
    """
    shown = ", ".join(list(there)[:_SHOWN]) or "none"
    more = ", …" if len(there) > _SHOWN else ""
    hint = did_you_mean(name, there)
    return InputError(
        f"{where} has no column {name!r}, which {user} needs; its columns: {shown}{more}{hint}"
    )


@dataclass(frozen=True, slots=True)
class RowSource:
    """Something that yields rows.

    Attributes:
        name: The input in words, for messages and summaries.
        rows: Opens the input and yields ``(place, row)``; reads no further than it is asked.
        describe_place: Puts a place in words, e.g. ``a.jsonl, line 7``.
        id: Column of ids when the user names none; None for row numbers.
        drop_unparsable: Column of SMILES; rows that RDKit cannot parse become no item.
        ragged: Whether rows may differ in their columns.
    """

    name: str
    rows: Callable[[], Iterator[tuple[int, Row]]]
    describe_place: Callable[[int], str]
    id: str | None = None
    drop_unparsable: str | None = None
    ragged: bool = False


def describe_line(path: Path) -> Callable[[int], str]:
    """Return a `Source.locate` for text files, whose places are physical lines from 1."""
    return lambda line: f"{path}, line {line}"


def format_id(value: Json) -> str | None:
    """Write a cell of the id column as an id.

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
