"""Section ``task``, checked for mistakes that a JSON Schema validator accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final

import orjson

from ..backends.core.errors import ConfigurationError
from ..backends.core.fields import FieldPath, list_types, resolve_field
from ..backends.core.samples import SampleFold, list_free_texts
from ..backends.core.schemas import open_validator
from ..backends.core.templates import EXAMPLE_OUTPUT, ItemPrompt, find_names
from .models import RunConfig, TaskConfig
from .operators import CascadeConfig


def _split(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CHILD: Final = _split(
    "additionalItems additionalProperties contains contentSchema else if items not propertyNames "
    "then unevaluatedItems unevaluatedProperties"
)
"""Keywords whose value is a schema."""
_CHILDREN: Final = _split("allOf anyOf items oneOf prefixItems")
"""Keywords whose value is a list of schemas."""
_NAMED: Final = _split("$defs definitions dependentSchemas patternProperties properties")
"""Keywords whose value is a mapping of names to schemas."""
_OTHERS: Final = _split(
    "$anchor $comment $dynamicAnchor $dynamicRef $id $recursiveAnchor $recursiveRef $ref $schema "
    "$vocabulary const contentEncoding contentMediaType default dependencies dependentRequired "
    "deprecated description discriminator enum example examples exclusiveMaximum exclusiveMinimum "
    "externalDocs format id maxContains maxItems maxLength maxProperties maximum minContains "
    "minItems minLength minProperties minimum multipleOf nullable pattern readOnly required title "
    "type uniqueItems writeOnly xml"
)
"""The other keywords of JSON Schema (drafts 4 to 2020-12) and OpenAPI 3."""
_KEYWORDS: Final = _CHILD | _CHILDREN | _NAMED | _OTHERS

_ELSEWHERE: Final = _split(
    "$dynamicRef $ref allOf anyOf else if not oneOf patternProperties then unevaluatedProperties"
)
"""Keywords by which a property may be defined elsewhere."""


def check_task(task: TaskConfig) -> None:
    """Check the prompt or the messages, the schema of the answers, and the examples.

    Raises:
        ConfigurationError: A template has an unmatched brace; or the schema is invalid, contradicts
            itself or has a misspelt keyword; or the fold of samples or the field of certainty does
            not fit the schema; or an example lacks a column or an answer that fits the schema; the
            message names the place.
    """
    ItemPrompt.parse(task.model_dump(by_alias=True) | {"examples": None})
    if task.answer_schema is not None:
        _check_valid(task.answer_schema)
        for where, schema in walk_schemas(task.answer_schema):
            _check_values(schema, where)
            _check_required(schema, where)
            _check_keywords(schema, where)
    SampleFold.from_task(task.model_dump(by_alias=True))
    if task.certainty is not None:
        _check_certainty(task, task.certainty)
    _check_examples(task)


def check_cascade(cascade: CascadeConfig, task: TaskConfig) -> None:
    """Check that the answers of two models to a task can be compared.

    Args:
        cascade: The settings of the cascade.
        task: The task of its stage.

    Raises:
        ConfigurationError: The field cannot be compared, or the task does not allow it.
    """
    if task.graph is not None:
        raise ConfigurationError("cascade needs fanfold's own item graph; leave out task.graph")
    if task.images is not None and task.images.folder is None and not task.images.urls:
        raise ConfigurationError("cascade: set task.images.folder, or task.images.urls: true")
    field = cascade.field
    schema = _find_answer_field("cascade.field", field, task)
    types = list_types(schema) - {"null"}
    is_number = bool(types) and types <= {"number", "integer"} and "enum" not in schema
    if not ("enum" in schema or types == {"boolean"} or is_number):
        msg = (
            f"cascade.field: {field!r} is not an enum, a boolean or a number of the answer, so two "
            "models cannot be compared by it; name a field that is one, or leave out cascade"
        )
        raise ConfigurationError(msg)
    if is_number and cascade.tolerance is None:
        msg = f"cascade: {field!r} is a number; set tolerance, the largest difference that agrees"
        raise ConfigurationError(msg)
    if not is_number and cascade.tolerance is not None:
        raise ConfigurationError(f"cascade: {field!r} is not a number; leave out tolerance")


def _check_certainty(task: TaskConfig, field: str) -> None:
    """Check that the certainty of a field can be read from its answers."""
    if task.graph is not None:
        msg = "task.certainty needs fanfold's own item graph; leave out task.graph"
        raise ConfigurationError(msg)
    _find_answer_field("task.certainty", field, task)


def _find_answer_field(setting: str, field: str, task: TaskConfig) -> Mapping[str, Any]:
    """Return the schema of a field of the answer, which a setting names."""
    if FieldPath.parse(field).source != "output":
        raise ConfigurationError(f"{setting}: {field!r} is not a field of the answer")
    try:
        _, schema = resolve_field(field, task.answer_schema, {})
    except ConfigurationError as error:
        raise ConfigurationError(f"{setting}: {error.message}") from None
    return schema


def _check_examples(task: TaskConfig) -> None:
    """Check that examples have the columns of the prompt, and answers that fit the schema."""
    schema = task.answer_schema
    validator = None if schema is None else open_validator(schema)
    for number, example in enumerate(task.examples or ()):
        where = f"task.examples[{number}]"
        if EXAMPLE_OUTPUT not in example:
            msg = f"{where} has no {EXAMPLE_OUTPUT!r}: add the answer that the model should give"
            raise ConfigurationError(msg)
        output = example[EXAMPLE_OUTPUT]
        if validator is None:
            if output is None or output == "":
                raise ConfigurationError(f"{where}.{EXAMPLE_OUTPUT} is empty: write the answer")
            continue
        for error in validator.iter_errors(output):
            at = ".".join((f"{where}.{EXAMPLE_OUTPUT}", *map(str, error.instance_path)))
            msg = f"{at} does not fit task.schema: {error.message}"
            raise ConfigurationError(msg)
    ItemPrompt.parse(task.model_dump(by_alias=True))


def find_task_warnings(task: TaskConfig) -> list[str]:
    """Return a line for each part of a task that is allowed but rarely intended."""
    lines = list[str]()
    asks_same = task.images is None and task.graph is None
    if asks_same and not ItemPrompt.parse(task.model_dump(by_alias=True)).columns:
        where = "task.prompt names" if task.messages is None else "task.messages name"
        lines.append(
            f"{where} no column, so that every item asks the same; write {{NAME}} where the "
            "text of a column belongs"
        )
    for name in sorted(find_names([task.system])):
        lines.append(
            f"task.system is sent as it is, the same for all items: {{{name}}} is not replaced; "
            "columns belong into task.prompt"
        )
    for where, schema in walk_schemas(task.answer_schema):
        if "type" not in schema and any(isinstance(v, bool) for v in _listed(schema, "enum")):
            lines.append(
                f"{where}.enum has a boolean among its values; YAML reads yes, no, on and off "
                "without quotes as booleans"
            )
        lines += [
            f"{where}: {keyword!r} is no keyword of JSON Schema and has no effect"
            for keyword in sorted(schema.keys() - _KEYWORDS)
            if not keyword.startswith("x-") and not _find_similar(keyword, schema)
        ]
    return lines


def find_sample_warnings(config: RunConfig) -> list[str]:
    """Return a line if samples are likely to be equal, or their answers cannot be compared."""
    task, lines = config.task, list[str]()
    if task.samples == 1:
        return lines
    if config.model.temperature == 0 and task.graph is None:
        lines.append(
            f"task.samples: at model.temperature 0 the {task.samples} samples of a row are equal, "
            "but for rounding on the server, and are paid each; set a temperature, e.g. 0.7"
        )
    if task.answer_schema is None and task.graph is None:
        lines.append(
            "task.samples: without task.schema, only answers with the same text agree; texts "
            "longer than a label will rarely do"
        )
    if fields := list_free_texts(task.fold, task.answer_schema):
        lines.append(
            f"task.samples: {', '.join(fields)}: texts without an enum rarely agree, and are null "
            "in the results where they do not; fanfold results --samples has all of them"
        )
    return lines


def walk_schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema and all schemas in it, each with its place as a dotted path."""
    open_schemas = [("task.schema", schema)]
    while open_schemas:  # no recursion: a request may nest schemas deeply
        where, found = open_schemas.pop()
        if not isinstance(found, dict):
            continue
        yield where, found
        for key, value in found.items():
            if key in _CHILD:
                open_schemas.append((f"{where}.{key}", value))
            if key in _CHILDREN and isinstance(value, list):
                open_schemas += [(f"{where}.{key}[{n}]", child) for n, child in enumerate(value)]
            if key in _NAMED and isinstance(value, dict):
                open_schemas += [(f"{where}.{key}.{name}", c) for name, c in value.items()]


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _mapped(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = schema.get(key)
    return found if isinstance(found, dict) else {}


def _check_valid(schema: dict[str, Any]) -> None:
    try:
        open_validator(schema)
    except ValueError as error:  # all errors of jsonschema-rs are ValueErrors
        where = ".".join(map(str, getattr(error, "instance_path", ()))) or "its top"
        reason = getattr(error, "message", str(error))
        msg = f"task.schema is no valid JSON Schema: at {where}: {reason}"
        raise ConfigurationError(msg) from None


def _check_values(schema: dict[str, Any], where: str) -> None:
    """Check that ``enum`` and ``const`` have values that ``type`` allows."""
    if "type" not in schema:
        return
    allowed = open_validator({"type": schema["type"]})
    given = [("enum", value) for value in _listed(schema, "enum")]
    given += [("const", schema["const"])] if "const" in schema else []
    for key, value in given:
        if allowed.is_valid(value) or (value is None and schema.get("nullable") is True):
            continue
        shown, kind = orjson.dumps(value).decode(), schema["type"]
        kinds = " or ".join(kind) if isinstance(kind, list) else kind
        msg = f"{where}.{key}: the value {shown} does not fit the type ({kinds})"
        if isinstance(value, bool):
            msg += "; YAML reads yes, no, on and off without quotes as booleans: write 'yes', 'no'"
        elif "string" in kinds:
            msg += "; put it in quotes"
        else:
            msg += "; no answer could ever have it: change the value or the type"
        raise ConfigurationError(msg)


def _check_required(schema: dict[str, Any], where: str) -> None:
    """Check that required properties are defined, where they are defined in one place."""
    if "properties" not in schema or schema.keys() & _ELSEWHERE:
        return
    known = _mapped(schema, "properties")
    for name in _listed(schema, "required"):
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"define it below {where}.properties"
            msg = f"{where}.required: there is no property {name!r}; {hint}"
            raise ConfigurationError(msg)


def _check_keywords(schema: dict[str, Any], where: str) -> None:
    for keyword in schema.keys() - _KEYWORDS:
        if (similar := _find_similar(keyword, schema)) is not None:
            msg = f"{where}: there is no keyword {keyword!r}; did you mean {similar!r}?"
            raise ConfigurationError(msg)


def _find_similar(keyword: str, schema: dict[str, Any]) -> str | None:
    """Return the keyword of which another is likely a misspelling; None if the schema has it."""
    others = sorted(_KEYWORDS - schema.keys())
    lower = {name.lower(): name for name in others}
    if keyword.startswith("x-"):
        return None
    close = get_close_matches(keyword.lower().replace("_", "").replace("-", ""), lower, 1, 0.85)
    return lower[close[0]] if close else None
