"""The command line in this process, as the tests of its commands use it."""

from __future__ import annotations

from fanfold.tests.integration.cli.conftest import shell

__all__ = ["shell"]
