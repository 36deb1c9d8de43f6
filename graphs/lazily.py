"""Modules that are imported when they are first used: a command pays for what it needs alone.

Hundreds of nodes start fanfold at the same time from one file system; a job's own commands open a
tenth of the files that a run does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """Stands for a module beside this one until something of it is asked for.

    Args:
        name: The module's name, relative to this package: ``.running``.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Import the module and return what it has under that name."""
        return getattr(import_module(self._name, __package__), attribute)
