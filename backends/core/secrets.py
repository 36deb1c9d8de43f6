"""Mask secrets: values with secret names, passwords in URLs, arguments of commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

MASKED: Final = "**********"
"""Replaces a secret that was given literally."""

_NAMES: Final = frozenset(
    {
        *("password", "passwd", "passphrase", "token", "secret", "auth", "key"),
        *("authorization", "credential", "credentials", "cookie", "apikey", "authtoken"),
    }
)
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_VARIABLES: Final = re.compile(r"(?:(?:Bearer|Basic) )?(?:\$\{[A-Za-z_]\w*\})+")
_HARMLESS: Final = re.compile(rf"(?:{_VARIABLES.pattern}|EMPTY)?(?=[\s\"'\\&,;}}\])]|$)")
_USERINFO: Final = re.compile(r"(?<=://)([^\s/?#@:]*)(?::([^\s/?#]*))?@")
_SEPARATORS: Final = (":", "=")
_QUERY: Final = re.compile(r"([?&;])([\w.-]+)=([^&#\s\"']*)")
_ASSIGNED: Final = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]+)[\\"'\])]*(?:\s*[:=][\s\\"']*|(?P<gap>[\\"',\s]+))"""
)
_LOGIN: Final = re.compile(
    r"""(?<![\w-])(?:-u|--user|--proxy-user)[\s=\\"',]*(?!\$\{)[^\s:"']*:|\b(?i:bearer|basic)\s+"""
)


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Return True if the value of a key, a header, an option or a variable must not be shown.

    This depends on the words in the last part of the name; words are separated by punctuation and
    capitals. Numbers of tokens (``max_tokens``) are not secret.

    Args:
        name: E.g. ``endpoints.api_key``, ``X-Auth-Token`` or ``apiKey``.
    """
    last = name.rstrip(".").rpartition(".")[2]
    return any(word.lower() in _NAMES for word in _WORD.findall(last))


def is_variable(text: str) -> bool:
    """Return True if a text consists only of variables, which are not secret themselves."""
    return _VARIABLES.fullmatch(text) is not None


def mask_url(text: str) -> str:
    """Return a text with passwords and secret query values in its URLs masked."""
    if "://" not in text:
        return text
    text = _USERINFO.sub(_userinfo, text)
    return _QUERY.sub(lambda m: f"{m[1]}{m[2]}={_mask(m[3])}" if is_secret(m[2]) else m[0], text)


def mask_command(text: str) -> str:
    """Return a text, such as a command line, masked from its first secret to its end.

    A secret follows the name of one (``KEY=VALUE``, ``--api-key VALUE``, ``Authorization: VALUE``),
    a scheme (``Bearer VALUE``) or a user (``-u NAME:VALUE``). Only the program that parses the
    quotes knows how they nest, so the function does not search for the end of the secret. Passwords
    in URLs are masked alone.
    """
    text = mask_url(text)
    starts = _secret_starts(text)
    return text[: min(starts)] + MASKED if starts else text


def mask_arguments(words: Iterable[str]) -> Iterator[str]:
    """Yield the arguments of a command with secrets masked."""
    before, rest = "", False
    for word in words:
        shown = mask_command(word)
        # The preceding words decide, as if all of them were one text.
        joined = f"{before} {word}"
        rest = rest and not word.startswith("-")
        follows = any(start > len(before) for start in _secret_starts(joined))
        if shown == word and (rest or follows):
            shown = _mask(word)
            rest = rest or not before.startswith("-")
        yield shown
        before = f"{before} {word}" if word in _SEPARATORS or before.endswith(_SEPARATORS) else word


def _secret_starts(text: str) -> list[int]:
    starts = [start for match in _ASSIGNED.finditer(text) if (start := _secret_start(match))]
    logins = (match.end() for match in _LOGIN.finditer(text))
    return starts + [end for end in logins if _is_value(text, end)]


def _secret_start(match: re.Match[str]) -> int | None:
    """Return the position of the secret that a name announces, or None."""
    name, end = match["name"], match.end()
    if match["gap"] is not None and not name.startswith("-"):
        return None  # only an option's value follows a blank
    parts = name.split(".")
    secret = is_secret(name) or (match["gap"] is None and any(map(is_secret, parts)))
    return end if secret and _is_value(match.string, end) else None


def _is_value(text: str, start: int) -> bool:
    """Return True if a secret begins here: not the end, a variable, or ``EMPTY``."""
    return text[start:].strip("\"'\\ ") != "" and _HARMLESS.match(text, start) is None


def mask_data(plain: Any, key: str = "", text: Callable[[str], str] = mask_command) -> Any:
    """Return plain data with masked secrets: texts at and below secret keys, and secrets in texts.

    Args:
        plain: The data.
        key: The key under which the data is stored.
        text: Masks the texts at other keys.
    """
    if isinstance(plain, Mapping):
        secret = is_secret(key)
        return {
            name: mask_data(value, key if secret else str(name), text)
            for name, value in plain.items()
        }
    if isinstance(plain, list):
        if text is mask_command and not is_secret(key) and all(isinstance(v, str) for v in plain):
            return list(mask_arguments(plain))
        return [mask_data(value, key, text) for value in plain]
    if not isinstance(plain, str):
        return plain
    return _mask(plain) if is_secret(key) else text(plain)


def _userinfo(match: re.Match[str]) -> str:
    user, password = match[1], match[2]
    if password is None:
        return match[0]
    return f"{user}:{_mask(password)}@"


def _mask(text: str) -> str:
    bare = text.strip("\"'")
    if not bare or is_variable(bare) or bare == "EMPTY":
        return text
    return MASKED
