"""What all tasks of a session share, and the task of some items."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import ConfigurationError, InvalidItemError
from ...backends.core.messages import ShardTask, own_version
from ...backends.core.money import TokenPrices
from ...backends.core.types import Item, Json, Row
from ...backends.core.values import json_size
from ...backends.discovery.connect import ReadyEndpoints, pack_deployments
from ...backends.discovery.login import TOKEN_VARIABLE
from ...backends.inputs.images import ImageFolder, open_images
from ...backends.storage.run_folder import RunFolder, read_prefix
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.serialize import find_lost_secrets
from .heartbeat import stop_file

_MOST_GROWTH: Final = 3
"""Bytes as ASCII with blanks, at most, for each byte of compact UTF-8."""


def worker_settings(loaded: LoadedConfig, ready: ReadyEndpoints) -> dict[str, Any]:
    """Return the settings for workers: streams of an endpoint divided, and no metrics port.

    They are not divided if each worker uses the endpoints of its node. Rates are whole: a worker
    knows its share of them (``backends/fleet/rate_limit.py``). A gateway that ``auto`` chose is
    named, so that workers do not search.
    """
    settings = copy.deepcopy(loaded.plain)
    backend, limits = loaded.config.backend, settings["limits"]
    if limits.get("endpoint_streams") is not None and not backend.node_endpoints:
        limits["endpoint_streams"] = max(1, limits["endpoint_streams"] // backend.concurrent_shards)
    settings["backend"]["user_endpoint_config"] = None  # for the endpoint, not for its workers
    gateway = None if ready.endpoint_set is None else ready.endpoint_set.gateway
    if loaded.config.endpoints.auto and gateway is not None:
        first: dict[str, Any] = {"base_url": gateway.base}
        if isinstance(gateway.key, str):  # auto took it from this variable
            first["token"] = f"${{{TOKEN_VARIABLE}}}"
        del settings["endpoints"]["auto"]
        settings["endpoints"]["first"] = first
    if settings.get("metrics"):
        settings["metrics"] = {"port": None}  # the coordinator serves them
    return settings


@dataclass(frozen=True, slots=True)
class TaskTemplate:
    """What all tasks of a session share.

    Attributes:
        config: The run's settings.
        settings: The same as plain data, as workers get them.
        run: The run's ``id``, ``model``, ``simulated``, ``fingerprint``, ``session``, ``stage``
            and the session's ``token``.
        folder: The run's folder.
        journal: The run's journal folder if workers share it, else None.
        token_prices: Prices of tokens.
        urls: Endpoints for the workers that replace those of the settings, or None.
        deployments: Deployments of the configured gateway for the workers, or None.
        ends_at: Time after which workers start no item, in seconds since 1970, or None.
        images: Reads images that travel with the items; None if there are none, or workers read
            them.
    """

    config: RunConfig
    settings: dict[str, Any]
    run: dict[str, Any]
    folder: Path
    journal: Path | None
    token_prices: dict[str, int]
    urls: list[str] | None = None
    deployments: list[dict[str, Any]] | None = None
    ends_at: float | None = None
    images: ImageFolder | None = None

    @property
    def token(self) -> str:
        """Return the name of the session in its control files."""
        return str(self.run["token"])

    def make_task(self, shard: str, attempt: int, items: Sequence[Item]) -> ShardTask:
        """Return the task of some items, without the last ones if it would be too large; blocks.

        Raises:
            ConfigurationError: The first item alone is too large.
        """
        backend, limits, journal = self.config.backend, self.config.limits, self.journal
        packed, images = pack_items(items, self.images, backend.message_bytes)
        return ShardTask(
            shard=shard,
            attempt=attempt,
            fanfold=own_version(),
            run=self.run,
            settings=self.settings,
            items=packed,
            images=images,
            urls=self.urls,
            deployments=self.deployments,
            journal=None if journal is None else str(journal),
            streams=max(1, -(-limits.streams // backend.concurrent_shards)),
            deadline_s=backend.deadline_s,
            stop_file=None if journal is None else str(stop_file(journal, self.token)),
            ends_at=self.ends_at,
            carry=backend.message_bytes,
            tariff=self.token_prices,
        )


def pack_items(
    items: Sequence[Item], images: ImageFolder | None, most: int
) -> tuple[list[tuple[int, str, Row, str | None]], dict[str, list[dict[str, Json]]] | None]:
    """Return items as a task contains them and their images, as many as fit; blocks.

    An item whose images cannot be read, or do not fit at all, fails on the worker.
    """
    if images is None:
        return _fit_items(items, most), None
    packed, carried, left = list[Any](), dict[str, list[dict[str, Json]]](), most
    for item in items:
        problem, found = item.problem, list[dict[str, Json]]()
        try:
            found = [] if problem else [image.to_json() for image in images.load(item.row)]
        except InvalidItemError as error:
            problem = error.message
        if found and (size := json_size(found)) > most - json_size(item.row):
            found, problem = [], _explain_large_images(size, most)
        entry = (item.index, item.id, item.row, problem)
        left -= json_size(entry) + json_size(found)
        if not packed:
            _fit_items([item], most)  # refuses an item that is too large without its images
        elif left < 0:
            break
        packed.append(entry)
        carried[item.id] = found
    return packed, carried


def _explain_large_images(size: int, most: int) -> str:
    return (
        f"its images take {size:,} bytes, and a task for a worker without the shared run folder "
        f"carries at most {most:,}: shrink them, or set backend.shared_folder: true where the "
        "folder is shared"
    )


def _fit_items(items: Sequence[Item], most: int) -> list[tuple[int, str, Row, str | None]]:
    """Return items as a task contains them, without the last ones if they are too large."""
    packed = [(item.index, item.id, item.row, item.problem) for item in items]
    if _MOST_GROWTH * len(orjson.dumps(packed)) <= most:  # the usual case
        return packed
    left = most
    for count, item in enumerate(packed):
        left -= json_size(item)
        if left < 0 and count == 0:
            msg = (
                f"item {item[1]!r} is larger than the {most:,} bytes of a message to a "
                "worker; shorten it, or run it with backend.kind: local"
            )
            raise ConfigurationError(msg)
        if left < 0:
            return packed[:count]
    return packed


def make_task_template(
    folder: RunFolder,
    loaded: LoadedConfig,
    ready: ReadyEndpoints,
    about: dict[str, Any],
    prices: TokenPrices,
) -> TaskTemplate:
    """Return the template of all tasks of a session.

    Args:
        folder: The run's folder.
        loaded: Its settings.
        ready: Its endpoints.
        about: The run's provenance, with ``session``.
        prices: Prices of tokens.

    Raises:
        ConfigurationError: A key or token of the endpoints is in clear text in the settings;
            secrets are not sent to workers.
    """
    config = loaded.config
    sent = {key: loaded.plain[key] for key in ("endpoints", "model")}
    for secret in find_lost_secrets(sent):
        msg = (
            f"{secret} is written out, and keys are not sent to workers; write it as ${{VAR}} and "
            "set the variable where the workers run"
        )
        raise ConfigurationError(msg)
    run = {key: about[key] for key in ("model", "simulated", "fingerprint", "session", "stage")}
    return TaskTemplate(
        config=config,
        settings=worker_settings(loaded, ready),
        run=run | {"id": about["run"], "token": secrets.token_hex(4), "prefix": read_prefix(about)},
        folder=folder.path,
        journal=folder.journal.resolve() if config.backend.workers_share_folder else None,
        token_prices=prices.to_json(),
        urls=_simulated_urls(ready, config),
        deployments=pack_deployments(ready),
        images=None if config.backend.workers_share_folder else open_images(config),
    )


def _simulated_urls(ready: ReadyEndpoints, config: RunConfig) -> list[str] | None:
    """Return the URLs of a simulated fleet that this process has started."""
    if config.endpoints.simulated is None or config.backend.node_endpoints:
        return None
    return [spec.url for spec in ready.specs]
