"""Words that several messages share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Final

from ..core.errors import InputError

_SHOWN: Final = 30


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    by_fold = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), by_fold, n=1)
    return f"; did you mean {by_fold[near[0]]!r}?" if near else ""


def missing_column(where: str, name: str, user: str, there: Collection[str]) -> InputError:
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
