"""The command line: one module per group of commands."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
