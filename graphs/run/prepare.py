"""Create a run folder, or check that settings fit an existing one."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.budget.pricing import find_model_price
from ...backends.core.errors import (
    ConfigurationError,
    JournalError,
    MissingExtraError,
    NoEndpointError,
)
from ...backends.core.secrets import mask_arguments
from ...backends.discovery.connect import check_cache, make_model_params
from ...backends.discovery.node_local import ready_endpoints
from ...backends.discovery.resolve import check_endpoint_set, has_own_servers
from ...backends.inputs.base import InputSummary
from ...backends.inputs.item_store import ItemStore, load_input
from ...backends.inputs.source import make_input_spec, needed_columns
from ...backends.simulated.process import make_simulation_spec
from ...backends.storage.run_folder import (
    RunFolder,
    create_folder,
    get_folder_identity,
    get_run_ids,
    is_vacant,
    place_to_be,
    utc_timestamp,
    write_bytes,
)
from ...backends.workers.globus.tasks import TASK_LOG_FILE as GLOBUS_TASKS
from ...configs.loader import LoadedConfig, load_config, make_portable
from ...configs.models import RunConfig
from ...configs.serialize import find_lost_secrets, to_yaml
from .items import check_item_graph

logger = logging.getLogger(__name__)

_INPUT = ("dataset", "id", "limit", "on_duplicate", "smiles")


def compute_fingerprint(config: RunConfig, model: str, simulated: bool | None) -> str:
    """Return a digest of what is asked of every item: task, model, simulated or not."""
    asked = {
        "task": config.task.model_dump(mode="json", by_alias=True),
        "model": config.model.model_dump(mode="json", exclude={"price"}) | {"name": model},
        "simulated": simulated,
    }
    data = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def compute_question_digest(config: RunConfig, model: str) -> bytes:
    """Return a digest of what all questions of a run have in common.

    That is the schema, the model, the sampling, the system text and the item graph; what only
    bounds the length of answers is left out, and so is where the model is served.
    """
    common = make_model_params(config, model).body()
    common.pop("max_completion_tokens", None)
    task = {"system": config.task.system, "graph": config.task.graph}
    data = orjson.dumps([common, task], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(data).digest()


def diff_settings(old: Mapping[str, Any], new: Mapping[str, Any], model: str) -> list[str]:
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


def ensure_run_identity(folder: RunFolder) -> dict[str, Any]:
    """Return what a run is; a folder that was copied becomes a run of its own. Blocks.

    The copy gets a run id of its own, so that neither its checkpoints nor its tasks are those of
    the run that it was copied from. What the journal and the books of the earlier id tell stays
    its own. Tasks that the other run left at Globus Compute are forgotten here: they are asked
    after there. So are the checkpoints: they may have been copied while they were written, and the
    journal has everything. Whoever calls holds the run's lock.

    A folder that came from another file system cannot be told from a copy; it does no harm.

    Raises:
        JournalError: The folder cannot be read or written.
    """
    about, place = folder.read_provenance(), get_folder_identity(folder.path)
    if about.get("place") == place:
        return about
    saved = folder.checkpoints
    try:
        for end in ("", "-wal", "-shm", "-journal"):
            saved.with_name(f"{saved.name}{end}").unlink(missing_ok=True)
        (folder.path / GLOBUS_TASKS).unlink(missing_ok=True)
    except OSError as error:
        msg = f"{folder.path}: what a copy must not keep cannot be removed: {error}"
        raise JournalError(msg) from error
    ids = get_run_ids(about)
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


RUNS_FOLDER: Final = "fanfold-runs"


def default_run_folder(name: str) -> Path:
    """Return a folder for a new run below the working directory."""
    return Path.cwd() / RUNS_FOLDER / new_folder_name(name)


def new_folder_name(name: str) -> str:
    """Return a name for the folder of a new run, from the run's own name."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return f"{name}-{stamp}-{secrets.token_hex(2)}"


async def prepare_run(
    loaded: LoadedConfig,
    path: Path,
    items: Sequence[Mapping[str, Any]] | None = None,
    allow_simulated: bool = True,
    defer_endpoints: bool = False,
) -> RunFolder:
    """Check input and endpoints, and make the run's folder.

    Args:
        loaded: The settings.
        path: The folder to make.
        items: Items in place of the configured input.
        allow_simulated: Whether a simulated fleet may be asked.
        defer_endpoints: Leave the endpoints for later: a job will start them.

    Raises:
        ConfigurationError: Something does not fit; then there is no folder.
    """
    if not await asyncio.to_thread(is_vacant, path):
        msg = f"{path}: contains other files; choose another --out"
        raise ConfigurationError(msg)
    check_input_setting(loaded, items)
    check_item_graph(loaded.config)
    if not defer_endpoints:
        check_endpoints(loaded)
    await asyncio.to_thread(check_cache, loaded.config)
    async with _create_folder(path) as folder:
        spec = make_input_spec(loaded.config, items)
        summary = await asyncio.to_thread(
            load_input, spec, folder.items, needed_columns(loaded.config)
        )
        model, simulated = await _resolve_model(loaded, defer_endpoints)
        if simulated and not allow_simulated:
            msg = (
                "the endpoints are a simulated fleet, whose answers mean nothing; nothing was asked"
            )
            raise ConfigurationError(msg)
        cost = await asyncio.to_thread(find_model_price, loaded.config, model, bool(simulated))
        about: dict[str, Any] = {
            "run": secrets.token_hex(8),
            "earlier": [],
            "place": await asyncio.to_thread(place_to_be, folder),
            "name": loaded.config.name,
            "config": loaded.source,
            "simulated": simulated,
            "model": model,
            "price": cost.to_json() if cost is not None else None,
            "fingerprint": compute_fingerprint(loaded.config, model, simulated),
            "input": describe_input(summary, spec.path),
            "sessions": [],
        }
        await asyncio.to_thread(_write, folder, path, loaded, about)
    return RunFolder(path)


@asynccontextmanager
async def _create_folder(path: Path) -> AsyncIterator[RunFolder]:
    """Make a run folder without blocking the loop; it stays only if the block ends well."""
    making = create_folder(path)
    folder = await asyncio.to_thread(making.__enter__)
    try:
        yield folder
    except BaseException as error:
        await asyncio.to_thread(making.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(making.__exit__, None, None, None)


def check_input_setting(
    loaded: LoadedConfig, items: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Check that there is an input.

    Raises:
        ConfigurationError: Neither items nor a path nor a data set.
    """
    given = loaded.config.input
    if items is None and given.path is None and given.dataset is None:
        msg = f"{loaded.source}: the key 'input.path' (or 'input.dataset') is missing"
        raise ConfigurationError(msg)


def check_endpoints(loaded: LoadedConfig) -> None:
    """Check what can be said of the endpoints without asking them.

    Raises:
        ConfigurationError: None, a malformed URL, an unreadable file; no such simulated fleet.
    """
    try:
        if loaded.config.endpoints.simulated is None:
            check_endpoint_set(loaded.config.endpoints, loaded.plain["endpoints"])
        else:
            make_simulation_spec(loaded.config)
    except MissingExtraError:
        raise
    except NoEndpointError as error:
        if not (loaded.config.backend.node_endpoints and has_own_servers(loaded.config)):
            raise ConfigurationError(f"{loaded.source}: {error.message}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{loaded.source}: {error.message}") from None


async def _resolve_model(loaded: LoadedConfig, defer_endpoints: bool) -> tuple[str, bool | None]:
    """Return the model's name, and whether the endpoints are simulated; None is not known yet."""
    if defer_endpoints:
        return loaded.config.model.name or "", None
    if loaded.config.endpoints.simulated is not None:
        return make_simulation_spec(loaded.config).model, True
    async with ready_endpoints(loaded.config, loaded.plain["endpoints"]) as up:
        return up.model, up.simulated


def _write(folder: RunFolder, path: Path, loaded: LoadedConfig, about: dict[str, Any]) -> None:
    write_bytes(folder.settings, to_yaml(make_portable(loaded.plain, path)).encode())
    folder.write_provenance(about)


def describe_input(summary: InputSummary, path: Path | None) -> dict[str, Any]:
    """Return what provenance keeps of the input."""
    return {
        "source": summary.source,
        "items": summary.items,
        "digest": summary.digest,
        "stamp": read_file_stamp(path),
        "invalid": summary.invalid,
        "skipped_total": summary.skipped_total,
        "skipped": [{"id": s.id, "reason": s.reason} for s in summary.skipped],
    }


def read_file_stamp(path: Path | None) -> list[int] | None:
    """Return size and modification time (ns) of an input file, to see whether it changed."""
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


_BLANK: Final = re.compile(r"\s")
FOLDER_PLACEHOLDER: Final = Path("DIR")
"""What stands for the run's folder in a command that is kept."""
_PACKAGES: Final = ("fanfold", "langgraph", "langchain-core", "langchain-openai", "pydantic")


def begin_session(folder: RunFolder) -> None:
    """Note that this process begins to work on a run that it has locked; blocks."""
    about = ensure_run_identity(folder)
    folder.write_provenance(about | {"sessions": [*about["sessions"], describe_session(folder)]})


def end_session(folder: RunFolder) -> None:
    """Note that the run is finished, in the life that has begun; blocks.

    A graph that goes on from a checkpoint has not begun one: then it is noted whole.
    """
    about = folder.read_provenance()
    lives = about["sessions"]
    begun = bool(lives) and lives[-1]["ended"] is None and lives[-1]["pid"] == os.getpid()
    *before, last = lives if begun else [*lives, describe_session(folder)]
    last |= {"ended": utc_timestamp(), "outcome": "finished"}
    folder.write_provenance(about | {"sessions": [*before, last]})


def describe_session(folder: RunFolder) -> dict[str, Any]:
    """Return what provenance keeps of this process.

    Args:
        folder: The run's folder, which stands in the command as ``FOLDER_PLACEHOLDER``.
    """
    return {
        "started": utc_timestamp(),
        "ended": None,
        "outcome": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in _PACKAGES},
        "command": [
            Path(sys.argv[0]).name,
            *mask_arguments(_strip_folder(sys.argv[1:], folder.path)),
        ],
        "git": {"fanfold": _own_commit(), "workdir": _commit(Path.cwd())},
    }


def _strip_folder(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield the command's arguments, the folder and what lies in it without the folder's path."""
    own = folder.resolve()
    for argument in arguments:
        *key, text = argument.rsplit("=", 1)  # --out=DIR, --set cache=DIR/answers
        if "://" not in text and _may_be_path(text):
            place = Path(text).expanduser().resolve()
            text = (
                str(FOLDER_PLACEHOLDER / place.relative_to(own))
                if place.is_relative_to(own)
                else text
            )
        for spelling in {str(own), str(folder.absolute())}:
            text = re.sub(rf"{re.escape(spelling)}(?![\w.-])", str(FOLDER_PLACEHOLDER), text)
        yield "=".join((*key, text))


def _may_be_path(text: str) -> bool:
    try:
        return ("/" in text and not _BLANK.search(text)) or (text != "" and Path(text).exists())
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _commit(folder: Path) -> str | None:
    """Return the commit that a folder is at, with ``+`` when files differ; None outside git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git: provenance says so by None
    return found.stdout.strip() or None


def _own_commit() -> str | None:
    """Return fanfold's own commit; None for an installed wheel, even below somebody's checkout."""
    root = Path(__file__).resolve().parent.parent
    return _commit(root) if (root / ".git").exists() else None


_CHECKED_LATER: Final = ("node.env.", "node.serve", "backend.user_endpoint_config.")


@dataclass(frozen=True, slots=True)
class ResumedRun:
    """A run to go on with.

    Attributes:
        folder: Its folder.
        loaded: The settings to go on with.
        reduce_changed: Whether the reduce stages differ from those that the checkpoints hold.
    """

    folder: RunFolder
    loaded: LoadedConfig
    reduce_changed: bool


async def resume_run(folder: RunFolder, loaded: LoadedConfig | None) -> ResumedRun:
    """Check that settings fit an existing run, and write them to its folder.

    A folder that was copied gets a run id of its own.

    Args:
        folder: The run's folder.
        loaded: The settings to go on with; None takes the run's own.

    Raises:
        ConfigurationError: The settings ask for something else; the differences are shown.
    """
    before = load_config(folder.settings)
    after = loaded or before
    _check_secrets(folder, after)
    about = await asyncio.to_thread(folder.read_provenance)
    await asyncio.to_thread(_check_unchanged, folder, about, before, after)
    if about["simulated"] is not None and after.plain["endpoints"] != before.plain["endpoints"]:
        await _check_simulated(folder, about, after)
    changed = before.plain["reduce"] != after.plain["reduce"]
    if after.plain != before.plain:
        await asyncio.to_thread(_write_changed, folder, about, after)
    if about.get("place") != await asyncio.to_thread(get_folder_identity, folder.path):
        await asyncio.to_thread(_ensure_identity_locked, folder)
    return ResumedRun(folder, after, changed)


def _check_secrets(folder: RunFolder, after: LoadedConfig) -> None:
    """Check that no secret is missing that the run folder did not keep.

    Those of endpoints, servers and engines are asked for where they are used.
    """
    data = after.config.model_dump(by_alias=True)
    for path in find_lost_secrets(data):
        if not path.startswith(_CHECKED_LATER):
            msg = (
                f"{folder.path}: {path}: a run folder does not keep a secret that was written out; "
                f"give it again, best by a variable: --set '{path}=${{VAR}}'"
            )
            raise ConfigurationError(msg)


def _write_changed(folder: RunFolder, about: dict[str, Any], after: LoadedConfig) -> None:
    """Write changed settings, unless another process works by the old ones."""
    cost = find_model_price(after.config, about["model"], bool(about["simulated"]))
    kept = {"price": None if cost is None else cost.to_json()}
    with folder.lock():
        write_bytes(folder.settings, to_yaml(make_portable(after.plain, folder.path)).encode())
        folder.write_provenance(folder.read_provenance() | kept)


def _ensure_identity_locked(folder: RunFolder) -> None:
    with folder.lock():
        ensure_run_identity(folder)


def _check_unchanged(
    folder: RunFolder, about: dict[str, Any], before: LoadedConfig, after: LoadedConfig
) -> None:
    lines = diff_settings(before.plain, after.plain, about["model"])
    if after.config.endpoints.simulated is not None and about["simulated"] is False:
        lines.append("endpoints: real → simulated; their answers never mix")
    if not lines and _has_input_changed(about["input"], before, after):
        lines.append(f"input: the content of {after.config.input.path} is another")
    if (
        not lines
        and compute_fingerprint(after.config, about["model"], about["simulated"])
        != (about["fingerprint"])
    ):
        lines.append("task or model: a ${VAR} in it has another value than it had")
    if lines:
        raise ConfigurationError(_difference_message(folder, lines))
    _check_columns(folder, after)


def _difference_message(folder: RunFolder, lines: list[str]) -> str:
    shown = "\n  ".join(lines)
    return (
        f"{folder.path}: this run asks for something else; start a new run in another folder. "
        f"What differs (run → now):\n  {shown}"
    )


def _check_columns(folder: RunFolder, after: LoadedConfig) -> None:
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


async def _check_simulated(folder: RunFolder, about: dict[str, Any], after: LoadedConfig) -> None:
    """Check that new endpoints serve the run's model, and are simulated if it is."""
    if after.config.endpoints.simulated is not None:
        make_simulation_spec(after.config)
        return
    async with ready_endpoints(after.config, after.plain["endpoints"], about["model"]) as up:
        if up.simulated != about["simulated"]:
            kinds = ("real", "simulated")
            change = f"{kinds[about['simulated']]} → {kinds[up.simulated]}"
            line = f"endpoints: {change}; their answers never mix"
            raise ConfigurationError(_difference_message(folder, [line]))


def _has_input_changed(known: dict[str, Any], before: LoadedConfig, after: LoadedConfig) -> bool:
    """Compare the input's content, unless size and time say that nobody touched it.

    A file that is gone does not matter, for the run folder holds a copy; a new path must exist.
    """
    path, same = after.config.input.path, before.plain["input"] == after.plain["input"]
    if path is None or (same and not Path(path).exists()):
        return False
    if same and known["stamp"] is not None and read_file_stamp(Path(path)) == known["stamp"]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        spec, columns = make_input_spec(after.config, None), needed_columns(after.config)
        digest: str = load_input(spec, Path(folder) / "items.arrow", columns).digest
    return digest != str(known["digest"])
