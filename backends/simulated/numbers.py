"""Numbers within a schema's bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final, TypeVar

from .dice import Dice
from .errors import ApiError

_RANGE: Final = 100
"""Width of an interval that the schema leaves open."""
_DIGITS: Final = 4

_Number = TypeVar("_Number", float, Fraction)


def _exact(written: float) -> Fraction:
    return Fraction(str(written))  # the decimal number, not its binary neighbour


def _bounds(
    schema: Mapping[str, Any], width: _Number, read: Callable[[float], _Number]
) -> tuple[_Number, _Number]:
    """Return the closed hull of what the bounds allow."""
    lows = [read(schema[k]) for k in ("minimum", "exclusiveMinimum") if k in schema]
    highs = [read(schema[k]) for k in ("maximum", "exclusiveMaximum") if k in schema]
    if not lows:
        lows = [min(read(0), highs[0] - width)] if highs else [read(0)]
    return max(lows), min(highs) if highs else max(lows) + width


def _step(schema: Mapping[str, Any], whole: bool) -> Fraction:
    """Return the distance of allowed values; 0 where there is none."""
    step = _exact(schema["multipleOf"]) if "multipleOf" in schema else Fraction(int(whole))
    return Fraction(step.numerator) if whole else step


def _stepped(dice: Dice, schema: Mapping[str, Any], step: Fraction) -> Fraction:
    low, high = _bounds(schema, max(Fraction(_RANGE), step * _RANGE), _exact)
    first, last = math.ceil(low / step), math.floor(high / step)
    if "exclusiveMinimum" in schema and first * step <= _exact(schema["exclusiveMinimum"]):
        first += 1
    if "exclusiveMaximum" in schema and last * step >= _exact(schema["exclusiveMaximum"]):
        last -= 1
    if last < first:
        raise ApiError("The schema's bounds leave no number.", param="response_format")
    return dice.between(first, last) * step


def integer(dice: Dice, schema: Mapping[str, Any]) -> int:
    """Draw an integer within the schema's bounds.

    Args:
        dice: The source of chance.
        schema: The number's schema.

    Returns:
        The integer.

    Raises:
        ApiError: The bounds leave none.
    """
    return int(_stepped(dice, schema, _step(schema, whole=True)))


def number(dice: Dice, schema: Mapping[str, Any]) -> float:
    """Draw a number within the schema's bounds, with four decimals where they allow it.

    Args:
        dice: The source of chance.
        schema: The number's schema.

    Returns:
        The number.

    Raises:
        ApiError: The bounds leave none.
    """
    if "multipleOf" in schema:
        return float(_stepped(dice, schema, _step(schema, whole=False)))
    low, high = _bounds(schema, float(_RANGE), float)
    share = dice.unit()
    drawn = low * (1 - share) + high * share  # not low + (high - low) * share: may overflow
    rounded = round(drawn, _DIGITS)
    return rounded if low < rounded < high else drawn
