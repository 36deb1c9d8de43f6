"""pydantic's findings in a scientist's words: file, key, what is wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

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


def explain(error: ValidationError, raw: dict[str, Any], source: str) -> str:
    """Return one line per finding: ``file: key: what is wrong``.

    Values are shown as the user wrote them (``${VAR}`` unexpanded), and never below a key.
    """
    lines = (_line(finding, raw) for finding in error.errors(include_url=False))
    return "\n".join(f"{source}: {line}" for line in lines)


def _line(finding: Any, raw: dict[str, Any]) -> str:
    loc, kind = list(finding["loc"]), finding["type"]
    if loc[:1] == ["reduce"] and len(loc) > 2 and loc[2] in _OPS:  # noqa: PLR2004 - reduce, n, op
        del loc[2]  # pydantic names the union's member too
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_known(loc, raw)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        op = at_path(raw, [*loc, "op"])
        return f"{key}: unknown op {op!r}; there are {', '.join(_OPS)}"
    message = finding["msg"].removeprefix("Value error, ")
    if key == "backend.processes":
        message = "only 1 is possible so far (several worker processes are not built yet)"
    return f"{key}: {message[:1].lower()}{message[1:]}{_shown(loc, raw)}"


def _shown(loc: Sequence[str | int], raw: dict[str, Any]) -> str:
    value = at_path(raw, loc)
    if value is None or isinstance(value, dict | list) or "key" in str(loc[-1]):
        return ""
    text = repr(value)
    return f" (found {text if len(text) <= 80 else text[:77] + '…'})"  # noqa: PLR2004 - one line


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
