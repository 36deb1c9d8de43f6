"""Identity of a run's question: digests of its settings, and how two settings differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from ...backends.discovery.connect import make_model_params
from ...configs.models import RunConfig

_INPUT = ("dataset", "format", "id", "limit", "on_duplicate", "smiles", "split")


def compute_fingerprint(config: RunConfig, model: str, simulated: bool | None) -> str:
    """Return a digest of what applies to every item: task, model, simulated or not."""
    relevant = {
        "task": _dump_task(config),
        "model": _dump_model(config) | {"name": model},
        "simulated": simulated,
    }
    data = orjson.dumps(relevant, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _dump_task(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the task; those that are not set need no place in the digest."""
    dumped = config.task.model_dump(
        mode="json", by_alias=True, exclude={"fold": True, "images": {"folder"}}
    )
    return {k: v for k, v in dumped.items() if k not in _LATER or v != _LATER[k]}


_LATER: Final[Mapping[str, Any]] = {
    "examples": None,
    "messages": None,
    "images": None,
    "samples": 1,
}
"""Settings, with their defaults, that runs may lack because they began before they existed."""


_PER_ITEM: Final = ("images", "samples")
"""Settings whose part of a question is added for each item."""


def _dump_model(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the model that decide what it answers."""
    dumped = config.model.model_dump(mode="json", exclude={"price", "max_tokens_field"})
    if dumped["system_role"] == "system":
        del dumped["system_role"]  # runs that began before the setting existed have none
    return dumped


def compute_question_digest(config: RunConfig, model: str) -> bytes:
    """Return a digest of what all prompts of a run share.

    It covers the schema, the model, the sampling, the system text or the templates of all messages,
    the examples and the item graph, but not the limit on the length of answers and the endpoints.
    """
    common = make_model_params(config, model).body()
    for field in ("max_completion_tokens", "max_tokens"):
        common.pop(field, None)
    task: dict[str, Any] = {"system": config.task.system, "graph": config.task.graph}
    task |= {k: v for k, v in _dump_task(config).items() if k in _LATER and k not in _PER_ITEM}
    has_system = bool(config.task.system) or any(
        message.role == "system" for message in config.task.messages or ()
    )
    if has_system and config.model.system_role != "system":
        task["system_role"] = config.model.system_role
    data = orjson.dumps([common, task], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(data).digest()


def diff_settings(old: Mapping[str, Any], new: Mapping[str, Any], model: str) -> list[str]:
    """Return one line per difference of two settings that a run may not change.

    The input's path does not count, because its content is compared by digest. Endpoints, backend,
    limits, reduce, the fold of samples and the folder of the images may change.

    Args:
        old: The run's settings.
        new: The settings to resume with.
        model: The model name of the run, used where a setting has none.
    """
    lines = []
    for section in ("input", "task", "model"):
        a, b = dict(old.get(section) or {}), dict(new.get(section) or {})
        if section == "task":
            for settings in (a, b):
                settings.pop("fold", None)
                if isinstance(images := settings.get("images"), Mapping):
                    settings["images"] = {k: v for k, v in images.items() if k != "folder"}
        if section == "model":
            a["name"], b["name"] = model, b.get("name") or model
            a["price"] = b["price"] = None  # may change
            a["max_tokens_field"] = b["max_tokens_field"] = None  # changes no answer
            a["system_role"], b["system_role"] = (
                settings.get("system_role", "system") for settings in (a, b)
            )
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
