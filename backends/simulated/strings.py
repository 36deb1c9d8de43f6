"""Plausible text, and strings of the common formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from .dice import Dice
from .tokens import cut, text_tokens

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


def words(dice: Dice, count: int) -> str:
    """Draw a sentence.

    Args:
        dice: The source of chance.
        count: How many words.

    Returns:
        The words, with a capital letter and a full stop.
    """
    chosen = " ".join([_WORDS[dice.below(len(_WORDS))] for _ in range(count)])
    return f"{chosen.capitalize()}."


def prose(dice: Dice, tokens: int) -> str:
    """Draw a text of exactly some tokens.

    Args:
        dice: The source of chance.
        tokens: Its length.

    Returns:
        Sentences, the last one cut to fit.
    """
    sentences: list[str] = []
    while text_tokens(" ".join(sentences)) < tokens:
        sentences.append(words(dice, dice.between(*_SENTENCE)))
    return cut(" ".join(sentences), tokens)


def text(dice: Dice, least: int, most: int | None) -> str:
    """Draw a text with bounds on its length.

    Args:
        dice: The source of chance.
        least: Fewest characters.
        most: Most characters, or None.

    Returns:
        One sentence or more.
    """
    drawn = words(dice, dice.between(3, 12))
    while len(drawn) < least:
        drawn = f"{drawn} {words(dice, dice.between(3, 12))}"
    return drawn if most is None else drawn[:most]


def _moment(dice: Dice) -> datetime:
    return _EPOCH + timedelta(seconds=dice.below(_SECONDS))


def _uuid(dice: Dice) -> str:
    return str(UUID(int=dice.below(1 << 128), version=4))


def _name(dice: Dice) -> str:
    return f"{_WORDS[dice.between(20, len(_WORDS) - 1)]}{dice.below(1000)}"


FORMATS: Final[Mapping[str, Callable[[Dice], str]]] = {
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
"""Makers by the name of JSON Schema's ``format``."""
