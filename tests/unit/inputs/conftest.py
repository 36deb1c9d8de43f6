from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.types import Item
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.configs.models import InputConfig


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file of the given name."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., list[Item]]:
    """Spill an input and read all its items back; nothing may stay behind after an error."""

    def read(config: InputConfig, *columns: str, items: Any = None) -> list[Item]:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        target = run / "items.arrow"
        target.unlink(missing_ok=True)
        try:
            load_input(config, target, columns, items)
        except Exception:
            assert list(run.iterdir()) == []
            raise
        with ItemStore(target) as store:
            return store.read(0, len(store))

    return read
