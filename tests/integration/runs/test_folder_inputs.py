"""Runs over a folder of files: a later session reads them again only if they were changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.inputs import item_store
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run, resume_run

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["", "*.txt"])
async def test_a_later_session_reads_changed_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Reading many PDF files again would take longer than what is left to do."""
    folder, loads = tmp_path / "texts", list[Any]()
    folder.mkdir()
    for one in ("a.txt", "b.txt"):
        (folder / one).write_text(one)
    load = item_store.load_input

    def note(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load(*arguments, **options)

    async with SimulatedFleet(SimulationSpec.fast(nodes=1)) as fleet:
        loaded = load_config(
            {
                "name": "t",
                "input": {"path": str(folder / name)},
                "task": {"prompt": "{text}"},
                "endpoints": {"urls": list(fleet.urls)},
            }
        )
        folder_of_run = (await prepare_run(loaded, tmp_path / "run")).folder
        monkeypatch.setattr(item_store, "load_input", note)
        await resume_run(folder_of_run, loaded)
        assert not loads
        os.utime(folder / "a.txt", ns=(0, 0))
        await resume_run(folder_of_run, loaded)
        assert len(loads) == 1
        (folder / "a.txt").write_text("changed")
        with pytest.raises(ConfigurationError, match="input"):
            await resume_run(folder_of_run, loaded)
