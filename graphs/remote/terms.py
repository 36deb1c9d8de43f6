"""What all orders of one life of a run have in common."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.core.errors import ConfigurationError
from ...backends.core.money import Tariff
from ...backends.discovery.connect import Serving
from ...backends.storage.run_folder import RunFolder
from ...configs.loader import Loaded
from ...configs.models import RunConfig
from ...configs.serialize import lost_secrets
from .shares import worker_settings, worker_streams


@dataclass(frozen=True, slots=True)
class Terms:
    """What all orders of a life have in common.

    Attributes:
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint``, ``life`` and the life's
            ``token``.
        settings: Its plain settings.
        urls: Endpoints for the workers, in place of the settings' own; or None.
        journal: The run's journal folder if workers share it, else None.
        streams: Most items in flight in one worker.
        deadline_s: Seconds that a worker may take for one order.
        carry: Most bytes of an order, and of a summary.
        nodewise: Whether each worker has endpoints of its own.
        folder: The run's folder.
        config: The run's settings.
        tariff: What tokens cost.
        ends_at: When workers take no more items, in seconds since 1970; or None.
    """

    run: dict[str, Any]
    settings: dict[str, Any]
    urls: list[str] | None
    journal: Path | None
    streams: int
    deadline_s: float
    carry: int
    nodewise: bool
    folder: Path
    config: RunConfig
    tariff: dict[str, int]
    ends_at: float | None = None


def crew_terms(
    folder: RunFolder, loaded: Loaded, up: Serving, about: dict[str, Any], tariff: Tariff
) -> Terms:
    """Return what the orders of one life of a run have in common.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        up: Its endpoints.
        about: What the run is, its ``life`` included.
        tariff: What tokens cost.

    Raises:
        ConfigurationError: A key or token of the endpoints stands in the settings in clear text;
            it would have to travel, and does not.
    """
    config = loaded.config
    told = {key: loaded.plain[key] for key in ("endpoints", "model")}
    for secret in lost_secrets(told):
        msg = (
            f"{secret} is written out, and keys do not travel to workers; write it as ${{VAR}} and "
            "set the variable where the workers run"
        )
        raise ConfigurationError(msg)
    run = {key: about[key] for key in ("model", "simulated", "fingerprint", "life")}
    return Terms(
        run=run | {"id": about["run"], "token": secrets.token_hex(4)},
        settings=worker_settings(loaded),
        urls=_started(up, config),
        journal=folder.journal.resolve() if config.backend.workers_share_folder else None,
        streams=worker_streams(loaded),
        deadline_s=config.backend.deadline_s,
        carry=config.backend.message_bytes,
        nodewise=config.backend.node_endpoints,
        folder=folder.path,
        config=config,
        tariff=tariff.to_json(),
    )


def _started(up: Serving, config: RunConfig) -> list[str] | None:
    """Return the URLs of a simulated fleet that was started here."""
    if config.endpoints.simulated is None or config.backend.node_endpoints:
        return None
    return [spec.url for spec in up.specs]
