"""``fanfold batch``: OpenAI's batch file format in and out, as an ordinary run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from ...backends.core.errors import ConfigurationError
from ...backends.inputs.batch_requests import (
    explain_gateway_refusal,
    explain_unlimited,
    find_model,
    find_unfit,
)
from ...backends.inputs.formats import open_source
from ...backends.storage.run_folder import RunFolder, is_vacant
from ...configs.base import expand_home
from ...configs.loader import LoadedConfig, check_settings, override_settings
from ...configs.models import RunConfig
from ...configs.overrides import Overrides
from ...configs.raw_settings import RawSettings, get_at_path, read_settings
from ...configs.resolve import check_metrics, endpoint_settings
from .options import OutputMode
from .run import run_in_folder

_OWN_SECTIONS: Final = ("input", "task", "batch")
_NAME_CHARACTERS: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class BatchFileNames:
    """Files that the command names.

    Attributes:
        source: The lines to process.
        output: The lines of items that ended.
        errors: The lines of failed items; None puts them into ``output``.
        folder: The run folder; None is the output with ``.fanfold`` appended.
        media_hosts: Hosts from which audio may be fetched; none keeps those of the settings.
    """

    source: Path
    output: Path
    errors: Path | None = None
    folder: Path | None = None
    media_hosts: tuple[str, ...] = ()

    @property
    def run_folder(self) -> RunFolder:
        """Return the run folder."""
        return RunFolder(self.folder or self.output.with_name(f"{self.output.name}.fanfold"))


def run_batch(
    files: BatchFileNames,
    config: str | None,
    endpoints: Sequence[str],
    overrides: Overrides,
    output: OutputMode,
) -> int:
    """Start a batch, or resume it if its run folder exists; return the exit code.

    Raises:
        ConfigurationError: A file or a setting is wrong; nothing was sent.
    """
    folder = files.run_folder
    is_new = is_vacant(folder.path)
    _check_files(files, is_new)
    loaded = _load_settings(files, is_new, config, ",".join(endpoints) or None, overrides)
    return run_in_folder(folder.path, loaded, overrides, output)


def _check_files(files: BatchFileNames, is_new: bool) -> None:
    """Check that the output can be written and is not the output of something else."""
    for path in filter(None, (files.output, files.errors)):
        if path.exists() and files.source.exists() and path.samefile(files.source):
            raise ConfigurationError(f"{path}: is the input; choose another file for the output")
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"{path}: is not a regular file; choose another output")
        if not path.absolute().parent.is_dir():
            raise ConfigurationError(f"{path}: there is no folder {path.absolute().parent}")
        if is_new and path.exists() and path.stat().st_size:
            msg = (
                f"{path}: exists already, and there is no run folder {files.run_folder.path} from "
                "which this batch could go on; choose another file, or delete this one"
            )
            raise ConfigurationError(msg)


def _load_settings(
    files: BatchFileNames,
    is_new: bool,
    config: str | None,
    endpoints: str | None,
    overrides: Overrides,
) -> LoadedConfig:
    """Return the settings: of the file, of the run that goes on, or of the endpoints alone."""
    assignments = [*overrides.assignments, *overrides.budget_assignments]
    if overrides.metrics_port is not None:
        assignments.append(f"metrics.port={overrides.metrics_port}")
        check_metrics()
    if config is not None:
        raw = override_settings(read_settings(config), assignments)
        _check_sections(raw)
    elif not is_new:
        raw = override_settings(read_settings(files.run_folder.settings), assignments)
    else:
        raw = override_settings(read_settings({}), assignments)
    if endpoints is None and is_new and config is None and "endpoints" not in raw.data:
        msg = "name the endpoints that serve the model: --endpoints URLS|FILE, or --config FILE"
        raise ConfigurationError(msg)
    settings: dict[str, Any] = {
        "input.path": str(expand_home(str(files.source)).absolute()),
        "input.format": "openai_batch",
        "batch.output": str(files.output.absolute()),
    }
    if files.errors is not None:
        settings["batch.errors"] = str(files.errors.absolute())
    if files.media_hosts:
        hosts = [host.strip() for text in files.media_hosts for host in text.split(",")]
        settings["batch.allowed_media_domains"] = hosts
    if "name" not in raw.data:
        settings["name"] = _make_name(files.source)
    if endpoints is not None:
        simulated = get_at_path(raw.data, ("endpoints", "simulated"))
        settings |= endpoint_settings(endpoints, simulated)
    loaded = check_settings(raw, settings)
    if not is_new:
        return loaded
    _check_fields(loaded.config)
    _check_limits(loaded.config)
    model = find_model(open_source(loaded.config.input, ()))
    if model is None or model == loaded.config.model.name:
        return loaded
    if loaded.config.model.name is not None:
        msg = (
            f"the lines of {files.source} name the model {model!r}, but model.name is "
            f"{loaded.config.model.name!r}; leave out model.name. If servers call the model "
            "otherwise, set endpoints.models: {name at the server: name in the lines}"
        )
        raise ConfigurationError(msg)
    return check_settings(raw, {"model.name": model})


def _check_sections(raw: RawSettings) -> None:
    if found := [name for name in _OWN_SECTIONS if name in raw.data]:
        msg = (
            f"{raw.source}: the section {found[0]!r} has no place in a batch, whose lines are "
            "whole requests; use a file with endpoints, backend, limits and budget"
        )
        raise ConfigurationError(msg)


def _check_fields(config: RunConfig) -> None:
    """Check that a gateway accepts each request, before the first one is sent."""
    if config.endpoints.first is None:
        return
    explain = partial(explain_gateway_refusal, by_batch=config.backend.is_batch)
    found = find_unfit(open_source(config.input, ()), explain)
    if found is not None:
        where, problem = found
        raise ConfigurationError(f"{where}: {problem}; no request was sent")


def _check_limits(config: RunConfig) -> None:
    """Check that the cost of each request is limited if there is a budget."""
    budget = config.budget
    limits = (budget.usd, budget.tokens, budget.requests, budget.node_hours)
    if not any(limit is not None for limit in limits):
        return
    explain = partial(explain_unlimited, counts_tokens=budget.counts_tokens)
    found = find_unfit(open_source(config.input, ()), explain)
    if found is not None:
        where, problem = found
        raise ConfigurationError(f"{where}: {problem}")


def _make_name(source: Path) -> str:
    """Return a name for the run, from that of the file."""
    stem = _NAME_CHARACTERS.sub("-", source.name.partition(".")[0]).strip("-._")
    return stem[:_LONGEST_NAME] or "batch"
