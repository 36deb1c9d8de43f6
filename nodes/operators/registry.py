"""All operators, by their name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .base import Operator
from .cascade import Cascade
from .dedup import Dedup
from .extract import Extract
from .merge import Merge
from .rank import Rank
from .summarize import Summarize

OPERATORS: Final[dict[str, type[Operator]]] = {
    "cascade": Cascade,
    "dedup": Dedup,
    "extract": Extract,
    "merge": Merge,
    "rank": Rank,
    "summarize": Summarize,
}
"""The operators, by their name in ``reduce``; ``cascade`` is a key of its own."""


def make_operator(settings: Mapping[str, Any]) -> Operator:
    """Return the operator that settings describe.

    Args:
        settings: ``op`` and the fields of the operator, checked.
    """
    fields = dict(settings)
    return OPERATORS[fields.pop("op")](**fields)
