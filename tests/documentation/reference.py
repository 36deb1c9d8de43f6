"""``make reference``: write the pages and the schema that follow from the code.

The pages list every setting (``docs/settings.md``), every command (``docs/cli.md``)
and the public names of the package (``docs/api.md``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

import fanfold
from fanfold.configs.aggregators import AGGREGATOR_CONFIGS
from fanfold.configs.describe import describe_section, find_section
from fanfold.configs.evaluation import EvaluationConfig
from fanfold.configs.json_schema import write_schema
from fanfold.configs.models import RunConfig
from fanfold.configs.operators import OPERATOR_CONFIGS
from fanfold.configs.stages import StageConfig
from fanfold.graphs.cli.app import app

ROOT: Final = Path(str(files("fanfold")))
NOTICE: Final = "<!-- Written by 'make reference' from the code; do not edit. -->\n"

MORE: Final[Mapping[str, str]] = {
    "task": "[Prompts, examples, messages, images, samples](configuration.md#prompts)",
    "batch": "[OpenAI batch files](batch.md)",
    "endpoints": "[Endpoints](configuration.md#endpoints)",
    "endpoints.first": "[FIRST](first.md)",
    "endpoints.simulated": "[Simulated fleet](configuration.md#simulated-fleet)",
    "backend": "[Backends](backends.md)",
    "node": "[Model servers](configuration.md#model-servers)",
    "limits": "[Rate limits](configuration.md#rate-limits), [retries](configuration.md#retries), "
    "[time limits](resume.md#stop-and-time-limits)",
    "budget": "[Budgets](budgets.md)",
    "model.price": "[Prices](budgets.md)",
    "evaluate": "[Evaluate](evaluate.md)",
    "reduce": "[Aggregators](configuration.md#aggregators-reduce)",
    "stages": "[Stages](stages.md)",
}
"""Pages that explain a section."""

_BOUNDS: Final = {
    "minimum": "≥ {:,}",
    "exclusiveMinimum": "> {:,}",
    "maximum": "≤ {:,}",
    "exclusiveMaximum": "< {:,}",
}
_KINDS: Final = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true, false",
    "array": "list",
    "object": "mapping",
}


def write_settings() -> str:
    """Return the page with all settings."""
    return "".join(_iter_settings())


def _iter_settings() -> Iterator[str]:
    yield f"""# Settings

{NOTICE}
Every setting of a configuration file, from the code. [configuration.md](configuration.md) explains how to use them.
`fanfold schema` prints the same as a JSON Schema. A first line `# yaml-language-server: $schema=fanfold.schema.json`
lets editors such as VS Code complete and check a file; `fanfold presets copy` writes the schema beside the copy.
Any value may be a variable of the environment, `"${{VAR}}"`.

## The run

"""
    plain = [name for name, about in _fields(RunConfig) if find_section(about.annotation) is None]
    yield from _table(RunConfig, "", [name for name in plain if name not in ("reduce", "stages")])
    for name, about in _fields(RunConfig):
        if (section := find_section(about.annotation)) is not None:
            yield from _section(name, section)
    yield from _section("evaluate", EvaluationConfig, "Entry of `evaluate`: ")
    yield from _entries("reduce", "Entry of `reduce`: ", AGGREGATOR_CONFIGS)
    yield from _section("stages", StageConfig, "Entry of `stages`: ")
    yield from _entries("stages", "Operator of a stage: ", OPERATOR_CONFIGS)


def _entries(key: str, before: str, models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    for op, model in models.items():
        yield f"\n## {key}: {op}\n\n{before}{describe_section(model)[0]}{_see(key)}\n\n"
        yield from _table(model, "", [name for name, _ in _fields(model) if name != "op"])


def _section(key: str, model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield a section, and then the sections in it."""
    summary, _ = describe_section(model)
    yield f"\n## {key}\n\n{before}{summary}{_see(key)}\n\n"
    inner = {
        name: found
        for name, about in _fields(model)
        if (found := find_section(about.annotation)) is not None
    }
    yield from _table(model, f"{key}.", [name for name, _ in _fields(model)])
    for name, found in inner.items():
        yield from _section(f"{key}.{name}", found)


def _see(key: str) -> str:
    return f" More: {MORE[key]}." if key in MORE else ""


def _fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(about.alias or name, about) for name, about in model.model_fields.items()]


def _table(model: type[BaseModel], before: str, names: list[str]) -> Iterator[str]:
    if not names:
        return
    _, described = describe_section(model)
    yield "| key | default | values | meaning |\n|---|---|---|---|\n"
    for name, about in model.model_fields.items():
        key = about.alias or name
        if key not in names:
            continue
        inner = find_section(about.annotation)
        values = f"[section](#{_anchor(before + key)})" if inner else _show_values(model, key)
        meaning = described.get(name) or describe_section(inner)[0] if inner else described[name]
        cells = (f"`{before}{key}`", "" if inner else _show_default(about), values, meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "").replace(": ", "-")


def _show_default(about: FieldInfo) -> str:
    if about.is_required():
        return "required"
    default = about.get_default(call_default_factory=True)
    if hasattr(default, "get_secret_value"):
        default = default.get_secret_value()
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if default == "":
        return "empty"
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    if isinstance(default, dict):
        return "{}"
    return f"`{default}`" if isinstance(default, str) else str(default)


def _show_values(model: type[BaseModel], key: str) -> str:
    made = TypeAdapter(model).json_schema()
    found = made["properties"][key]
    options = [one for one in found.get("anyOf", [found]) if one.get("type") != "null"]
    return "; ".join(dict.fromkeys(_show_option(one) for one in options))


def _show_option(option: Mapping[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "const" in option:
        return f"`{option['const']}`"
    if "oneOf" in option or "$ref" in option:
        return "mapping"
    kind = _KINDS[option["type"]] if "type" in option else "any"
    bounds = [form.format(option[name]) for name, form in _BOUNDS.items() if name in option]
    bounds = [one.replace(".0", "") for one in bounds]
    return " ".join([kind, ", ".join(bounds)]).strip()


def write_commands() -> str:
    """Return the page with all commands."""
    return "".join(_iter_page(app))


def _iter_page(root: Any) -> Iterator[str]:
    yield f"""# Commands

{NOTICE}
Every command with its arguments and options, from the code; `fanfold COMMAND --help` prints the same. The
[Quick start](quickstart.md) shows the order of use, and [results.md](results.md#exit-codes) explains
exit codes. Options of `fanfold` itself stand before the name of the command:

"""
    yield from _parameters(root)
    yield from _commands(root, "fanfold")


def _commands(group: Any, before: str) -> Iterator[str]:
    for command in group.commands.values():
        name = f"{before} {command.name}"
        if hasattr(command, "commands"):
            yield from _commands(command, name)
            continue
        about = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        given = [_name_argument(one) for one in command.params if _is_argument(one)]
        yield f"\n## {name}\n\n" + "\n\n".join(about) + "\n"
        end = [] if len(given) == len(command.params) else ["[OPTIONS]"]
        yield "\nUsage: `" + " ".join([name, *given, *end]) + "`\n\n"
        yield from _parameters(command)


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _name_argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _parameters(command: Any) -> Iterator[str]:
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    if not shown:
        return
    yield "| option | meaning |\n|---|---|\n"
    for one in shown:
        if _is_argument(one):
            name = _name_argument(one)
        else:
            word = one.metavar or ("TEXT" if isinstance(one.default, str) else "N")
            value = "" if one.is_flag else f" {word}"
            name = "`, `".join([*one.opts, *one.secondary_opts]) + value
        default = one.default
        more = ""
        if isinstance(default, str | int | Path) and not isinstance(default, bool):
            more = f" (default: {default})"
        cells = (f"`{name}`", f"{_describe(one)}{more}")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _describe(parameter: Any) -> str:
    return str(parameter.about if _is_argument(parameter) else parameter.help)


WITH_METHODS: Final = frozenset({"MapReduceAgent", "ResultTable", "RunResults"})
"""Classes whose methods users call; the others are made and handed on."""


def write_api() -> str:
    """Return the page with the public names of the package."""
    return "".join(_iter_api())


def _iter_api() -> Iterator[str]:
    yield f"""# Python API

{NOTICE}
The public names of the package, from the code; everything else may change without notice. Import them from `fanfold`:
`from fanfold import build_graph`. [embedding.md](embedding.md) explains graphs and tools, and
[results.md](results.md#in-python) the results.
"""
    for name in fanfold.__all__:
        found = getattr(fanfold, name)
        yield f"\n## {name}\n\n"
        if not inspect.isclass(found):
            yield f"```python\n{_show_signature(name, found)}\n```\n\n"
        yield f"{_show_docstring(found)}\n"
        if name in WITH_METHODS:
            yield from _methods(name, found)


def _methods(name: str, found: type[Any]) -> Iterator[str]:
    for key, member in vars(found).items():
        if key.startswith("_") or key in getattr(found, "model_fields", {}):
            continue
        inner = getattr(member, "__func__", member)
        about = getattr(member, "fget", inner)
        if not (inspect.isfunction(about) and about.__doc__):
            continue
        if isinstance(member, property):
            yield f"\n### {name}.{key}\n\n"
        else:
            yield f"\n### {name}.{key}\n\n```python\n{_show_signature(key, inner)}\n```\n\n"
        yield f"{_show_docstring(about)}\n"


def _show_signature(name: str, found: Any) -> str:
    word = "async def" if inspect.iscoroutinefunction(found) else "def"
    signature = inspect.signature(found)
    parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    shown = str(signature.replace(parameters=parameters)).replace("'", "")
    line = f"{word} {name}{shown}: ..."
    if len(line) <= 100:
        return line
    listed = [str(one).replace("'", "") for one in parameters]
    if (
        first := next((n for n, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY), None)
    ) is not None:
        listed.insert(first, "*")
    returned = str(signature.return_annotation).replace("'", "")
    return "\n".join(
        [f"{word} {name}(", *(f"    {one}," for one in listed), f") -> {returned}: ..."]
    )


def _show_docstring(found: Any) -> str:
    """Return a docstring as Markdown: each section a list."""
    shown = list[str]()
    for line in (inspect.getdoc(found) or "").splitlines():
        text = _ROLE.sub(r"`\1`", line).replace("``", "`")
        if _SECTION.fullmatch(line):
            shown.append(f"**{line.removesuffix(':')}**\n")
        elif entry := _PART.match(text):
            shown.append(f"- `{entry[1]}`: {entry[2]}")
        elif text.startswith("    ") and shown and shown[-1].endswith("**\n"):
            shown.append(text.strip())
        else:
            shown.append("  " + text.strip() if text.startswith("     ") else text)
    return "\n".join(shown)


_SECTION: Final = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Note|Example):")
_PART: Final = re.compile(r" {4}\*{0,2}(\w+): (.*)")
_ROLE: Final = re.compile(r":\w+:`([^`]+)`")


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "docs/settings.md": write_settings,
    "docs/cli.md": write_commands,
    "docs/api.md": write_api,
    "configs/presets/fanfold.schema.json": write_schema,
}
"""The files that follow from the code, and what writes each."""


def main() -> None:
    """Write all of them."""
    for name, write in PAGES.items():
        (ROOT / name).write_text(write(), encoding="utf-8")
        print(f"{name} written")


if __name__ == "__main__":
    main()
