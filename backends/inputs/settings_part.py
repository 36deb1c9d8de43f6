"""From settings to concrete parts: the one place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.models import RunConfig
from ..core.templates import Template
from .base import InputSpec

if TYPE_CHECKING:
    pass


def input_spec(config: RunConfig, items: Sequence[Mapping[str, Any]] | None) -> InputSpec:
    """Return where the items come from; pasted ``items`` take the place of what is configured.

    Pasted items are named by the configured id column if any of them has it.
    """
    given = config.input
    if items is None:
        return InputSpec(
            path=Path(given.path) if given.path else None,
            dataset=given.dataset,
            id=given.id,
            limit=given.limit,
            on_duplicate=given.on_duplicate,
            smiles=given.smiles,
        )
    named = any(isinstance(item, Mapping) and given.id in item for item in items)
    return InputSpec(
        items=items,
        id=given.id if named else None,
        limit=given.limit,
        on_duplicate=given.on_duplicate,
        smiles=given.smiles,
    )


def needed_columns(config: RunConfig) -> tuple[str, ...]:
    """Return the columns that the prompt and the reduce stages show, each once."""
    shown = [name for stage in config.reduce for name in getattr(stage, "show", ())]
    return tuple(dict.fromkeys([*Template.parse(config.task.prompt).columns, *shown]))
