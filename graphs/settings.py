"""Which settings a run starts with: a preset, a file or a mapping, and what was said beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..backends.contract.errors import ConfigurationError
from ..configs.load import Loaded, load

DEFAULT: Final = "molecular_screening"

NO_RDKIT: Final = (
    "rdkit is not installed: 20 molecules that ship with fanfold take the place of the 4,991, "
    "and the simulated answers are random. pip install 'fanfold[chem]' for the full example."
)


def settle(
    config: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    input_path: str | None = None,
    limit: int | None = None,
    endpoints: str | None = None,
) -> tuple[Loaded, list[str]]:
    """Load a configuration with the options that were given beside it.

    Args:
        config: A preset's name, a file, settings, or None for molecular_screening.
        overrides: ``a.b=value`` assignments.
        input_path: Input in place of the configured one.
        limit: Take only the first so many items.
        endpoints: ``simulated``, an endpoints file, or base URLs separated by commas.

    Returns:
        The configuration, and notices for the user.

    Raises:
        ConfigurationError: Something does not fit; a preset with an input of the user's own
            needs endpoints of their own.
    """
    settings, notices = dict[str, Any](), list[str]()
    if input_path is not None:
        settings |= {"input.path": str(Path(input_path).expanduser().resolve())}
        settings |= {"input.dataset": None}
    if limit is not None:
        settings["input.limit"] = limit
    config = DEFAULT if config is None else config
    loaded = load(config, overrides)
    if endpoints is not None:
        settings |= endpoint_settings(endpoints, loaded.plain["endpoints"]["simulated"])
    if loaded.preset and loaded.config.endpoints.simulated and endpoints in (None, "simulated"):
        if input_path is not None and endpoints is None:
            msg = (
                f"preset {loaded.preset} runs on a simulated fleet; for your own --input say "
                "where the model is served: --endpoints URLS|FILE (or --endpoints simulated)"
            )
            raise ConfigurationError(msg)
        notices.append(_simulated_notice(loaded))
        if find_spec("rdkit") is None:
            settings, more = _without_rdkit(settings, loaded)
            notices += more
    if settings:
        loaded = load(config, overrides, settings)
    return loaded, notices


def endpoint_settings(text: str, simulated: object) -> dict[str, Any]:
    """Return the settings that an ``--endpoints`` option stands for; the key stays.

    Args:
        text: ``simulated``, an endpoints file, or base URLs separated by commas.
        simulated: The configured simulated fleet, kept if there is one.

    Raises:
        ConfigurationError: None of the three.
    """
    kinds: dict[str, Any] = {"simulated": None, "urls": None, "file": None}
    if text == "simulated":
        kinds["simulated"] = simulated or {}
    elif "://" in text:
        kinds["urls"] = [url.strip() for url in text.split(",") if url.strip()]
    else:
        path = Path(text).expanduser().resolve()
        if not path.is_file():
            msg = f"--endpoints {text}: neither 'simulated', nor URLs (http://…), nor a file"
            raise ConfigurationError(msg)
        kinds["file"] = str(path)
    return {f"endpoints.{kind}": value for kind, value in kinds.items()}


def _simulated_notice(loaded: Loaded) -> str:
    return (
        f"preset {loaded.preset}: SIMULATED FLEET. The answers come from no language model, "
        "cost nothing and mean nothing; give --endpoints to ask a real one."
    )


def _without_rdkit(settings: dict[str, Any], loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    changed = dict(settings)
    if loaded.config.input.dataset == "rdkit-nci5k" and "input.path" not in settings:
        changed["input.dataset"] = "molecules"
    simulated = loaded.config.endpoints.simulated
    if simulated is not None and simulated.responder == "esol":
        changed["endpoints.simulated.responder"] = "schema"
    return changed, [NO_RDKIT] if changed != settings else []
