"""From settings to a run folder: everything is checked before anything is written or called."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from ...backends.budget.pricing import price
from ...backends.core.errors import ConfigurationError, MissingExtraError, NoEndpointError
from ...backends.discovery.connect import check_cache
from ...backends.discovery.node_local import served
from ...backends.discovery.resolve import check_place, starts_servers
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import spill
from ...backends.inputs.source import input_spec, needed_columns
from ...backends.simulated.process import simulation
from ...backends.storage.run_folder import (
    RunFolder,
    is_vacant,
    new_folder,
    place_to_be,
    write_bytes,
)
from ...configs.loader import Loaded, portable
from ...configs.serialize import to_yaml
from .identity import fingerprint
from .items import check_graph

RUNS: Final = "fanfold-runs"


def default_folder(name: str) -> Path:
    """Return a folder for a new run below the working directory."""
    return Path.cwd() / RUNS / new_name(name)


def new_name(name: str) -> str:
    """Return a name for the folder of a new run, from the run's own name."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return f"{name}-{stamp}-{secrets.token_hex(2)}"


async def prepare_run(
    loaded: Loaded,
    path: Path,
    items: Sequence[Mapping[str, Any]] | None = None,
    allow_simulated: bool = True,
    unasked: bool = False,
) -> RunFolder:
    """Check input and endpoints, and make the run's folder.

    Args:
        loaded: The settings.
        path: The folder to make.
        items: Items in place of the configured input.
        allow_simulated: Whether a simulated fleet may be asked.
        unasked: Leave the endpoints for later: a job will start them.

    Raises:
        ConfigurationError: Something does not fit; then there is no folder.
    """
    if not await asyncio.to_thread(is_vacant, path):
        msg = f"{path}: holds something else already; choose another --out"
        raise ConfigurationError(msg)
    check_input(loaded, items)
    check_graph(loaded.config)
    if not unasked:
        check_endpoints(loaded)
    await asyncio.to_thread(check_cache, loaded.config)
    async with _new_folder(path) as folder:
        spec = input_spec(loaded.config, items)
        summary = await asyncio.to_thread(spill, spec, folder.items, needed_columns(loaded.config))
        model, simulated = await _settle_model(loaded, unasked)
        if simulated and not allow_simulated:
            msg = (
                "the endpoints are a simulated fleet, whose answers mean nothing; nothing was asked"
            )
            raise ConfigurationError(msg)
        cost = await asyncio.to_thread(price, loaded.config, model, bool(simulated))
        about: dict[str, Any] = {
            "run": secrets.token_hex(8),
            "earlier": [],
            "place": await asyncio.to_thread(place_to_be, folder),
            "name": loaded.config.name,
            "config": loaded.source,
            "simulated": simulated,
            "model": model,
            "price": cost.to_json() if cost is not None else None,
            "fingerprint": fingerprint(loaded.config, model, simulated),
            "input": describe_input(summary, spec.path),
            "lives": [],
        }
        await asyncio.to_thread(_write, folder, path, loaded, about)
    return RunFolder(path)


@asynccontextmanager
async def _new_folder(path: Path) -> AsyncIterator[RunFolder]:
    """Make a run folder without blocking the loop; it stays only if the block ends well."""
    making = new_folder(path)
    folder = await asyncio.to_thread(making.__enter__)
    try:
        yield folder
    except BaseException as error:
        await asyncio.to_thread(making.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(making.__exit__, None, None, None)


def check_input(loaded: Loaded, items: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Check that there is an input.

    Raises:
        ConfigurationError: Neither items nor a path nor a data set.
    """
    given = loaded.config.input
    if items is None and given.path is None and given.dataset is None:
        msg = f"{loaded.source}: the key 'input.path' (or 'input.dataset') is missing"
        raise ConfigurationError(msg)


def check_endpoints(loaded: Loaded) -> None:
    """Check what can be said of the endpoints without asking them.

    Raises:
        ConfigurationError: None, a malformed URL, an unreadable file; no such simulated fleet.
    """
    try:
        if loaded.config.endpoints.simulated is None:
            check_place(loaded.config.endpoints, loaded.plain["endpoints"])
        else:
            simulation(loaded.config)
    except MissingExtraError:
        raise
    except NoEndpointError as error:
        if not (loaded.config.backend.node_endpoints and starts_servers(loaded.config)):
            raise ConfigurationError(f"{loaded.source}: {error.message}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{loaded.source}: {error.message}") from None


async def _settle_model(loaded: Loaded, unasked: bool) -> tuple[str, bool | None]:
    """Return the model's name, and whether the endpoints are simulated; None is not known yet."""
    if unasked:
        return loaded.config.model.name or "", None
    if loaded.config.endpoints.simulated is not None:
        return simulation(loaded.config).model, True
    async with served(loaded.config, loaded.plain["endpoints"]) as up:
        return up.model, up.simulated


def _write(folder: RunFolder, path: Path, loaded: Loaded, about: dict[str, Any]) -> None:
    write_bytes(folder.settings, to_yaml(portable(loaded.plain, path)).encode())
    folder.write_provenance(about)


def describe_input(summary: InputSummary, path: Path | None) -> dict[str, Any]:
    """Return what provenance keeps of the input."""
    return {
        "source": summary.source,
        "items": summary.items,
        "digest": summary.digest,
        "stamp": stamp(path),
        "invalid": summary.invalid,
        "skipped_total": summary.skipped_total,
        "skipped": [{"id": s.id, "reason": s.reason} for s in summary.skipped],
    }


def stamp(path: Path | None) -> list[int] | None:
    """Return size and modification time (ns) of an input file, to see whether it changed."""
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
