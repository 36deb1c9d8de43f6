"""Seeded random values, tokens, texts, strings by format or pattern; ApiError."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from random import Random
from string import ascii_letters, digits
from typing import Any, Final, TypeAlias
from uuid import UUID

import orjson

from ..core.errors import FanfoldError
from ..core.images import count_image_tokens
from ..core.parsing import read_message_text

_SPAN: Final = float(1 << 64)


def hash_parts(*parts: object) -> bytes:
    """Hash values to 16 bytes.

    Args:
        *parts: Bytes are used unchanged, anything else by its ``str``.
    """
    hasher = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hasher.update(b"%d:" % len(data) + data)
    return hasher.digest()


def draw_uniform(*parts: object) -> float:
    """Return a uniform number in [0, 1) derived from values, which are used as in `hash_parts`."""
    return int.from_bytes(hash_parts(*parts)[:8]) / _SPAN


def draw_normal(*parts: object) -> float:
    """Return a standard normal number derived from values (Box and Muller); see `hash_parts`."""
    data = hash_parts(*parts)
    one = (int.from_bytes(data[:8]) + 1) / (_SPAN + 1)
    two = int.from_bytes(data[8:]) / _SPAN
    return math.sqrt(-2.0 * math.log(one)) * math.cos(2.0 * math.pi * two)


class SeededRandom:
    """Stream of random draws from one key.

    Only ``random()`` and ``getrandbits`` of `random.Random` are used: Python guarantees the same
    sequence for these across versions.

    Args:
        key: Any bytes.
    """

    __slots__ = ("_random",)

    def __init__(self, key: bytes) -> None:
        self._random = Random(int.from_bytes(key))

    def uniform(self) -> float:
        """Return a uniform number in [0, 1)."""
        return self._random.random()

    def below(self, bound: int) -> int:
        """Return a uniform integer from 0 to below ``bound`` (which must be positive)."""
        if bound <= 1 << 32:
            return int(self._random.random() * bound)
        return self._random.getrandbits(bound.bit_length() + 64) % bound

    def between(self, low: int, high: int) -> int:
        """Return a uniform integer from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def coin(self) -> bool:
        """Return one fair bit."""
        return self._random.random() < 0.5  # noqa: PLR2004 - the fair half


class ApiError(FanfoldError):
    """Refusal of a request by the simulated node.

    Args:
        message: What is wrong, in vLLM's words where there are any.
        status: HTTP status.
        kind: The body's ``type``.
        param: The faulty field, or None.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the fields when pickled."""
        return type(self), (self.message, self.status, self.kind, self.param)

    @property
    def body(self) -> bytes:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return error_body(self.message, self.kind, self.status, self.param)


def error_body(message: str, kind: str, code: int, param: str | None = None) -> bytes:
    """Encode an error as vLLM 0.32 does.

    Args:
        message: The text.
        kind: The ``type``.
        code: The HTTP status, repeated as an integer.
        param: The faulty field, or None.
    """
    error = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": error})


TextMaker: TypeAlias = Callable[[SeededRandom], str]

_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F)))
_CLASSES: Final = {"d": digits, "w": ascii_letters + digits + "_", "s": " "}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_QUANTIFIERS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_EXTRA: Final = 4  # repetitions beyond the minimum, where the pattern sets no limit
_MOST: Final = 1000  # maximum of repetitions in a pattern


def compile_pattern(pattern: str) -> TextMaker:
    """Compile a regular expression into a generator of matching strings.

    Raises:
        ApiError: The pattern uses unsupported syntax.
    """
    return _PatternParser(pattern).parse()


class _PatternParser:
    """Recursive descent parser of one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._rest = pattern.removeprefix("^")
        if self._rest.endswith("$") and not self._rest.endswith("\\$"):
            self._rest = self._rest[:-1]

    def parse(self) -> TextMaker:
        outer = self._pattern != self._rest
        maker, branches = self._alternatives()
        if self._rest or (outer and branches > 1):  # ^a|b$ anchors each branch differently
            raise self._refused()
        return maker

    def _refused(self) -> ApiError:
        return ApiError(
            f"The pattern {self._pattern!r} is too complex for the simulated fleet.",
            param="response_format",
        )

    def _take(self) -> str:
        if not self._rest:
            raise self._refused()
        char, self._rest = self._rest[0], self._rest[1:]
        return char

    def _try(self, text: str) -> bool:
        found = self._rest.startswith(text)
        if found:
            self._rest = self._rest[len(text) :]
        return found

    def _alternatives(self) -> tuple[TextMaker, int]:
        branches = [self._sequence()]
        while self._try("|"):
            branches.append(self._sequence())
        return lambda dice: branches[dice.below(len(branches))](dice), len(branches)

    def _sequence(self) -> TextMaker:
        makers: list[TextMaker] = []
        while self._rest and self._rest[0] not in "|)":
            makers.append(self._quantified(self._atom()))
        return lambda dice: "".join([make(dice) for make in makers])

    def _atom(self) -> TextMaker:
        char = self._take()
        if char == "(":
            if self._rest.startswith("?") and not self._try("?:"):
                raise self._refused()
            inner, _ = self._alternatives()
            if not self._try(")"):
                raise self._refused()
            return inner
        if char in "^$*+?{":
            raise self._refused()
        return _one_of(self._characters(char))

    def _characters(self, char: str) -> str:
        if char == ".":
            return _PRINTABLE
        if char == "[":
            return self._set()
        return self._escape() if char == "\\" else char

    def _escape(self) -> str:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum() and char not in _ESCAPES:
            raise self._refused()
        return _ESCAPES.get(char, char)

    def _set(self) -> str:
        negated, chosen = self._try("^"), ""
        while not self._try("]"):
            low = self._member()
            if len(low) == 1 and self._rest.startswith("-") and self._rest[1:2] != "]":
                self._take()
                high = self._member()
                if len(high) != 1 or high < low:
                    raise self._refused()
                low = "".join(map(chr, range(ord(low), ord(high) + 1)))
            chosen += low
        if negated:
            chosen = "".join(char for char in _PRINTABLE if char not in chosen)
        if not chosen:
            raise self._refused()
        return chosen

    def _member(self) -> str:
        char = self._take()
        if char == "[" or (char == "&" and self._rest.startswith("&")):
            raise self._refused()  # nested sets mean different things to different engines
        return self._escape() if char == "\\" else char

    def _quantified(self, atom: TextMaker) -> TextMaker:
        if not self._rest or self._rest[0] not in "*+?{":
            return atom
        char = self._take()
        low, limit = self._braces() if char == "{" else _QUANTIFIERS[char]
        self._try("?")  # lazy or not, the strings are the same
        high = low + _EXTRA if limit is None else limit
        if not low <= high <= _MOST:
            raise self._refused()
        return lambda dice: "".join([atom(dice) for _ in range(dice.between(low, high))])

    def _braces(self) -> tuple[int, int | None]:
        inside, closed, self._rest = self._rest.partition("}")
        low, comma, high = inside.partition(",")
        if not closed or not low.isdigit() or not (high.isdigit() or not high):
            raise self._refused()
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None


def _one_of(characters: str) -> TextMaker:
    return lambda dice: characters[dice.below(len(characters))]


BYTES_PER_TOKEN: Final = 4
_PER_MESSAGE: Final = 4
_PER_CONVERSATION: Final = 3


def count_text_tokens(text: str) -> int:
    """Return the tokens of a text: a quarter of its UTF-8 bytes, rounded up."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN)


def count_chat_tokens(messages: Sequence[dict[str, Any]]) -> int:
    """Return the prompt tokens of chat messages in OpenAI's form."""
    texts = sum(map(count_text_tokens, map(read_message_text, messages)))
    texts += _PER_MESSAGE * len(messages)
    return _PER_CONVERSATION + texts + count_image_tokens(messages)


def truncate_tokens(text: str, tokens: int) -> str:
    """Return the first tokens of a text, never cut inside a character."""
    return text.encode()[: tokens * BYTES_PER_TOKEN].decode(errors="ignore")


_LEXICON: Final = (
    "the of and a in is with for by on from to this that between under over each sample model "
    "measured value result structure surface energy binding reaction catalyst solvent polymer "
    "membrane protein ligand molecule crystal lattice phase temperature pressure gradient field "
    "signal noise estimate trend effect rate yield stable weak strong moderate high low observed "
    "expected consistent relative several data evidence method study suggests indicates depends "
    "increases decreases remains across within without first second further"
)
_WORDS: Final = tuple(_LEXICON.split())
_EPOCH: Final = datetime(2020, 1, 1, tzinfo=UTC)
_SECONDS: Final = 5 * 365 * 86_400
_SENTENCE: Final = (6, 14)


def draw_sentence(dice: SeededRandom, count: int) -> str:
    """Draw a sentence of ``count`` words, with a capital letter and a full stop."""
    chosen = " ".join([_WORDS[dice.below(len(_WORDS))] for _ in range(count)])
    return f"{chosen.capitalize()}."


def draw_prose(dice: SeededRandom, tokens: int) -> str:
    """Draw sentences of exactly ``tokens`` tokens, the last one cut to fit."""
    sentences: list[str] = []
    while count_text_tokens(" ".join(sentences)) < tokens:
        sentences.append(draw_sentence(dice, dice.between(*_SENTENCE)))
    return truncate_tokens(" ".join(sentences), tokens)


def draw_text(dice: SeededRandom, least: int, most: int | None) -> str:
    """Draw a text of one or more sentences with bounds on its characters.

    Args:
        dice: The random source.
        least: Minimum of characters.
        most: Maximum of characters, or None.
    """
    drawn = draw_sentence(dice, dice.between(3, 12))
    while len(drawn) < least:
        drawn = f"{drawn} {draw_sentence(dice, dice.between(3, 12))}"
    return drawn if most is None else drawn[:most]


def _moment(dice: SeededRandom) -> datetime:
    return _EPOCH + timedelta(seconds=dice.below(_SECONDS))


def _uuid(dice: SeededRandom) -> str:
    return str(UUID(int=dice.below(1 << 128), version=4))


def _name(dice: SeededRandom) -> str:
    return f"{_WORDS[dice.between(20, len(_WORDS) - 1)]}{dice.below(1000)}"


FORMATS: Final[Mapping[str, Callable[[SeededRandom], str]]] = {
    "date": lambda dice: _moment(dice).date().isoformat(),
    "time": lambda dice: f"{_moment(dice).time().isoformat()}Z",
    "date-time": lambda dice: _moment(dice).isoformat().replace("+00:00", "Z"),
    "duration": lambda dice: f"PT{dice.between(1, 59)}M",
    "email": lambda dice: f"{_name(dice)}@example.org",
    "hostname": lambda dice: f"{_name(dice)}.example.org",
    "ipv4": lambda dice: f"192.0.2.{dice.below(256)}",
    "ipv6": lambda dice: f"2001:db8::{dice.below(1 << 16):x}",
    "uri": lambda dice: f"https://example.org/{_name(dice)}",
    "uuid": _uuid,
}
"""Generators by the name of JSON Schema's ``format``."""
