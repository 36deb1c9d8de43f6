"""JSON in the fences that chat models like to put around it."""

from __future__ import annotations

import re
from typing import Final

_FENCE: Final = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def unfenced(text: str) -> str:
    """Return a text without the Markdown fence around the whole of it, if there is one."""
    fenced = _FENCE.match(text)
    return fenced.group(1) if fenced else text
