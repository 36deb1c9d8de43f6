"""What must not be shown: values whose names say so, passwords in URLs, words of commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

MASKED: Final = "**********"
"""What stands in the place of a secret that was written out."""

_NAMES: Final = frozenset(
    {
        *("password", "passwd", "passphrase", "token", "secret", "auth", "key"),
        *("authorization", "credential", "credentials", "cookie", "apikey", "authtoken"),
    }
)
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_VARIABLES: Final = re.compile(r"(?:Bearer |Basic )?(?:\$\{[A-Za-z_]\w*\}|\$[A-Za-z_]\w*)+")
_USERINFO: Final = re.compile(r"(?<=://)([^\s/?#@:]*)(?::([^\s/?#]*))?@")
_QUERY: Final = re.compile(r"([?&;])([\w.-]+)=([^&#\s\"']*)")
_PAIR: Final = re.compile(
    r"""(?P<name>["']?[\w.-]+["']?)(?P<sign>\s*:\s+|["']:)(?P<value>"[^"]*"|'[^']*'|[^,}\]"']+)"""
)
_PART: Final = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s])+""")
_SCHEMES: Final = frozenset({"bearer", "basic"})


def is_secret(name: str) -> bool:
    """Say whether the value of a key, a header, an option or a variable must not be shown.

    One of the words of its last part says so; words are divided by signs and by capitals. Numbers
    of tokens (``max_tokens``) are none.

    Args:
        name: E.g. ``endpoints.api_key``, ``X-Auth-Token`` or ``apiKey``.
    """
    last = name.rstrip(".").rpartition(".")[2]
    return any(word.lower() in _NAMES for word in _WORD.findall(last))


def is_variable(text: str) -> bool:
    """Say whether a text holds nothing but variables, which are no secrets themselves."""
    return _VARIABLES.fullmatch(text) is not None


def mask_url(text: str) -> str:
    """Return a text in whose URLs passwords and secret values of the query are masked."""
    if "://" not in text:
        return text
    text = _USERINFO.sub(_userinfo, text)
    return _QUERY.sub(lambda m: f"{m[1]}{m[2]}={_hidden(m[3])}" if is_secret(m[2]) else m[0], text)


def mask_command(text: str) -> str:
    """Return a command line in which the values of secret words are masked.

    ``KEY=VALUE``, ``--api-key VALUE``, ``Authorization: VALUE`` and URLs are known, also within
    an argument.
    """
    follows = False

    def shown(match: re.Match[str]) -> str:
        nonlocal follows
        word, hidden = match[0], follows
        bare = word.strip("\"'")
        if hidden and bare.lower() in _SCHEMES:
            return word  # the value is the next word
        follows = _announces(bare)
        return _hidden(word) if hidden and not bare.startswith("--") else _mask_word(word)

    return _PART.sub(shown, text)


def mask_arguments(words: Iterable[str]) -> Iterator[str]:
    """Yield the arguments of a command, those that are secret masked."""
    follows = False
    for word in words:
        hidden, follows = follows, _announces(word)
        yield _hidden(word) if hidden and not word.startswith("--") else mask_command(word)


def mask_plain(plain: Any, key: str = "") -> Any:
    """Return plain data in which the texts of secret keys, and passwords in URLs, are masked.

    Args:
        plain: The data.
        key: The key that it stands at.
    """
    if isinstance(plain, Mapping):
        return {name: mask_plain(value, str(name)) for name, value in plain.items()}
    if isinstance(plain, list):
        return [mask_plain(value, key) for value in plain]
    if not isinstance(plain, str):
        return plain
    return _hidden(plain) if is_secret(key) else mask_url(plain)


def _announces(word: str) -> bool:
    """Say whether the value of a word is the next one."""
    if word.lower() in _SCHEMES:
        return True
    if word.endswith(":"):
        return is_secret(word[:-1].rpartition("=")[2])
    return word.startswith("-") and "=" not in word and is_secret(word.lstrip("-"))


def _mask_word(word: str) -> str:
    name, sign, value = word.partition("=")
    if sign and "://" not in name:  # else the sign is of the URL's query
        hidden = is_secret(name.strip("\"'-"))
        return f"{name}={_hidden(value) if hidden else mask_command(value)}"
    return _PAIR.sub(_pair, mask_url(word))


def _pair(match: re.Match[str]) -> str:
    if not is_secret(match["name"].strip("\"'")):
        return match[0]
    return f"{match['name']}{match['sign']}{_hidden(match['value'])}"


def _userinfo(match: re.Match[str]) -> str:
    user, password = match[1], match[2]
    if password is None:
        return match[0]
    return f"{user}:{_hidden(password)}@"


def _hidden(text: str) -> str:
    bare = text.strip("\"'")
    if not bare or is_variable(bare) or bare == "EMPTY":
        return text
    return MASKED
