"""The commands that look: status, results, presets; and the simulated fleet."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import orjson

from ...backends.core.errors import ConfigurationError
from ...backends.simulated.fleet import SimulatedFleet
from ...backends.simulated.spec import SimulationSpec
from ..saying import say


def simulate(fields: dict[str, Any], file: Path) -> None:
    """Serve a simulated fleet until interrupted."""
    spec = SimulationSpec.from_json(orjson.dumps(fields))
    asyncio.run(_serve(spec, file))


async def _serve(spec: SimulationSpec, file: Path) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with SimulatedFleet(spec) as fleet:
        text = "".join(f"{url}\n" for url in fleet.urls)
        await asyncio.to_thread(_write_endpoints, file, text)
        say(
            [
                f"SIMULATED fleet of {spec.nodes} nodes serving {spec.model!r}",
                f"endpoints: {file}  (fanfold run CONFIG --endpoints {file})",
                f"control: {fleet.base_url}   Ctrl-C ends it",
            ]
        )
        await stop.wait()


def _write_endpoints(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written: {error.strerror}") from None
