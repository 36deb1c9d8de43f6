"""Going on with a run: what may change, and what makes it another run."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.accounts.folder import RunFolder, write_bytes
from ..backends.build import input_spec, needed_columns
from ..backends.contract.errors import ConfigurationError
from ..backends.inputs.spill import spill
from ..configs.load import MASKED, Loaded, load, to_yaml
from .identity import differences, fingerprint
from .prepare import stamp


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run to go on with.

    Attributes:
        folder: Its folder.
        loaded: The settings to go on with.
        reduce_changed: Whether the reduce stages differ from those that the checkpoints hold.
    """

    folder: RunFolder
    loaded: Loaded
    reduce_changed: bool


async def resume_run(folder: RunFolder, loaded: Loaded | None) -> Resumed:
    """Check that settings fit an existing run, and write them to its folder.

    Args:
        folder: The run's folder.
        loaded: The settings to go on with; None takes the run's own.

    Raises:
        ConfigurationError: The settings ask for something else; the differences are shown.
    """
    before = load(folder.settings)
    after = loaded or before
    await asyncio.to_thread(_check, folder, before, after)
    changed = before.plain["reduce"] != after.plain["reduce"]
    if after.plain != before.plain:
        text = to_yaml(after.plain).encode()
        await asyncio.to_thread(write_bytes, folder.settings, text)
    return Resumed(folder, after, changed)


def _check(folder: RunFolder, before: Loaded, after: Loaded) -> None:
    about = folder.read_provenance()
    lines = differences(before.plain, after.plain)
    if after.config.endpoints.simulated is not None and not about["simulated"]:
        lines.append("endpoints: this run's answers are real, a simulated fleet's are not")
    if not lines and _input_changed(about["input"], after):
        lines.append(f"input: the content of {after.config.input.path} has changed")
    if not lines and _fingerprint(after, about) != about["fingerprint"]:
        lines.append("task or model: a ${VAR} in it has another value than it had")
    if lines:
        shown = "\n  ".join(lines)
        msg = (
            f"{folder.path}: this run asks for something else; start a new run in another folder. "
            f"What differs (run → now):\n  {shown}"
        )
        raise ConfigurationError(msg)
    if after.config.endpoints.api_key.get_secret_value() == MASKED:
        msg = (
            f"{folder.path}: the endpoints' key is not kept in the run folder; give it again: "
            "--set 'endpoints.api_key=${VAR}'"
        )
        raise ConfigurationError(msg)


def _fingerprint(after: Loaded, about: dict[str, Any]) -> str:
    return fingerprint(after.config, about["model"], about["simulated"])


def _input_changed(known: dict[str, Any], after: Loaded) -> bool:
    """Compare the input's content, unless size and time say that nobody touched it.

    A file that is gone does not matter: the run folder holds a copy.
    """
    path = after.config.input.path
    if path is None or not Path(path).exists() or stamp(Path(path)) == known["stamp"]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        spec, columns = input_spec(after.config, None), needed_columns(after.config)
        digest: str = spill(spec, Path(folder) / "items.arrow", columns).digest
    return digest != str(known["digest"])
