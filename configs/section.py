"""What all parts of the configuration have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _path(text: str) -> str:
    if not text or "\0" in text:
        msg = "is empty; name a file or a folder" if not text else "a path holds no NUL character"
        raise ValueError(msg)
    return text


PathText = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )
