"""A home folder with a login for the gateway, and none of the gateway's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from .login import store_login

VARIABLES = ("FIRST_API_KEY", "FIRST_API_BASE", "FIRST_MODEL", "inference_base_url")


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's home and working directory, without a login."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def home(empty_home: Path) -> Path:
    """Return the user's home and working directory, with a login."""
    store_login(empty_home, "good")
    return empty_home
