"""The arguments of a tool: typed rows with the columns that the task needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, create_model

from ...backends.inputs.source import needed_columns
from ...configs.models import RunConfig

Value: TypeAlias = str | int | float | bool

_FORBID = ConfigDict(extra="forbid", populate_by_name=False)


class Rows(BaseModel):
    """The arguments of one call; a subclass per task says what ``items`` are."""

    model_config = _FORBID


def arguments(config: RunConfig, most: int) -> type[Rows]:
    """Return the argument schema of a task.

    Columns may have names that Python does not allow, so each is the alias of a numbered field.

    Args:
        config: The task.
        most: Most items of one call.
    """
    names = needed_columns(config)
    smiles, id_column = config.input.smiles, config.input.id or "id"
    needed = dict.fromkeys([*names, *([smiles] if smiles else [])])
    fields: dict[str, Any] = {}
    for number, name in enumerate(needed):
        kind: Any = str if _is_smiles(name, smiles) else Value
        about = "SMILES of one molecule" if _is_smiles(name, smiles) else f"Column {name!r}"
        fields[f"column_{number}"] = (kind, Field(alias=name, description=about))
    if id_column not in needed:
        about = "Name of the item, unique; give one to all items or to none"
        fields["name"] = (str | int | None, Field(None, alias=id_column, description=about))
    row = create_model("Item", __config__=_FORBID, **fields)
    about = f"The items, one object each; at most {most:,} in one call"
    items: Any = (list[row], Field(min_length=1, max_length=most, description=about))  # type: ignore[valid-type]
    return create_model("Arguments", __base__=Rows, items=items)


def rows_of(items: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Return rows as plain data, by the columns' own names; a name that was left out is none."""
    return [item.model_dump(by_alias=True, exclude_unset=True, exclude_none=True) for item in items]


def _is_smiles(name: str, column: str | None) -> bool:
    return name == column or name.lower() == "smiles"
