"""Section ``evaluate``: settings of the comparison of answers with known ones, and their check."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import Field

from ..backends.core.errors import ConfigurationError
from ..backends.core.fields import FieldPath, list_types, resolve_field, split_column
from ..backends.core.templates import ItemPrompt
from ..backends.core.types import Json
from .base import Access, Section, declare_access

Kind: TypeAlias = Literal["categorical", "numeric"]

_NUMBERS: Final = frozenset({"integer", "number"})
_NESTED: Final = frozenset({"array", "object"})


class EvaluationConfig(Section):
    """One comparison of a field of the answers with gold values: values known to be right.

    Attributes:
        gold: Column of the input, or field inside a column, with the gold values.
        field: Field of the answer that is compared with them.
    """

    access: ClassVar[dict[str, Access]] = declare_access(open="gold field")

    gold: Annotated[str, Field(min_length=1)]
    field: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A comparison whose fields are known.

    Attributes:
        gold: Name of the column with the gold values, as the user wrote it.
        field: The field of the answer.
        kind: Whether labels or numbers are compared.
        labels: Labels that the field can have; None if any.
        label_type: Type of these labels: ``boolean``, ``number`` or ``text``.
    """

    gold: str
    field: FieldPath
    kind: Kind
    labels: tuple[str, ...] | None = None
    label_type: Literal["boolean", "number", "text"] = "text"

    @property
    def field_name(self) -> str:
        """Return the name of the field, with ``output``."""
        return ".".join((self.field.source, *self.field.keys))

    def pick_gold(self, row: Mapping[str, Json]) -> Json:
        """Return the gold value of an item's row, or None."""
        path = find_gold_column(self.gold, row)
        if path is None:
            return None
        column, keys = path
        value = row[column]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def read_label(self, value: Json, *, is_gold: bool = False) -> str | None:
        """Return a value as a label, or None if it has none.

        Blanks at both ends do not count, and whole numbers have no decimals. Case counts. Where the
        labels of the field are booleans or numbers, a gold text that spells one is that label.

        Args:
            value: The value.
            is_gold: Whether it is a gold value, which a text file may have as text.
        """
        if value is None or isinstance(value, list | dict):
            return None
        if isinstance(value, str):
            text = value.strip()
            if not text:
                return None
            if is_gold and self.label_type == "boolean" and text.lower() in {"true", "false"}:
                return text.lower()
            number = read_number(text) if is_gold and self.label_type != "text" else None
            return text if number is None else self._name_number(number)
        if isinstance(value, bool):
            return str(value).lower()
        return self._name_number(value)

    def _name_number(self, value: float) -> str:
        if self.label_type == "boolean" and value in {0, 1}:
            return "true" if value else "false"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value)


def read_number(value: Json) -> float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def find_gold_column(name: str, columns: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Return the column of a gold value, and the keys inside it; None if there is none.

    Args:
        name: The column, with or without ``input.``.
        columns: The columns that exist.
    """
    found = split_column(name, columns)
    if found is None and name.startswith("input."):
        found = split_column(name.removeprefix("input."), columns)
    return found


def resolve_evaluation(
    gold: str, field: str, schema: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None
) -> Evaluation:
    """Return a comparison after checking its fields.

    Args:
        gold: Name of the column with the gold values.
        field: Name of the field of the answer.
        schema: Schema of the answers; None for free text.
        inputs: Schema of the input's rows; None if it is not known, or has no gold column.

    Raises:
        ConfigurationError: A field does not exist, or cannot be compared.
    """
    path = FieldPath.parse(field)
    if path.source == "input":
        raise ConfigurationError(
            f"field {field!r} is a column of the input; name a field of the answer (output.NAME)"
        )
    is_whole = field == "output" or field.startswith("output.")
    path, found = resolve_field(field if is_whole else f"output.{field}", schema)
    types = _types(found)
    if types & _NESTED:
        raise ConfigurationError(
            f"field {field!r} is {'/'.join(sorted(types & _NESTED))} in task.schema; name a text, "
            "a number or a boolean, e.g. a field inside it"
        )
    gold_types = frozenset[str]()
    if inputs is not None:
        gold_types = _types(_find_gold(gold, inputs))
    if (listed := found.get("enum")) is not None:
        return _make_categorical(gold, path, [value for value in listed if value is not None])
    if "boolean" in types:
        return _make_categorical(gold, path, [True, False])
    known = types or gold_types
    kind: Kind = "numeric" if known and known <= _NUMBERS else "categorical"
    return Evaluation(gold, path, kind)


def _make_categorical(gold: str, path: FieldPath, values: list[Json]) -> Evaluation:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        made = Evaluation(gold, path, "categorical", (), "boolean")
    elif kinds and kinds <= {int, float}:
        made = Evaluation(gold, path, "categorical", (), "number")
    else:
        made = Evaluation(gold, path, "categorical", ())
    labels = [label for value in values if (label := made.read_label(value)) is not None]
    return Evaluation(gold, path, "categorical", tuple(dict.fromkeys(labels)), made.label_type)


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(list_types(schema) - {"null"})


def _find_gold(gold: str, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of the gold values.

    Raises:
        ConfigurationError: The input has no such column, or its values cannot be compared.
    """
    found = find_gold_column(gold, inputs["properties"])
    name = gold if found is None else ".".join((found[0], *found[1]))
    _, schema = resolve_field(f"input.{name}", None, inputs)
    if nested := _types(schema) & _NESTED:
        raise ConfigurationError(
            f"the gold column {gold!r} has values of type {'/'.join(sorted(nested))}; name a "
            "column of texts, numbers or booleans, or a field inside it"
        )
    return schema


def resolve_evaluations(
    configs: Iterable[EvaluationConfig] | None,
    schema: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None = None,
) -> list[Evaluation]:
    """Return the comparisons of a run after checking their fields.

    Args:
        configs: The settings.
        schema: Schema of the answers; None for free text.
        inputs: Schema of the input's rows; None if it is not known yet.

    Raises:
        ConfigurationError: Names the setting, and what is wrong with it.
    """
    found = list[Evaluation]()
    for number, config in enumerate(configs or ()):
        try:
            one = resolve_evaluation(config.gold, config.field, schema, inputs)
        except ConfigurationError as error:
            raise ConfigurationError(f"evaluate.{number}: {error.message}") from None
        if any((one.gold, one.field) == (other.gold, other.field) for other in found):
            msg = f"evaluate.{number}: {one.field_name} is compared with {one.gold!r} twice"
            raise ConfigurationError(msg)
        found.append(one)
    return found


def is_in_prompt(gold: str, prompt: ItemPrompt, columns: Mapping[str, Any]) -> bool:
    """Return True if the prompt shows gold values to the model.

    Args:
        gold: Name of the column with the gold values.
        prompt: The templates of the messages.
        columns: The columns of the input.
    """
    found = find_gold_column(gold, columns)
    if found is None:
        return False
    path = (found[0], *found[1])
    for name in prompt.columns:
        used = split_column(name, columns)
        if used is None:
            continue
        other = (used[0], *used[1])
        shared = min(len(path), len(other))
        if path[:shared] == other[:shared]:
            return True
    return False
