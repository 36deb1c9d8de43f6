"""Exit codes of the command line."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
"""All items are done."""
OTHER: Final = 1
"""Anything else."""
USAGE: Final = 2
"""Wrong usage or settings."""
FAILURES: Final = 3
"""Some items failed."""
BUDGET: Final = 4
"""The budget is exhausted; resumable with a higher one."""
INTERRUPTED: Final = 5
"""Interrupted, and resumable."""
