"""What RDKit is needed for: checking SMILES, and the molecules inside its wheel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from ..core.errors import InputError, MissingExtraError
from ..core.types import Json

NCI: Final = "rdkit-nci5k"

SmilesCheck: TypeAlias = Callable[[Json], str | None]
"""Tells what is wrong with a SMILES, or None."""


@contextmanager
def smiles_check(feature: str = "checking SMILES") -> Iterator[SmilesCheck]:
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
        yield lambda value: _problem(Chem.MolFromSmiles, value)


def nci_file() -> Path:
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
        feature = f"'dataset: {NCI}' (or take 'dataset: molecules', 20 molecules without RDKit)"
        raise MissingExtraError(feature, "chem") from error
    path = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    if not path.is_file():
        raise InputError(
            f"'dataset: {NCI}' needs {path}, which this build of RDKit lacks; install RDKit's "
            "wheel (pip install rdkit), or take 'dataset: molecules'"
        )
    return path


def _problem(parse: Callable[[str], Any], value: Json) -> str | None:
    if not isinstance(value, str):
        return f"SMILES {value!r} is no text"
    if not value.strip():
        return "SMILES is blank"
    return None if parse(value) is not None else f"SMILES {value!r} cannot be parsed by RDKit"
