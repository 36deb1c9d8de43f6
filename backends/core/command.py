"""Command lines in settings: words with a few names in braces, run without a shell.

Only ``{name}`` of a known name is replaced, after the line was split: a value with blanks stays one
word, and other braces, such as those of JSON, stay as they are. There are no formats and no
attributes, so a command can show nothing but the values that it is given.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from .errors import ConfigurationError

_NAME: Final = re.compile(r"(?<!\$)\{([A-Za-z_]\w*)\}")


def split_command(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Split a command line into words, names in braces still in them.

    Args:
        text: The command line.
        known: The names that it may use.

    Raises:
        ConfigurationError: It is empty, a quotation is not closed, or a name is not known.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigurationError(f"is no command line: {str(error).lower()}") from None
    if not words:
        raise ConfigurationError("is empty; write the command")
    for name in names_of(words):
        if name not in known:
            there = ", ".join(f"{{{n}}}" for n in sorted(known))
            raise ConfigurationError(f"there is no {{{name}}}; there are {there}")
    return words


def names_of(words: Sequence[str]) -> set[str]:
    """Return the names in braces."""
    return {name for word in words for name in _NAME.findall(word)}


def fill(words: Sequence[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words with the names in braces replaced."""
    return tuple(_NAME.sub(lambda match: values[match[1]], word) for word in words)
