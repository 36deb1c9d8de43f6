"""What the help of several commands names."""

from __future__ import annotations

from typing import Final

SAMPLE: Final = 200
"""Items that a check renders."""

COST_BY: Final = ("model", "endpoint", "node", "day")
"""What costs can be told by."""
