"""Going on with a run: what may change, and what makes it another run."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...backends.budget.pricing import price
from ...backends.core.errors import ConfigurationError
from ...backends.discovery.node_local import served
from ...backends.inputs.item_store import ItemStore, spill
from ...backends.inputs.source import input_spec, needed_columns
from ...backends.simulated.process import simulation
from ...backends.storage.run_folder import RunFolder, place_of, write_bytes
from ...configs.loader import Loaded, load, portable
from ...configs.serialize import lost_secrets, to_yaml
from .identity import differences, fingerprint, settle_identity
from .prepare import stamp

_ASKED_LATER: Final = ("node.env.", "node.serve", "backend.user_endpoint_config.")


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

    A folder that was copied gets a run id of its own.

    Args:
        folder: The run's folder.
        loaded: The settings to go on with; None takes the run's own.

    Raises:
        ConfigurationError: The settings ask for something else; the differences are shown.
    """
    before = load(folder.settings)
    after = loaded or before
    _check_secrets(folder, after)
    about = await asyncio.to_thread(folder.read_provenance)
    await asyncio.to_thread(_check, folder, about, before, after)
    if about["simulated"] is not None and after.plain["endpoints"] != before.plain["endpoints"]:
        await _check_kind(folder, about, after)
    changed = before.plain["reduce"] != after.plain["reduce"]
    if after.plain != before.plain:
        await asyncio.to_thread(_keep, folder, about, after)
    if about.get("place") != await asyncio.to_thread(place_of, folder.path):
        await asyncio.to_thread(_settle, folder)
    return Resumed(folder, after, changed)


def _check_secrets(folder: RunFolder, after: Loaded) -> None:
    """Check that no secret is missing that the run folder did not keep.

    Those of endpoints, servers and engines are asked for where they are used.
    """
    data = after.config.model_dump(by_alias=True)
    for path in lost_secrets(data):
        if not path.startswith(_ASKED_LATER):
            msg = (
                f"{folder.path}: {path}: a run folder does not keep a secret that was written out; "
                f"give it again, best by a variable: --set '{path}=${{VAR}}'"
            )
            raise ConfigurationError(msg)


def _keep(folder: RunFolder, about: dict[str, Any], after: Loaded) -> None:
    """Write changed settings, unless another process works by the old ones."""
    cost = price(after.config, about["model"], bool(about["simulated"]))
    kept = {"price": None if cost is None else cost.to_json()}
    with folder.locked():
        write_bytes(folder.settings, to_yaml(portable(after.plain, folder.path)).encode())
        folder.write_provenance(folder.read_provenance() | kept)


def _settle(folder: RunFolder) -> None:
    with folder.locked():
        settle_identity(folder)


def _check(folder: RunFolder, about: dict[str, Any], before: Loaded, after: Loaded) -> None:
    lines = differences(before.plain, after.plain, about["model"])
    if after.config.endpoints.simulated is not None and about["simulated"] is False:
        lines.append("endpoints: real → simulated; their answers never mix")
    if not lines and _input_changed(about["input"], before, after):
        lines.append(f"input: the content of {after.config.input.path} is another")
    if (
        not lines
        and fingerprint(after.config, about["model"], about["simulated"]) != (about["fingerprint"])
    ):
        lines.append("task or model: a ${VAR} in it has another value than it had")
    if lines:
        raise ConfigurationError(_refusal(folder, lines))
    _check_columns(folder, after)


def _refusal(folder: RunFolder, lines: list[str]) -> str:
    shown = "\n  ".join(lines)
    return (
        f"{folder.path}: this run asks for something else; start a new run in another folder. "
        f"What differs (run → now):\n  {shown}"
    )


def _check_columns(folder: RunFolder, after: Loaded) -> None:
    """Check that the kept copy of the input has the columns that the reduce stages show."""
    with ItemStore(folder.items) as store:
        known = store.summary().columns
    for name in needed_columns(after.config):
        if name not in known:
            msg = (
                f"{folder.path}: the run's copy of the input has no column {name!r}, which "
                f"reduce shows; its columns: {', '.join(known)}"
            )
            raise ConfigurationError(msg)


async def _check_kind(folder: RunFolder, about: dict[str, Any], after: Loaded) -> None:
    """Check that new endpoints serve the run's model, and are simulated if it is."""
    if after.config.endpoints.simulated is not None:
        simulation(after.config)
        return
    async with served(after.config, after.plain["endpoints"], about["model"]) as up:
        if up.simulated != about["simulated"]:
            kinds = ("real", "simulated")
            change = f"{kinds[about['simulated']]} → {kinds[up.simulated]}"
            line = f"endpoints: {change}; their answers never mix"
            raise ConfigurationError(_refusal(folder, [line]))


def _input_changed(known: dict[str, Any], before: Loaded, after: Loaded) -> bool:
    """Compare the input's content, unless size and time say that nobody touched it.

    A file that is gone does not matter, for the run folder holds a copy; a new path must exist.
    """
    path, same = after.config.input.path, before.plain["input"] == after.plain["input"]
    if path is None or (same and not Path(path).exists()):
        return False
    if same and known["stamp"] is not None and stamp(Path(path)) == known["stamp"]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        spec, columns = input_spec(after.config, None), needed_columns(after.config)
        digest: str = spill(spec, Path(folder) / "items.arrow", columns).digest
    return digest != str(known["digest"])
