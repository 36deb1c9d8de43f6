"""pydantic's findings in a scientist's words: file, key, what is wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from ..backends.core.secrets import is_secret, mask_command
from .models import RunConfig
from .reduce import Collect, Count, Histogram, Stats, TopK
from .source import at_path

_OPS: dict[str, type[BaseModel]] = {
    "count": Count,
    "stats": Stats,
    "histogram": Histogram,
    "top_k": TopK,
    "collect": Collect,
}

_MAPPING: Final = "expected keys with values below it"
_WORDS: Final = {
    "reduce.bins": "expected a whole number of bins, or a list of their edges",
    "name": "expected letters, digits and _ . - (64 at most, a letter or digit first)",
    "task.graph": "expected package.module:attribute",
    "string_type": "expected a text; put a number in quotes",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "string_too_short": "must not be empty",
}
"""What to say in place of pydantic's words, by key or by its kind of finding."""


def explain(error: ValidationError, raw: dict[str, Any], source: str) -> str:
    """Return one line per finding: ``file: key: what is wrong``.

    Values are shown as the user wrote them (``${VAR}`` unexpanded), and never below a key.
    """
    lines = (_line(finding, raw) for finding in error.errors(include_url=False))
    return "\n".join(dict.fromkeys(f"{source}: {line}" for line in lines))


def _line(finding: Any, raw: dict[str, Any]) -> str:
    loc, kind = list(finding["loc"]), finding["type"]
    if loc[:1] == ["reduce"] and len(loc) > 2 and loc[2] in _OPS:  # noqa: PLR2004 - reduce, n, op
        del loc[2]  # pydantic names the union's member too
        if loc[2:3] == ["bins"]:
            del loc[3:]  # … and a value's alternatives
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_known(loc, raw)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{key}: {_unknown_op(at_path(raw, [*loc, 'op']))}"
    message = (
        _WORDS.get(_unnumbered(loc))
        or _WORDS.get(kind)
        or finding["msg"].removeprefix("Value error, ")
    )
    where = f"{key}: " if key else ""  # several keys contradict each other: the message names them
    return f"{where}{message[:1].lower()}{message[1:]}{_shown(loc, raw)}"


def _unnumbered(loc: Sequence[str | int]) -> str:
    return ".".join(name for name in loc if isinstance(name, str))


def _unknown_op(op: object) -> str:
    known = ", ".join(_OPS)
    if op is None:
        return f"the key 'op' is missing; there are {known}"
    close = get_close_matches(str(op), _OPS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown op {op!r}; there are {known}{hint}"


def _shown(loc: Sequence[str | int], raw: dict[str, Any]) -> str:
    value = at_path(raw, loc)
    if value is None or isinstance(value, dict | list) or _may_be_secret(loc, value):
        return ""
    text = repr(mask_command(value) if isinstance(value, str) else value)
    return f" (found {text if len(text) <= 80 else text[:77] + '…'})"  # noqa: PLR2004 - one line


def _may_be_secret(loc: Sequence[str | int], value: object) -> bool:
    hidden = list(loc[:2]) in (["node", "serve"], ["node", "env"])
    return hidden or is_secret(str(loc[-1])) or (isinstance(value, str) and "@" in value)


def _known(loc: Sequence[str | int], raw: dict[str, Any]) -> str:
    names = _fields(loc[:-1], raw)
    close = get_close_matches(str(loc[-1]), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known here: {', '.join(names)})"


def _fields(loc: Sequence[str | int], raw: dict[str, Any]) -> list[str]:
    """Return the keys that are known in a section."""
    model: type[BaseModel] = RunConfig
    for n, name in enumerate(loc):
        if loc[0] == "reduce":
            model = _OPS.get(str(at_path(raw, [*loc[:2], "op"])), Count)
            break
        model = _model_of(model, str(name)) if n < len(loc) else model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return model
