"""Which run it is: by what it asks, and by the folder that it was made in."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Mapping
from typing import Any

import orjson

from ...backends.core.errors import LedgerError
from ...backends.discovery.connect import model_params
from ...backends.storage.run_folder import RunFolder, place_of, run_ids
from ...backends.workers.globus.tasks import FILE as GLOBUS_TASKS
from ...configs.models import RunConfig

logger = logging.getLogger(__name__)

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


def settle_identity(folder: RunFolder) -> dict[str, Any]:
    """Return what a run is; a folder that was copied becomes a run of its own. Blocks.

    The copy gets a run id of its own, so that neither its checkpoints nor its tasks are those of
    the run that it was copied from. What the journal and the books of the earlier id tell stays
    its own. Tasks that the other run left at Globus Compute are forgotten here: they are asked
    after there. So are the checkpoints: they may have been copied while they were written, and the
    journal has everything. Whoever calls holds the run's lock.

    A folder that came from another file system cannot be told from a copy; it does no harm.

    Raises:
        LedgerError: The folder cannot be read or written.
    """
    about, place = folder.read_provenance(), place_of(folder.path)
    if about.get("place") == place:
        return about
    saved = folder.checkpoints
    try:
        for end in ("", "-wal", "-shm", "-journal"):
            saved.with_name(f"{saved.name}{end}").unlink(missing_ok=True)
        (folder.path / GLOBUS_TASKS).unlink(missing_ok=True)
    except OSError as error:
        msg = f"{folder.path}: what a copy must not keep cannot be removed: {error}"
        raise LedgerError(msg) from error
    ids = run_ids(about)
    about |= {"run": secrets.token_hex(8), "earlier": [*ids], "place": place}
    folder.write_provenance(about)  # last: until then it still counts as a copy
    logger.warning(
        "%s: a copy of the folder of run %s, or moved from another file system; it goes on as run "
        "%s, and tasks of the other run are left to it",
        folder.path,
        ids[0],
        about["run"],
    )
    return about


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 100 else text[:97] + "…"  # noqa: PLR2004 - one line
