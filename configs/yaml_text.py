"""YAML of settings: texts to plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson
import yaml

from ..backends.core.errors import ConfigurationError


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader; a key given twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self._key(key_node)
            if key in seen:
                msg = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, msg, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            msg = "a key must be a text"
            raise yaml.constructor.ConstructorError(None, None, msg, node.start_mark)
        if node.tag == "tag:yaml.org,2002:merge":
            return node  # equal to itself only: `<<` may come more than once
        return self.construct_object(node, deep=True)


class _NoAliasLoader(_UniqueKeyLoader):
    """Rejects aliases, with which a short text can expand without end."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here")
        return super().compose_node(parent, index)


def parse_value(text: str, source: str, shown: str = "") -> Any:
    """Parse the value of an override.

    Args:
        text: The value in YAML.
        source: Its name in messages.
        shown: The value as messages show it, with a blank before it; empty if they must not.

    Raises:
        ConfigurationError: It is not YAML.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        msg = f"{source}: the value{shown} is not valid YAML; put it in quotes"
        raise ConfigurationError(msg) from None


def parse_requested_value(text: str, source: str) -> Any:
    """Parse one value that arrived with a request.

    Args:
        text: The value in YAML.
        source: Its name in messages.

    Raises:
        ConfigurationError: It is not YAML or has an alias; the message does not repeat the value.
    """
    try:
        return yaml.load(text, Loader=_NoAliasLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        msg = f"{source}: the value is not valid YAML without aliases; put it in quotes"
        raise ConfigurationError(msg) from None


def parse_yaml(text: str, source: str, *, aliases: bool = True) -> dict[str, Any]:
    """Parse a configuration file.

    Args:
        text: The file's text.
        source: The name of the file in messages.
        aliases: Whether it may contain aliases.

    Raises:
        ConfigurationError: It is not YAML or not a mapping of keys; names file and line.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader if aliases else _NoAliasLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        msg = f"{source}{line}: not valid YAML: {error.problem or error.context}"
        raise ConfigurationError(msg) from None
    except RecursionError:
        raise ConfigurationError(f"{source}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        msg = f"{source}: not valid YAML: {reason}"
        raise ConfigurationError(msg) from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        msg = f"{source}: expected a mapping of settings (name: …, task: …), found {found}"
        raise ConfigurationError(msg)
    return data


def to_yaml(plain: Mapping[str, Any]) -> str:
    """Render plain settings as YAML, long texts as blocks."""
    sections = [orjson.dumps({name: section}) for name, section in plain.items()]
    return "".join(map(_render_section, sections or [b"{}"]))


@lru_cache(maxsize=64)
def _render_section(plain: bytes) -> str:
    """Render a section that is JSON; kept, because the levels of an operator differ in a few."""
    section = orjson.loads(plain)
    return yaml.dump(section, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True)


class _BlockDumper(yaml.SafeDumper):
    """Writes multi-line texts as literal blocks, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # YAML reads each of these as a line break and may replace it by a blank or another one
    odd = any(mark in value for mark in "\r\x85\u2028\u2029")
    style = '"' if odd else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_BlockDumper.add_representer(str, _text)
