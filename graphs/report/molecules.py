"""Molecules drawn from SMILES by RDKit, if the extra ``chem`` is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from markupsafe import Markup

from .charts import clean_svg

SMILES_NAMES: Final = frozenset({"smiles", "canonical_smiles", "isomeric_smiles"})
"""Columns, in lower case, whose texts are drawn."""

_MOST_CHARACTERS: Final = 400
_MOST_ATOMS: Final = 120
_WIDTH, _HEIGHT = 200, 130
_BOND: Final = 24
"""Length of a bond, at most: a small molecule is drawn no larger than others."""
_FONT_SIZES: Final = (9, 13)

DrawMolecule: TypeAlias = Callable[[Any], Markup | None]
"""Returns the drawing of a SMILES; None if it is none, or too large."""


@contextmanager
def open_drawing() -> Iterator[DrawMolecule | None]:
    """Yield what draws molecules; None if RDKit is not installed. RDKit's own log is silent."""
    try:
        from rdkit import Chem, rdBase  # noqa: PLC0415 - the extra 'chem' may be absent
        from rdkit.Chem.Draw import rdMolDraw2D  # noqa: PLC0415
    except ImportError:
        yield None
        return

    def draw(smiles: Any) -> Markup | None:
        if not isinstance(smiles, str) or len(smiles) > _MOST_CHARACTERS:
            return None
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None or not 0 < molecule.GetNumAtoms() <= _MOST_ATOMS:
            return None
        drawer = rdMolDraw2D.MolDraw2DSVG(_WIDTH, _HEIGHT)
        options: Any = drawer.drawOptions()
        options.clearBackground = False
        options.useBWAtomPalette()
        options.bondLineWidth = 1.3
        options.fixedBondLength = _BOND
        options.minFontSize, options.maxFontSize = _FONT_SIZES
        drawer.DrawMolecule(molecule)
        drawer.FinishDrawing()
        return clean_svg(drawer.GetDrawingText(), f"structure of {smiles}")

    with rdBase.BlockLogs():
        yield draw
