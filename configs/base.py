"""Base class of all sections of the configuration, and access of requests to settings."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Access(StrEnum):
    """What a request may do with a setting; all that arrives with an invocation is a request."""

    OPEN = "open"
    """Set it."""
    LOWER = "lower"
    """Set it to no more than the value bound to the graph; None is no limit."""
    SAMPLING = "sampling"
    """Set the keys of it that only choose how the model samples."""
    MODEL = "model"
    """Set it to a name that the settings bound to the graph contain."""
    PATH = "path"
    """Set it to a path below the folder that the owner opened."""
    CLOSED = "closed"
    """Nothing."""


def declare_access(**keys: str) -> dict[str, Access]:
    """Return the access of a section's settings.

    Args:
        **keys: By class of access, the keys of the settings as in a file, separated by blanks.
    """
    return {key: Access(name) for name, listed in keys.items() for key in listed.split()}


def _check_path(text: str) -> str:
    if not text or "\0" in text:
        msg = (
            "is empty; name a file or a folder"
            if not text
            else "a path must not contain a NUL character"
        )
        raise ValueError(msg)
    return text


_LONGEST_S: Final = 1e9
"""Upper bound of all durations: 31 years; far longer ones are no times that a system can wait."""

Duration = Annotated[float, Field(ge=0, le=_LONGEST_S)]
"""Seconds, 0 allowed."""
PositiveDuration = Annotated[float, Field(gt=0, le=_LONGEST_S)]
"""Seconds, more than 0."""

PathText = Annotated[str, AfterValidator(_check_path)]


def expand_home(text: str) -> Path:
    """Return a path, with ``~`` at its beginning replaced; a name of no user stays as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib raises for such a name


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values are immutable.

    Each setting declares in ``access`` what a request may do with it.
    """

    access: ClassVar[dict[str, Access]] = {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )
