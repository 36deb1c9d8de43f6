"""What a run asks: by it, resuming tells the same run from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson

from ..backends.build import model_params
from ..configs.models import RunConfig

_INPUT = ("dataset", "id", "limit", "on_duplicate", "smiles")


def fingerprint(config: RunConfig, model: str, simulated: bool | None) -> str:
    """Return a digest of what is asked of every item: task, model, simulated or not."""
    asked = {
        "task": config.task.model_dump(mode="json", by_alias=True),
        "model": config.model.model_dump(mode="json", exclude={"price"}) | {"name": model},
        "simulated": simulated,
    }
    data = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def asked_by_all(config: RunConfig, model: str) -> bytes:
    """Return a digest of what all questions of a run have in common.

    That is the schema, the model, the sampling, the system text and the item graph; what only
    bounds the length of answers is left out, and so is where the model is served.
    """
    common = model_params(config, model).body()
    common.pop("max_completion_tokens", None)
    task = {"system": config.task.system, "graph": config.task.graph}
    data = orjson.dumps([common, task], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(data).digest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], model: str) -> list[str]:
    """Return, line by line, how two runs' plain settings ask for different things.

    The input's path is left out, for its content is compared by digest; so are endpoints,
    backend, limits and reduce, which may change.

    Args:
        old: The run's settings.
        new: The settings to go on with.
        model: The model's name that the run has settled on; no name stands for it.
    """
    lines = []
    for section in ("input", "task", "model"):
        a, b = dict(old.get(section) or {}), dict(new.get(section) or {})
        if section == "model":
            a["name"], b["name"] = model, b.get("name") or model
            a["price"] = b["price"] = None  # may change
        keys = _INPUT if section == "input" else sorted(a.keys() | b.keys())
        lines += [
            f"{section}.{key}: {_short(a.get(key))} → {_short(b.get(key))}"
            for key in keys
            if a.get(key) != b.get(key)
        ]
    return lines


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 100 else text[:97] + "…"  # noqa: PLR2004 - one line
